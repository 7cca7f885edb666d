"""Second moments of the inputs of matrices, in the original and in the quantized model: the sums that GPTQ needs."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..convert.bundle.quantized_store import MatrixKey
from ..model.blocks import POSITIONS, Block
from ..model.forward import Floats
from ..model.reference import TorchModel
from ..quant.gptq import Moments


class _AllCapturedError(Exception):
    """All inputs that were asked for are captured: the rest of the block need not be computed."""


class _Sums:
    """Moments as they are summed up."""

    def __init__(self, columns: int, device: str) -> None:
        self.second = torch.zeros((columns, columns), device=device)
        self.cross = torch.zeros((columns, columns), device=device)

    def add(self, original: Tensor, quantized: Tensor) -> None:
        original, quantized = (x.to(self.second.device, torch.float32) for x in (original, quantized))
        self.second += quantized.T @ quantized
        self.cross += original.T @ quantized

    def moments(self) -> Moments:
        return Moments(self.second, self.cross)


def moments_of(inputs: dict[str, Floats], device: str) -> Moments:
    """Return the moments of inputs ``[..., columns]`` of the original and of the quantized model, on a device."""
    original, quantized = (
        np.ascontiguousarray(inputs[name]).reshape(-1, inputs[name].shape[-1]) for name in ("original", "quantized")
    )
    sums = _Sums(original.shape[-1], device)
    for first in range(0, len(original), POSITIONS):
        rows = slice(first, first + POSITIONS)
        sums.add(torch.from_numpy(original[rows]), torch.from_numpy(quantized[rows]))
    return sums.moments()


def block_moments(
    models: dict[str, TorchModel], block: Block, keys: list[MatrixKey], streams: dict[str, Floats]
) -> dict[MatrixKey, Moments]:
    """Return the moments of the inputs of a block's matrices; streams: the inputs of the block, by model."""
    sums: dict[MatrixKey, _Sums] = {}
    for rows in block.batches(streams["original"]):
        inputs = {name: _captured(model, block, keys, streams[name][rows]) for name, model in models.items()}
        for key in keys:
            original, quantized = inputs["original"][key], inputs["quantized"][key]
            if key not in sums:
                sums[key] = _Sums(original.shape[-1], models["original"].device)
            sums[key].add(original, quantized)
    return {key: of_inputs.moments() for key, of_inputs in sums.items()}


def _captured(model: TorchModel, block: Block, keys: list[MatrixKey], x: Floats) -> dict[MatrixKey, Tensor]:
    """Return the inputs ``[rows, columns]`` of matrices, from computing the block as far as it takes."""
    captured: dict[MatrixKey, Tensor] = {}

    def capture(name: str, step: int | None, matrix_input: Tensor) -> None:
        key = (name, step or 0)
        if key in keys:
            captured[key] = matrix_input.reshape(-1, matrix_input.shape[-1])
            if len(captured) == len(keys):
                raise _AllCapturedError

    with suppress(_AllCapturedError):
        replace(model, input_hook=capture).block(block, x)
    return captured
