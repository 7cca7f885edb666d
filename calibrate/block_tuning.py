"""Tuning one block at a time: so that, on the quantized model's stream, it leaves what the original leaves on its own.

For models of which no more than a block can be held with all that tuning needs.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ..convert.bundle.quantized_store import MatrixKey
from ..model.blocks import POSITIONS, Block
from ..model.forward import Floats
from ..model.reference import TorchModel
from .parameters import TrainableMatrix, adam_for, set_rate, take_step, weights_of


def tune_block(
    models: Mapping[str, TorchModel],
    block: Block,
    tuned: Mapping[MatrixKey, TrainableMatrix],
    streams: Mapping[str, Floats],
    steps: int,
) -> None:
    """Move a block's matrices for so many steps; streams: what the original and the quantized block read."""
    adam = adam_for(tuned)
    original, quantized = models["original"], models["quantized"]
    moved = replace(quantized, weights=weights_of(tuned, quantized.weights))
    count, length = streams["original"].shape[:2]
    height = min(count, max(1, POSITIONS // length) if block.component == "temporal" else POSITIONS)
    random = np.random.default_rng(0)
    for step in range(steps):
        set_rate(adam, step, steps)
        rows = random.choice(count, height, replace=False)
        first, second = (
            torch.from_numpy(streams[name][rows]).to(original.device) for name in ("original", "quantized")
        )
        with torch.no_grad():
            goal = first + original.added(block, first)
        with torch.enable_grad():
            loss = (second + moved.added(block, second) - goal).square().mean()
            take_step(adam, loss)
