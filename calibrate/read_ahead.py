"""Weights that are read from the disk while others are computed with."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from ..convert.bundle.quantized_store import MatrixKey
from ..convert.parallel import cores
from ..convert.source.architecture import Architecture
from ..convert.source.source import Source
from ..model import torch_device as devices
from ..model.blocks import Block
from ..model.weights import Weights, kept_by
from .piecewise import PiecewiseReader
from .workers import Workers

ROOM = 16 << 30  # bytes of a GPU: GPTQ takes 4 GB of them at 7B, and the weights of a block, twice, 1.1 GB
_BLOCKS = 4  # that are read ahead where weights are not kept: two layers
_THREADS = 8  # that read them: a GPU takes weights in faster than a few copy them from the page cache
_SHARE = 0.8  # of a GPU's memory, for that and a whole source


def keys_of(block: Block, steps: int) -> list[MatrixKey]:
    """Return a block's norm and matrices, as a model reads them; steps: of the depformer, the first ones."""
    norm = f"{block.prefix}.{'norm1' if block.sublayer == 'attention' else 'norm2'}.alpha"
    names = [name for stage in block.matrices(steps) for name in stage]
    each = steps if block.component == "depformer" else 1
    stacked = each if block.sublayer == "attention" else 1
    return [(norm, step) for step in range(each)] + [(name, step) for name in names for step in range(stacked)]


class ReadAhead:
    """Reads weights as ``read`` does, and those of the next blocks before they are asked for; a context manager.

    weights: gives what was read ahead, else reads. Holds what was read ahead until it is asked for. active: whether
    anything is read ahead. kept_on: a device that keeps all that was read, in the dtype of the file, so that all blocks
    are read ahead; None for no device.
    """

    def __init__(
        self,
        read: Weights,
        architecture: Architecture,
        active: bool = True,
        kept_on: str | None = None,
    ) -> None:
        """Read nothing yet."""
        self._read, self._architecture, self._active = read, architecture, active
        self._kept: dict[MatrixKey, Tensor] = {}
        self._keeps = kept_on is not None
        self.weights: Weights = kept_by(self._kept, self._taken, kept_on, None) if kept_on else self._taken
        self._threads = ThreadPoolExecutor(min(_THREADS, cores()), thread_name_prefix="ppx-read")
        self._blocks: list[Block] = []
        self._steps = architecture.steps
        self._ahead: dict[MatrixKey, Future[Tensor]] = {}

    def follow(self, blocks: Sequence[Block], steps: int | None = None) -> None:
        """Begin with the first of some blocks, or all where weights are kept; all will be asked for, in this order.

        steps: of the depformer, the first ones, whose weights are; by default all.
        """
        self._blocks, self._steps = list(blocks), steps or self._architecture.steps
        for index in range(len(blocks) if self._keeps else _BLOCKS):
            self._begin(index)

    def at(self, block: Block) -> None:
        """Begin to read a block behind this one, as this one is about to be computed."""
        self._begin(self._blocks.index(block) + _BLOCKS)

    def _begin(self, index: int) -> None:
        for block in self._blocks[index : index + 1] if self._active else ():
            for key in keys_of(block, self._steps):
                if key not in self._kept and key not in self._ahead:
                    self._ahead[key] = self._threads.submit(self._read, *key)

    def _taken(self, name: str, step: int | None) -> Tensor:
        ahead = self._ahead.pop((name, step or 0), None)
        return ahead.result() if ahead else self._read(name, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._kept.clear()
        self._ahead.clear()
        if self._keeps and torch.cuda.is_available():
            torch.cuda.empty_cache()  # memory that was allocated for streams of threads, which no other stream takes


def reading_ahead(source: Source, read: Weights, workers: Workers) -> ReadAhead:
    """Return what reads a source's weights for computing: ahead for a CUDA GPU, which else would wait.

    Where the GPU is this worker's alone and has free what the whole source takes beside GPTQ, all of it stays there.
    """
    device = devices.device()
    if device != "cuda":
        return ReadAhead(read, source.architecture, active=False)
    alone = workers.size == 1 or workers.device == device
    size = sum(tensor.spec.nbytes for tensor in source.checkpoint.tensors.values())
    fits = alone and size + ROOM < _SHARE * min(devices.memory(), torch.cuda.mem_get_info()[0])
    there = torch.device(device, torch.cuda.current_device()) if fits else None
    return ReadAhead(PiecewiseReader(source.checkpoint, there), source.architecture, kept_on=device if fits else None)
