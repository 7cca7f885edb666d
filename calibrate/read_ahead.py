"""Weights that are read from the disk while others are computed with."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from torch import Tensor

from ..convert.bundle.quantized_store import MatrixKey
from ..convert.source.architecture import Architecture
from ..model.blocks import Block
from ..model.reference import Weights


class ReadAhead:
    """Reads matrices as ``read`` does, and those of the next block before they are asked for; a context manager.

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
        """Begin with the first of some blocks; all their matrices will be asked for, in this order.

        steps: of the depformer, the first ones, whose matrices are; by default all.
        """
        self._blocks, self._steps = list(blocks), steps or self._architecture.steps
        self._begin(0)

    def at(self, block: Block) -> None:
        """Begin to read the block behind this one, as this one is about to be computed."""
        self._begin(self._blocks.index(block) + 1)

    def _begin(self, index: int) -> None:
        for block in self._blocks[index : index + 1] if self._active else ():
            names = [name for stage in block.matrices(self._steps) for name in stage]
            stacked = block.component == "depformer" and block.sublayer == "attention"
            for key in [(name, step) for name in names for step in range(self._steps if stacked else 1)]:
                self._ahead[key] = self._thread.submit(self._read, *key)

    def weights(self, name: str, step: int | None) -> Tensor:
        """Return a matrix, from the disk if it was not read ahead."""
        ahead = self._ahead.pop((name, step or 0), None)
        return ahead.result() if ahead else self._read(name, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
