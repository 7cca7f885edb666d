"""Regular files of bounded size: what users and sources name is opened as nothing else."""

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import Problem, UserError

_DEEPEST = 64  # levels of JSON
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: Path) -> int:
    """Open a regular file for reading; return its descriptor.

    Never waits: a pipe or a device is refused before a byte of it is read. Raises UserError.
    """
    try:
        _check_kind(path, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        hint = "check the path" if isinstance(error, FileNotFoundError) else ""
        raise UserError(Problem(str(path), error.strerror or str(error), hint)) from None
    except ValueError:  # a zero byte in the name
        raise UserError(Problem(str(path), "not the name of a file")) from None
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
    except UserError:
        os.close(descriptor)
        raise
    return descriptor


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise UserError(Problem(str(path), f"is {kind}", "give a regular file"))


def check_regular(path: Path, largest: int) -> None:
    """Raise UserError for what is not a regular file of at most ``largest`` bytes; for libraries that open it."""
    descriptor = open_regular(path)
    try:
        _check_size(path, os.fstat(descriptor).st_size, largest)
    finally:
        os.close(descriptor)


def _check_size(path: Path, size: int, largest: int) -> None:
    if size > largest:
        raise UserError(Problem(str(path), f"has {size} bytes, and at most {largest} are read", "give the right file"))


def read_regular(path: Path, largest: int) -> bytes:
    """Return the content of a regular file of at most ``largest`` bytes; raises UserError for any other."""
    with os.fdopen(open_regular(path), "rb") as file:
        _check_size(path, os.fstat(file.fileno()).st_size, largest)
        try:
            data = file.read(largest + 1)
        except OSError as error:
            raise UserError(f"{path}: not readable ({error.strerror or error})") from None
    _check_size(path, len(data), largest)  # it may have grown
    return data


def read_json(path: Path, largest: int) -> Any:
    """Return the value of a JSON file in UTF-8.

    Raises UserError for what is not a regular file of at most ``largest`` bytes; ValueError or RecursionError for what
    is not JSON, numbers that are not finite and deep nesting included.
    """

    def refuse_constant(name: str) -> None:
        raise ValueError(f"holds {name}, which is not JSON")

    value = json.loads(read_regular(path, largest).decode("utf-8"), parse_constant=refuse_constant)
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"nests more than {_DEEPEST} levels deep")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
