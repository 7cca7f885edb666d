"""Weights that are read from the disk while others are computed with."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from ..convert.bundle.quantized_store import MatrixKey
from ..convert.source.architecture import Architecture
from ..model.blocks import Block
from ..model.reference import Weights


def keys_of(block: Block, steps: int) -> list[MatrixKey]:
    """Return a block's norm and matrices, as a model reads them; steps: of the depformer, the first ones."""
    norm = f"{block.prefix}.{'norm1' if block.sublayer == 'attention' else 'norm2'}.alpha"
    names = [name for stage in block.matrices(steps) for name in stage]
    each = steps if block.component == "depformer" else 1
    stacked = each if block.sublayer == "attention" else 1
    return [(norm, step) for step in range(each)] + [(name, step) for name in names for step in range(stacked)]


class ReadAhead:
    """Reads weights as ``read`` does, and those of the next block before they are asked for; a context manager.

    Holds what was read ahead until it is asked for, in the dtype of the file. active: whether anything is read ahead.
    """

    def __init__(self, read: Weights, architecture: Architecture, active: bool = True) -> None:
        """Read nothing yet."""
        self._read, self._architecture, self._active = read, architecture, active
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ppx-read")
        self._blocks: list[Block] = []
        self._steps = architecture.steps
        self._ahead: dict[MatrixKey, Future[Tensor]] = {}

    def follow(self, blocks: Sequence[Block], steps: int | None = None) -> None:
        """Begin with the first of some blocks; all their weights will be asked for, in this order.

        steps: of the depformer, the first ones, whose weights are; by default all.
        """
        self._blocks, self._steps = list(blocks), steps or self._architecture.steps
        self._begin(0)

    def at(self, block: Block) -> None:
        """Begin to read the block behind this one, as this one is about to be computed."""
        self._begin(self._blocks.index(block) + 1)

    def _begin(self, index: int) -> None:
        for block in self._blocks[index : index + 1] if self._active else ():
            for key in keys_of(block, self._steps):
                self._ahead[key] = self._thread.submit(self._staged, *key)

    def _staged(self, name: str, step: int) -> Tensor:
        values = self._read(name, step)
        return values.pin_memory() if torch.cuda.is_available() else values  # copied without waiting for the GPU

    def weights(self, name: str, step: int | None) -> Tensor:
        """Return values, from the disk if they were not read ahead."""
        ahead = self._ahead.pop((name, step or 0), None)
        return ahead.result() if ahead else self._read(name, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
