"""Tuning one block at a time: so that, on the quantized model's stream, it leaves what the original leaves on its own.

For models of which no more than a block can be held with all that tuning needs.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ..convert.bundle.quantized_store import Part
from ..model.blocks import POSITIONS, Block
from ..model.forward import Floats
from ..model.reference import TorchModel
from .parameters import TrainableMatrix, adam_for, set_rate, take_step, weights_of


def tune_block(
    original: TorchModel,
    quantized: TorchModel,
    place: Block,
    tuned: Mapping[Part, TrainableMatrix],
    streams: tuple[Floats, Floats],
    steps: int,
) -> None:
    """Move a block's matrices for so many steps; streams: what the original and the quantized block read."""
    adam = adam_for(tuned)
    moved = replace(quantized, weights=weights_of(tuned, quantized.weights))
    length = streams[0].shape[1] if place.component == "temporal" else 1
    height = min(len(streams[0]), max(1, POSITIONS // length))
    random = np.random.default_rng(0)
    for step in range(steps):
        set_rate(adam, step, steps)
        rows = random.choice(len(streams[0]), height, replace=False)
        first, second = (torch.from_numpy(stream[rows]).to(original.device) for stream in streams)
        with torch.no_grad():
            goal = first + original.added(place, first)
        with torch.enable_grad():
            loss = (second + moved.added(place, second) - goal).square().mean()
            take_step(adam, loss)
