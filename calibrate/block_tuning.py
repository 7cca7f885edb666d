"""Fine-tuning one block at a time: on the quantized model's stream it is to give what the original gives on its own.

For models of which only one block fits into memory with everything that training needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..convert.bundle.quantized_store import MatrixKey
from ..model.blocks import POSITIONS, Block
from ..model.reference import TorchModel
from .parameters import TrainableMatrix, adam_for, set_learning_rate, take_step, trainable_weights


@dataclass(frozen=True)
class BlockTuning:
    """Steps of fine-tuning for each block. on_block: called with a block before it is fine-tuned."""

    steps: int = 0
    on_block: Callable[[Block], None] | None = None


def tune_block(
    models: Mapping[str, TorchModel],
    block: Block,
    matrices: Mapping[MatrixKey, TrainableMatrix],
    streams: Mapping[str, Tensor],
    steps: int,
) -> None:
    """Train a block's matrices for some steps; streams: the inputs of the block, by model as in ``models``."""
    adam = adam_for(matrices)
    original, quantized = models["original"], models["quantized"]
    trainable = replace(quantized, weights=trainable_weights(matrices, quantized.weights))
    count, length = streams["original"].shape[:2]
    height = min(count, max(1, POSITIONS // length) if block.component == "temporal" else POSITIONS)
    random = np.random.default_rng(0)
    for step in range(steps):
        set_learning_rate(adam, step, steps)
        rows = torch.from_numpy(random.choice(count, height, replace=False)).to(original.device)
        inputs = {name: x[rows] for name, x in streams.items()}
        with torch.no_grad():
            target = inputs["original"] + original.added(block, inputs["original"])
        with torch.enable_grad():
            output = inputs["quantized"] + trainable.added(block, inputs["quantized"])
            take_step(adam, (output - target).square().mean())
