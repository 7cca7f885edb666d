"""Weights that are read for a CUDA GPU in pieces.

To read a whole matrix takes memory that is new to the process, and the system prepares that more slowly than it copies
from its page cache. A piece goes through memory that was used before.
"""

import threading
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from ..convert.source.checkpoint import Checkpoint
from ..convert.tensorfile import DTYPES
from ..model.weights import rows_of_step, to_torch

_PIECE = 8 << 20  # bytes


class PiecewiseReader:
    """Reads tensors as ``source_weights`` does; several threads may call it at once.

    device: where the tensors are put, a CUDA GPU; None for pinned memory, from which they are copied while the GPU
    computes (ordinary memory where no more can be pinned).
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | None) -> None:
        """Read nothing yet. The current stream is the one that computes with the tensors."""
        self._checkpoint, self._device = checkpoint, device
        self._computing = torch.cuda.current_stream(device) if device and device.type == "cuda" else None
        self._own = threading.local()  # of each thread: its stream, and pinned memory for a piece

    def __call__(self, name: str, step: int | None) -> Tensor:
        """Return a tensor, of a stacked one the rows of a step, whole and in place."""
        spec, rows = self._checkpoint.tensors[name].spec, rows_of_step(self._checkpoint, name, step)
        dtype, shape = to_torch(np.empty(0, DTYPES[spec.dtype])).dtype, (rows.stop - rows.start, spec.columns)
        stream = self._stream()
        with torch.cuda.stream(stream) if stream else nullcontext():
            device = self._device
            whole = torch.empty(shape, dtype=dtype, device=device) if device else _pinned(shape, dtype)
            for first, last in spec.pieces(_PIECE, rows.start, rows.stop):
                piece = to_torch(self._checkpoint.read(name, first, last))
                place = whole[first - rows.start : last - rows.start]
                place.copy_(self._staged(piece) if stream else piece, non_blocking=True)
                if stream:
                    stream.synchronize()  # the next piece is staged in the same place
        if self._computing:
            whole.record_stream(self._computing)
        return whole

    def _stream(self) -> torch.cuda.Stream | None:
        """Return what copies for this thread, None where nothing is copied to a GPU."""
        if self._computing and not hasattr(self._own, "stream"):
            torch.cuda.set_device(self._computing.device)  # of this thread: it would take up memory of the first GPU
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return getattr(self._own, "stream", None)

    def _staged(self, piece: Tensor) -> Tensor:
        """Return a copy of a piece, in this thread's pinned memory."""
        if getattr(self._own, "staging", piece[:0]).nbytes < piece.nbytes:
            self._own.staging = _pinned((max(_PIECE, piece.nbytes),), torch.uint8)
        staged: Tensor = self._own.staging[: piece.nbytes].view(piece.dtype).view(piece.shape)
        return staged.copy_(piece)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    except RuntimeError:  # not as much memory may be pinned: it is copied like other memory
        return torch.empty(shape, dtype=dtype)
