"""Processes that compute one result together, as one of them sees it: what they sum, gather and divide.

With one process nothing is exchanged, and nothing is computed in another way. The processes of a host find each
other by a file and talk over its loopback interface (GPUs over their own links): nothing listens outside the host.
"""

import io
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

Value = TypeVar("Value")

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": _LOOPBACK,
    "NCCL_SOCKET_IFNAME": _LOOPBACK,
    "NCCL_NVLS_ENABLE": "0",  # multicast over NVLink: some hosts cannot, and nothing here is large enough to need it
}
_ALIGNMENT = 64  # bytes, of tensors that are exchanged
_PATIENCE = timedelta(days=7)  # others may compute for hours; who started the processes sees when one ends


@dataclass(frozen=True)
class Workers:
    """All processes, and which of them this one is. All must call the same methods in the same order."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"  # where what is exchanged travels from: cuda if each process has a GPU of its own

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return which of ``count`` things are this process's: those of later ranks come later."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def counts(self, *own: int) -> list[list[int]]:
        """Return the counts that each process gives, by rank."""
        if self.size == 1:
            return [list(own)]
        from torch import distributed

        counts = [torch.zeros(len(own), dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(counts, torch.tensor(own))
        return [each.tolist() for each in counts]

    def total(self, count: int) -> int:
        """Return the sum of a count over all processes."""
        return sum(each for (each,) in self.counts(count))

    def wait(self) -> None:
        """Return when all processes are here."""
        self.counts(0)

    def add_up(self, *tensors: Tensor) -> None:
        """Sum tensors over all processes, in place; the result is the same bytes on each."""
        if self.size > 1:
            from torch import distributed

            for tensor in tensors:
                summed = tensor.to(self.device) if tensor.device.type == "cpu" else tensor
                distributed.all_reduce(summed)
                if summed is not tensor:
                    tensor.copy_(summed)

    def concatenated(self, part: Tensor) -> tuple[Tensor, slice]:
        """Return the parts ``[rows, ...]`` of all processes one after another, and where in them this one's is."""
        if self.size == 1:
            return part, slice(0, len(part))
        counts = [count for (count,) in self.counts(len(part))]
        first = sum(counts[: self.rank])
        return self._joined(part, counts), slice(first, first + len(part))

    def _joined(self, part: Tensor, counts: list[int]) -> Tensor:
        from torch import distributed

        padded = part.new_zeros((max(counts), *part.shape[1:]))  # what is exchanged has one shape
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([each[:count] for each, count in zip(parts, counts, strict=True)])

    def gathered(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank; with several, their tensors are where the exchange is."""
        if self.size == 1:
            return [value]
        pickled = io.BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(value)
        parts = [*pickler.parts, torch.frombuffer(pickled.getbuffer(), dtype=torch.uint8)]  # tensors, and the rest
        flat = torch.cat([pad(part.to(self.device), (0, _padding(len(part)))) for part in parts])
        counts = self.counts(len(flat), len(parts[-1]))
        whole = self._joined(flat, [count for count, _ in counts])
        values, first = [], 0
        for count, rest in counts:
            last = first + count - rest - _padding(rest)
            values.append(_Unpickler(whole[last : last + rest].cpu().numpy().tobytes(), whole[first:last]).load())
            first += count
        return values


class _Pickler(pickle.Pickler):
    """Pickles a value without its tensors, whose bytes it keeps as ``parts``.

    In place of each tensor stand its dtype, its shape, and where its bytes begin.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.parts: list[Tensor] = []
        self._size = 0

    def persistent_id(self, value: object) -> tuple[torch.dtype, torch.Size, int] | None:
        """Keep a tensor; None for anything else."""
        if not isinstance(value, Tensor):
            return None
        self.parts.append(value.contiguous().view(-1).view(torch.uint8))
        first = self._size
        self._size += value.nbytes + _padding(value.nbytes)
        return value.dtype, value.shape, first


class _Unpickler(pickle.Unpickler):
    """Loads what ``_Pickler`` wrote, in a process of this program; parts: the bytes of tensors, one after another."""

    def __init__(self, pickled: bytes, parts: Tensor) -> None:
        super().__init__(io.BytesIO(pickled))
        self._parts = parts

    def persistent_load(self, described: tuple[torch.dtype, torch.Size, int]) -> Tensor:
        """Return a tensor."""
        dtype, shape, first = described
        return self._parts[first : first + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _padding(length: int) -> int:
    return -length % _ALIGNMENT


@contextmanager
def joined(rank: int, size: int, meeting: Path) -> Iterator[Workers]:
    """Join the other processes; each has the GPU of its rank, where there are GPUs, and shares one where there are few.

    meeting: a file that is not there yet, the same for all. One that fails does not wait for the others: it must end.
    """
    from torch import distributed

    os.environ.update(_ENVIRONMENT)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        torch.cuda.set_device(rank % gpus)
    own_gpu = gpus >= size  # NCCL refuses processes that share a GPU
    backend = "cpu:gloo,cuda:nccl" if own_gpu else "gloo"
    distributed.init_process_group(
        backend, init_method=meeting.absolute().as_uri(), rank=rank, world_size=size, timeout=_PATIENCE
    )
    workers = Workers(rank, size, "cuda" if own_gpu else "cpu")
    workers.add_up(torch.zeros(1))  # GPUs find each other now: what fails fails before anything is computed
    yield workers
    distributed.destroy_process_group()
