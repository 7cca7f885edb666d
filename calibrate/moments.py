"""Second moments of what matrices read, in the original and in the quantized model: sums that GPTQ needs."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..convert.bundle.quantized_store import Part
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


def moments_of(inputs: tuple[Floats, Floats], device: str) -> Moments:
    """Return the moments of inputs ``[..., columns]`` of the original and of the quantized model, on a device."""
    sums = _Sums(inputs[0].shape[-1], device)
    flat = [np.ascontiguousarray(array).reshape(-1, array.shape[-1]) for array in inputs]
    for first in range(0, len(flat[0]), POSITIONS):
        sums.add(*(torch.from_numpy(array[first : first + POSITIONS]) for array in flat))
    return sums.moments()


def block_moments(
    original: TorchModel, quantized: TorchModel, place: Block, parts: list[Part], streams: tuple[Floats, Floats]
) -> dict[Part, Moments]:
    """Return the moments of what a block's matrices read; streams: what the block reads in both models."""
    sums: dict[Part, _Sums] = {}
    for rows in place.pieces(streams[0]):
        caught = [
            _caught(model, place, parts, x[rows]) for model, x in zip((original, quantized), streams, strict=True)
        ]
        for part in parts:
            first, second = caught[0][part], caught[1][part]
            if part not in sums:
                sums[part] = _Sums(first.shape[-1], original.device)
            sums[part].add(first, second)
    return {part: found.moments() for part, found in sums.items()}


def _caught(model: TorchModel, place: Block, parts: list[Part], x: Floats) -> dict[Part, Tensor]:
    """Return the inputs ``[rows, columns]`` of matrices while a block is computed, as far as it must be."""
    caught: dict[Part, Tensor] = {}

    def seen(name: str, step: int | None, given: Tensor) -> None:
        part = (name, step or 0)
        if part in parts:
            caught[part] = given.reshape(-1, given.shape[-1])
            if len(caught) == len(parts):
                raise _SeenError

    with suppress(_SeenError):
        replace(model, seen=seen).block(place, x)
    return caught
