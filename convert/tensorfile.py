"""safetensors files: read by rows, written as a stream."""

import hashlib
import json
import math
import os
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .errors import Problem, UserError, reason
from .hints import Hint
from .regular_files import open_regular

DTYPES: dict[str, np.dtype[Any]] = {  # safetensors code -> values, little-endian
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_LARGEST_HEADER = 16 << 20  # bytes; the 7B model's has 60 thousand
CODES = {dtype.name: code for code, dtype in DTYPES.items()}  # numpy's, MLX's and PyTorch's name -> code
FLOATS = ("BF16", "F16", "F32")  # what weights may be stored as


@dataclass(frozen=True)
class Spec:
    """Name, dtype (a safetensors code such as BF16) and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.parameters * DTYPES[self.dtype].itemsize

    @property
    def rows(self) -> int:
        """Rows when the tensor is seen as a matrix: all axes but the last."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Length of the last axis."""
        return self.shape[-1] if self.shape else 1

    def pieces(self, size: int, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield where pieces of at most ``size`` bytes, one row at least, begin and end: of all rows, or of some."""
        stop, height = self.rows if last is None else last, max(1, size * self.rows // max(self.nbytes, 1))
        for begin in range(first, stop, height):
            yield begin, min(begin + height, stop)


class TensorFile:
    """An open safetensors file, a context manager. The safetensors library checks its header; ``pread`` reads values.

    Not memory-mapped: mapped pages would count as this process's memory, and a truncated file would kill it.
    """

    def __init__(self, path: Path, otherwise: Hint = Hint.DOWNLOAD_AGAIN) -> None:
        """Open a file; raises UserError if it is not there or not a whole safetensors file.

        otherwise: what to do about one that is not.
        """
        self.path = path
        self._descriptor = -1
        self._descriptor = open_regular(path)
        try:
            self._opened_as = self._state()
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            if _LARGEST_HEADER < length < os.fstat(self._descriptor).st_size:
                raise UserError(f"{path}: has a header of {length} bytes, where {_LARGEST_HEADER} are plenty")
            with safe_open(path, framework="numpy"):
                pass
        except UserError:
            self.close()
            raise
        except MemoryError:  # the library maps all of the file to look at its header
            self.close()
            raise UserError(f"{path}: too large for this process's address space: raise `ulimit -v`") from None
        except (OSError, SafetensorError) as error:
            self.close()
            raise UserError(
                Problem(str(path), f"not a complete safetensors file ({reason(error)})", otherwise)
            ) from None
        names: list[str] = []  # of every object in the header, the tensors' among them

        def keep_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            names.extend(name for name, value in pairs if isinstance(value, dict))
            return dict(pairs)

        self.header = os.pread(self._descriptor, 8 + length, 0)
        parsed = json.loads(self.header[8:], object_pairs_hook=keep_names)
        self.doubled = sorted(name for name, count in Counter(names).items() if count > 1)
        self.metadata: dict[str, str] = parsed.pop("__metadata__", None) or {}
        placed = sorted((fields["data_offsets"][0], name, fields) for name, fields in parsed.items())
        self.offsets = {name: len(self.header) + begin for begin, name, _ in placed}
        self.unknown = {name: fields["dtype"] for _, name, fields in placed if fields["dtype"] not in DTYPES}
        self.specs = {
            name: Spec(name, fields["dtype"], tuple(fields["shape"]))
            for _, name, fields in placed
            if name not in self.unknown
        }

    def header_problems(self) -> list[Problem]:
        """Return the names that stand in the header twice, and the dtypes that nothing here reads."""
        return [Problem(f"{self.path}: {name}", "stands there twice") for name in self.doubled] + [
            Problem(f"{self.path}: {name}", f"dtype {dtype}, which nothing here reads")
            for name, dtype in self.unknown.items()
        ]

    def read(self, name: str, first: int, last: int, once: bool = False) -> NDArray[Any]:
        """Return rows ``first`` to ``last`` (not included) of a tensor seen as a matrix, in its own dtype.

        once: they are not read again soon, so the system may use their place in its page cache (which spares it from
        searching one for what is written: a quarter of a conversion's time).
        """
        spec = self.specs[name]
        width = spec.columns * DTYPES[spec.dtype].itemsize
        array = np.empty((last - first, spec.columns), DTYPES[spec.dtype])
        offset = self.offsets[name] + first * width
        self._read_into(array.reshape(-1).view(np.uint8).data, offset)
        if once and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, array.nbytes, os.POSIX_FADV_DONTNEED)
        return array

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise UserError(f"{self.path}: not readable at byte {offset + done} ({error.strerror})") from None
            if not count:
                raise UserError(f"{self.path}: ends at byte {offset + done}, while it was read", Hint.DOWNLOAD_AGAIN)
            done += count

    def _state(self) -> tuple[int, int, int, int]:
        status = self.path.stat()
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def is_unchanged(self) -> bool:
        """Tell whether the file at its path is still the one that was opened, by its inode, size and time."""
        try:
            return self._state() == self._opened_as
        except OSError:
            return False

    def changed(self) -> list[Path]:
        """Return its path if it is not the file that was opened, else nothing."""
        return [] if self.is_unchanged() else [self.path]

    @property
    def nbytes(self) -> int:
        """Bytes of the file when it was opened."""
        return self._opened_as[2]

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._descriptor >= 0:
            self.close()
            warnings.warn(f"{self.path}: was not closed", ResourceWarning, stacklevel=2, source=self)


def header_of(specs: Sequence[Spec], metadata: dict[str, str]) -> bytes:
    """Return the header of a file that holds these tensors one after another, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
        begin += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class HashingFile:
    """A new file that knows the sha256 of what was written to it; on the disk when ``finish`` returns.

    Pieces are written by a thread of their own while the next ones are hashed and made; up to QUEUED bytes wait there,
    so that a disk that stalls for a moment does not stall the quantizers.
    """

    QUEUED = 64 << 20

    def __init__(self, path: Path) -> None:
        """Create the file, or empty it."""
        self._file = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ppx-write")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._queued = 0
        self.size = 0

    def append(self, data: bytes | memoryview) -> None:
        """Write bytes at the end; they must not change afterwards. An error may come with the next call."""
        view = memoryview(data).cast("B")
        self._settle(self.QUEUED)
        self._waiting.append((self._writer.submit(self._write, view), len(view)))
        self._queued += len(view)
        self._hash.update(view)
        self.size += len(view)

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view) or 0 :]

    def _settle(self, most: int) -> None:
        """Wait until at most so many bytes are queued; raises what their writing raised."""
        while self._waiting and (self._queued > most or self._waiting[0][0].done()):
            future, size = self._waiting.popleft()
            future.result()
            self._queued -= size

    def finish(self) -> str:
        """Flush to the disk, close, and return the sha256."""
        self._settle(0)
        os.fsync(self._file.fileno())
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close without flushing: after an error."""
        self._writer.shutdown(cancel_futures=True)
        self._file.close()


class TensorWriter:
    """A safetensors file under way: header first, then the tensors' bytes in the order that was declared.

    checksums: the CRC-32 of each tensor's bytes, by which a damaged one is found in a file whose sha256 is wrong.
    """

    def __init__(self, path: Path, specs: Sequence[Spec], metadata: dict[str, str]) -> None:
        self._path = path
        self._file = HashingFile(path)
        self._file.append(header_of(specs, metadata))
        self.header_bytes = self._file.size
        self._ahead = [(spec.name, spec.nbytes) for spec in reversed(specs)]
        self.checksums = {spec.name: 0 for spec in specs}

    def append(self, name: str, array: NDArray[Any]) -> int:
        """Write the next rows of a tensor; returns their bytes. Raises ValueError if it is not this one's turn."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        expected, left = self._ahead.pop() if self._ahead else ("the end", 0)
        if name != expected or data.size > left:
            raise ValueError(f"{self._path}: {data.size} bytes of {name} came where {left} of {expected} belong")
        if data.size < left:
            self._ahead.append((name, left - data.size))
        self.checksums[name] = zlib.crc32(data.data, self.checksums[name])
        self._file.append(data.data)
        return data.size

    def finish(self) -> str:
        """Flush to the disk and return the file's sha256; raises ValueError if a tensor is not whole."""
        if self._ahead:
            raise ValueError(f"{self._path}: {self._ahead[-1][0]} is not whole")
        return self._file.finish()

    def close(self) -> None:
        """Close an unfinished file: after an error."""
        self._file.close()
