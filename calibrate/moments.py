"""Second moments of what matrices read, in the original and in the quantized model: sums that GPTQ needs."""

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


class _SeenError(Exception):
    """All inputs that were asked for have been seen."""


class _Sums:
    """Moments under way."""

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
    models: dict[str, TorchModel], block: Block, parts: list[MatrixKey], streams: dict[str, Floats]
) -> dict[MatrixKey, Moments]:
    """Return the moments of what a block's matrices read; streams: what the block reads in both models."""
    sums: dict[MatrixKey, _Sums] = {}
    for rows in block.batches(streams["original"]):
        caught = {name: _caught(model, block, parts, streams[name][rows]) for name, model in models.items()}
        for part in parts:
            original, quantized = caught["original"][part], caught["quantized"][part]
            if part not in sums:
                sums[part] = _Sums(original.shape[-1], models["original"].device)
            sums[part].add(original, quantized)
    return {part: found.moments() for part, found in sums.items()}


def _caught(model: TorchModel, block: Block, parts: list[MatrixKey], x: Floats) -> dict[MatrixKey, Tensor]:
    """Return the inputs ``[rows, columns]`` of matrices while a block is computed, as far as it must be."""
    caught: dict[MatrixKey, Tensor] = {}

    def seen(name: str, step: int | None, given: Tensor) -> None:
        part = (name, step or 0)
        if part in parts:
            caught[part] = given.reshape(-1, given.shape[-1])
            if len(caught) == len(parts):
                raise _SeenError

    with suppress(_SeenError):
        replace(model, seen=seen).block(block, x)
    return caught
