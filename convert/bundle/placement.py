"""Filling a folder of another program with a bundle's files: hard links or copies, whole or not at all."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..cache_folder import cache_folder
from ..errors import CheckFailed, UserError
from ..file_names import MANIFEST
from ..hints import Hint
from ..progress import byte_bar
from ..source.scan import hash_file
from .receipt import RECEIPT, PlacedFile, Receipt, contents_of, placed, read_receipt, remove_files
from .workspace import flush

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP)


def place(
    bundle: Path,
    folder: Path,
    files: Mapping[str, tuple[int, str]],
    after: Receipt,
    before: Receipt | None,
    quiet: bool = True,
) -> None:
    """Put files of a bundle into a folder, in place of what an earlier installation put there.

    A folder beside it is filled and then takes its name: it is never half full. files: size and sha256 by name.
    after: the receipt, without files. before: the one that is there, whose files were checked. Raises UserError where
    the files cannot be linked or do not fit on the disk, and CheckFailed for a copy with another sha256.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    discard(folder)
    partial, old = _beside(folder)
    total = sum(size for size, _ in files.values())
    if after.copied and (free := shutil.disk_usage(folder.parent).free) < total:
        raise UserError(
            f"{folder.parent}: {free / 1e9:.2f} GB are free and {total / 1e9:.2f} GB are needed", Hint.LINK_INSTEAD
        )
    try:
        partial.mkdir()
        intended = {name: PlacedFile(size, sha256, 0, 0) for name, (size, sha256) in files.items()}
        replace(after, files=intended).write(partial)
        replace(after, files=_fill(partial, bundle, files, after.copied, quiet)).write(partial)
    except BaseException:
        _discard(partial)
        raise
    if before:
        folder.rename(old)
    elif folder.is_dir():
        remove_files(folder, [])  # empty ones: speech-swift makes them when it is asked where they are
    partial.rename(folder)
    flush(folder.parent)
    _discard(old)


def _fill(
    partial: Path, bundle: Path, files: Mapping[str, tuple[int, str]], copied: bool, quiet: bool
) -> dict[str, PlacedFile]:
    records = {}
    with byte_bar("copying" if copied else "linking", sum(size for size, _ in files.values()), quiet) as bar:
        for name, (size, sha256) in files.items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(bundle / name, target, sha256, bar) if copied else _link(bundle / name, target)
            records[name] = placed(target, sha256)
            bar.update(0 if copied else size)
    return records


def _link(source: Path, target: Path) -> None:
    real = source.resolve()  # in the Hub's cache a link to a blob
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise UserError(f"{real}: cannot be linked to {target.parent} ({error.strerror})", Hint.COPY_INSTEAD) from None


def _copy(source: Path, target: Path, sha256: str, bar: "tqdm[Any]") -> None:
    shutil.copyfile(source.resolve(), target)
    flush(target)
    if hash_file(target, bar).sha256 != sha256:
        raise CheckFailed(f"{source}: its sha256 is not the one in {MANIFEST}", Hint.CONVERT_AGAIN)


def leftovers(folder: Path) -> list[Path]:
    """Return what a killed installation into a folder left beside it."""
    return [path for path in _beside(folder) if path.is_dir() and not path.is_symlink()]


def discard(folder: Path) -> None:
    """Remove what a killed installation into a folder left beside it; raises UserError for anything else there."""
    for leftover in leftovers(folder):
        _discard(leftover)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return the names of a folder that is being filled, and of the one that it replaces."""
    return folder.with_name(f".{folder.name}.ppx-partial"), folder.with_name(f".{folder.name}.ppx-old")


def _discard(folder: Path) -> None:
    if not folder.is_dir():
        return
    known = read_receipt(folder)
    ours = {*(known.files if known else ()), RECEIPT, f"{RECEIPT}.tmp"}
    if others := [name for name in contents_of(folder) if name not in ours]:
        raise UserError(f"{folder}: holds {others[0]}, which was not installed: move it away")
    remove_files(folder, [name for name in contents_of(folder) if name in ours])


@contextmanager
def locked() -> Iterator[None]:
    """Let one installation at a time be at work; raises UserError where another one is."""
    lock = cache_folder() / "install.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{lock}: another installation is at work: wait for it") from None
        yield
