"""Processes that compute one result together, as one of them sees it: what they sum, gather and divide.

With one process nothing is exchanged, and nothing is computed in another way. The processes of a host find each
other by a file and talk over its loopback interface (GPUs over their own links): nothing listens outside the host.
"""

import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Value = TypeVar("Value")

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": _LOOPBACK,
    "NCCL_SOCKET_IFNAME": _LOOPBACK,
    "NCCL_NVLS_ENABLE": "0",  # multicast over NVLink: some hosts cannot, and nothing here is large enough to need it
}
_ALIGNMENT = 64  # bytes, of arrays that are exchanged
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

    def counts(self, count: int) -> list[int]:
        """Return the counts of all processes, by rank."""
        if self.size == 1:
            return [count]
        from torch import distributed

        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(counts, torch.tensor([count]))
        return [int(each) for each in counts]

    def total(self, count: int) -> int:
        """Return the sum of a count over all processes."""
        return sum(self.counts(count))

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
        counts = self.counts(len(part))
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
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        from torch import distributed

        arrays: list[pickle.PickleBuffer] = []  # those in the value: they are exchanged as they are
        head = memoryview(pickle.dumps(value, 5, buffer_callback=arrays.append))
        parts = [np.asarray(part) for part in (head, *(array.raw() for array in arrays))]
        flat = torch.from_numpy(np.concatenate([np.pad(part, (0, _padding(len(part)))) for part in parts]))
        lengths = [[0]] * self.size
        distributed.all_gather_object(lengths, [len(part) for part in parts])
        counts = [sum(length + _padding(length) for length in each) for each in lengths]
        whole = self._joined(flat.to(self.device), counts).cpu().numpy()
        values, first = [], 0
        for each in lengths:
            pieces = []
            for length in each:
                pieces.append(whole[first : first + length])
                first += length + _padding(length)
            values.append(pickle.loads(pieces[0].data, buffers=pieces[1:]))  # noqa: S301  (of this program's own processes)
        return values


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
    apart = gpus >= size  # NCCL refuses processes that share a GPU
    backend = "cpu:gloo,cuda:nccl" if apart else "gloo"
    distributed.init_process_group(
        backend, init_method=meeting.absolute().as_uri(), rank=rank, world_size=size, timeout=_PATIENCE
    )
    yield Workers(rank, size, "cuda" if apart else "cpu")
    distributed.destroy_process_group()
