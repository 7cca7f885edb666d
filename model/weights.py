"""Weights and rows of embedding tables, as PyTorch's models read them: from a checkpoint, or kept on a device."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..convert.source.checkpoint import Checkpoint
from ..quant.affine import BFLOAT16
from .forward import Tokens

Weights = Callable[[str, int | None], Tensor]  # name in the checkpoint and depformer step -> values
Rows = Callable[[str, Tokens], Tensor]  # name of an embedding table and tokens [...] -> its rows [..., dim]

_NEAR, _AT_ONCE = 32, 512  # rows of an embedding table: the farthest that are read together, and the most


def to_torch(array: NDArray[np.generic]) -> Tensor:
    """Return a numpy array as a tensor that shares its memory, bfloat16 too."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> NDArray[np.generic]:
    """Return a tensor on the CPU as a numpy array that shares its memory, bfloat16 too."""
    if tensor.dtype == torch.bfloat16:
        array: NDArray[np.generic] = tensor.contiguous().view(torch.uint16).numpy().view(BFLOAT16)
        return array
    return tensor.contiguous().numpy()


def source_weights(checkpoint: Checkpoint) -> Weights:
    """Return a way to read a checkpoint's tensors: of a stacked one the rows of a step, of others all."""

    def read(name: str, step: int | None) -> Tensor:
        rows = rows_of_step(checkpoint, name, step)
        return to_torch(checkpoint.read(name, rows.start, rows.stop))

    return read


def rows_of_step(checkpoint: Checkpoint, name: str, step: int | None) -> slice:
    """Return which rows of a checkpoint's tensor are a step's: of one that is not stacked, all."""
    role = checkpoint.tensors[name].role
    first = (step or 0) * role.height if role.stacked > 1 else 0
    return slice(first, first + role.height)


def kept_by(
    kept: dict[tuple[str, int], Tensor], read: Weights, device: str, dtype: torch.dtype | None = torch.float32
) -> Weights:
    """Return a way to read matrices that reads each once, until ``kept`` is cleared; dtype: None for their own."""

    def read_once(name: str, step: int | None) -> Tensor:
        key = (name, step or 0)
        if key not in kept:
            there = read(name, step)
            values = there.to(device, non_blocking=there.is_pinned())  # narrow on its way; pinned, nothing waits for it
            kept[key] = values if dtype is None else values.to(dtype)
        return kept[key]

    return read_once


def rows_of(weights: Weights) -> Rows:
    """Return a way to read rows of tables that are read whole."""
    return lambda name, tokens: weights(name, None)[torch.from_numpy(tokens).long()]


def sorted_rows(checkpoint: Checkpoint) -> Rows:
    """Return a way to read rows of a checkpoint's embedding tables: ascending ones, each once."""

    def read(name: str, ids: Tokens) -> Tensor:
        # Rows that are near each other are read at once: those between them cost less than another call.
        apart = (np.diff(ids) > _NEAR) | (np.diff(ids // _AT_ONCE) > 0)
        runs = np.split(ids, np.flatnonzero(apart) + 1)
        parts = [checkpoint.read(name, int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs]
        return to_torch(np.concatenate(parts))

    return read


def each_once(read: Rows, device: str) -> Rows:
    """Return a way to read any rows: ``read`` gives each of them once, ascending; they are repeated on a device."""

    def read_all(name: str, tokens: Tokens) -> Tensor:
        ids, inverse = np.unique(tokens, return_inverse=True)
        return read(name, ids).to(device)[torch.from_numpy(inverse.reshape(tokens.shape)).to(device)]

    return read_all
