"""Tensors of a file that ``torch.save`` wrote, read without unpickling and without PyTorch.

``torch.load(weights_only=True)`` runs no foreign code, but unpacks records and allocates what a pickle claims before
anybody can compare that with the file. Here the central directory of the zip file is looked at first, and the few
opcodes that a dictionary of tensors takes are interpreted: nothing is imported, called or unpacked.
"""

import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import printable, reason

_MOST_RECORDS = 64
_LARGEST_PICKLE = 64 << 10  # bytes; that of two tensors takes 300
_MOST_AXES = 8
_LONGEST_AXIS = 1 << 40
_DTYPES: dict[str, np.dtype[Any]] = {  # as torch calls a storage -> its values
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch HalfStorage": np.dtype("<f2"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch DoubleStorage": np.dtype("<f8"),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_ORDERED = "collections OrderedDict"
_UNREADABLE = (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, LookupError, OSError, struct.error, zlib.error)
_WRONG = "not a file that torch.save writes of tensors"


@dataclass(frozen=True)
class _Name:
    """A name that a pickle would import."""

    name: str


class _Mark:
    """Where the items of a tuple or dictionary begin on the stack."""


def read_tensors(data: bytes) -> dict[str, Any]:
    """Return the dictionary that a file holds, its tensors as arrays of their own memory.

    Raises ValueError for any other file: records that are compressed or claim more than the file has, a pickle that
    asks for more than tensors, a tensor that claims more than its record holds, the format before PyTorch 1.6.
    """
    records = _records(data)
    prefix = next((name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")), None)
    if prefix is None or records.get(f"{prefix}byteorder", b"little").strip() != b"little":
        raise ValueError(f"{_WRONG}, or of another byte order")
    program = records[f"{prefix}data.pkl"]
    if len(program) > _LARGEST_PICKLE:
        raise ValueError(f"its pickle has {len(program)} bytes, where that of a few tensors has some hundred")

    def storage(saved: Any) -> NDArray[Any]:
        kind, name, key, _, count = saved if isinstance(saved, tuple) and len(saved) == 5 else [None] * 5
        dtype = _DTYPES.get(name.name) if isinstance(name, _Name) else None
        if kind != "storage" or dtype is None or not isinstance(key, str) or type(count) is not int:
            raise ValueError(f"{_WRONG} ({_shown(name)})")
        record = records.get(f"{prefix}data/{key}")
        if record is None or len(record) != count * dtype.itemsize:
            raise ValueError(f"a record claims {count * dtype.itemsize} bytes, and has {len(record or b'')}")
        return np.frombuffer(record, dtype)

    try:
        tensors = _interpret(program, storage)
    except (LookupError, TypeError, AttributeError) as error:  # fewer items than an opcode takes, or others
        raise ValueError(f"{_WRONG} ({reason(error)})") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"holds {_shown(tensors)}, not a dictionary")
    return tensors


def _records(data: bytes) -> dict[str, bytes]:
    """Return the records of a zip file in memory, after a look at its central directory."""
    if not data.startswith(b"PK\x03\x04"):
        raise ValueError(f"{_WRONG} (since PyTorch 1.6: a zip file)")
    if data.count(b"PK\x01\x02") > _MOST_RECORDS:  # each entry of the directory begins so
        raise ValueError(f"holds more than {_MOST_RECORDS} records: do not use this file")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            entries = packed.infolist()
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise ValueError(
                        f"record {entry.filename!a} is compressed ({entry.compress_size} bytes stand for "
                        f"{entry.file_size}), which torch.save never does: do not use this file"
                    )
            if sum(entry.file_size for entry in entries) > len(data):
                raise ValueError("its records claim more bytes than it has: do not use this file")
            return {entry.filename: packed.read(entry) for entry in entries}
    except _UNREADABLE as error:
        if type(error) is ValueError:
            raise
        raise ValueError(f"{_WRONG} ({reason(error)})") from None


def _interpret(program: bytes, storage: Callable[[Any], NDArray[Any]]) -> Any:
    """Return what a pickle of tensors builds; raises ValueError for an opcode that builds anything else."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        items = []
        while not isinstance(item := stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def set_items(items: list[Any]) -> None:
        keys = items[::2]
        if not isinstance(stack[-1], dict) or len(items) % 2 or not all(isinstance(key, str) for key in keys):
            raise ValueError(_WRONG)
        stack[-1].update(zip(keys, items[1::2], strict=True))

    argument: Any
    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "MARK":
                stack.append(_Mark())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "SETITEMS":
                set_items(since_mark())
            case "SETITEM":
                pair = [stack.pop(), stack.pop()]
                set_items(pair[::-1])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_allowed(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_allowed(f"{module} {name}" if isinstance(module, str) and isinstance(name, str) else "?"))
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_built(function.name, arguments))
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(f"refused, it asks for more than tensors ({other}): do not use this file")
    raise ValueError(_WRONG)


def _allowed(name: str) -> _Name:
    if name not in (_TENSOR, _PARAMETER, _ORDERED) and name not in _DTYPES:
        shown = printable(name.replace(" ", "."))[:60]
        raise ValueError(f"refused, it asks for more than tensors ({shown}): do not use this file")
    return _Name(name)


def _built(name: str, arguments: Any) -> Any:
    if name == _ORDERED and arguments == ():
        return {}
    if name == _PARAMETER:
        return arguments[0]
    if name != _TENSOR:
        raise ValueError(_WRONG)
    if not isinstance(arguments, tuple) or len(arguments) < 4:
        raise ValueError(_WRONG)
    values, offset, size, stride = arguments[:4]
    numbers = [offset, *size, *stride]
    if not isinstance(values, np.ndarray) or values.ndim != 1 or len(size) != len(stride) or len(size) > _MOST_AXES:
        raise ValueError(_WRONG)
    if not all(type(number) is int and 0 <= number < _LONGEST_AXIS for number in numbers):
        raise ValueError("a tensor has an impossible shape")
    count = math.prod(size)
    if count > len(values):  # also where strides of 0 would give more values than there are
        raise ValueError(f"a tensor claims {count * values.itemsize} bytes of {values.nbytes}")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count and last >= len(values):
        raise ValueError(f"a tensor reaches to value {last} of {len(values)}")
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[offset:] if count else values, size, steps, writeable=False).copy()


def _shown(value: Any) -> str:
    return printable(value.name)[:60] if isinstance(value, _Name) else type(value).__name__
