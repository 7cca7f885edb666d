"""What an installation put into a folder of another program: nothing else there is touched."""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from .. import typed_json
from ..errors import UserError, reason
from ..file_names import is_plain
from ..regular_files import read_json
from ..schema import SHA256, whole
from ..source.scan import hash_file
from .manifest import LARGEST, TOOLKIT
from .workspace import write_durably

RECEIPT = ".ppx-install.json"
_VERSION = 1
_Wide = Annotated[int, whole(0, (1 << 64) - 1)]


@dataclass(frozen=True)
class PlacedFile:
    """A file that was put there. inode, modified: of it on the disk, in ns; they stay as they are unless it changes."""

    size: int
    sha256: Annotated[str, SHA256]
    inode: _Wide
    modified: _Wide


@dataclass(frozen=True)
class Receipt:
    """What was put into a folder. identity: the model's there. fingerprint, source, recipe: of the bundle."""

    receipt_version: Annotated[int, whole(_VERSION, _VERSION)]
    identity: str
    fingerprint: str
    source: str
    recipe: str
    copied: bool
    files: dict[str, PlacedFile]

    @property
    def description(self) -> str:
        """What it is, for people."""
        how = "copied" if self.copied else "linked"
        return f"{self.source}, recipe {self.recipe}, {len(self.files)} files {how}"

    def write(self, folder: Path) -> None:
        """Write it into a folder, whole or not at all."""
        write_durably(folder / RECEIPT, json.dumps(typed_json.to_json(self), indent=1) + "\n")


def receipt(identity: str, fingerprint: str, source: str, recipe: str, copied: bool) -> Receipt:
    """Return the receipt of an installation that has put nothing there yet."""
    return Receipt(_VERSION, identity, fingerprint, source, recipe, copied, {})


def read_receipt(folder: Path) -> Receipt | None:
    """Return the receipt in a folder, or None; raises UserError for one that is not ours."""
    path = folder / RECEIPT
    if not os.path.lexists(path):
        return None
    try:
        if path.is_symlink():
            raise ValueError("it is a link")
        found = typed_json.from_json(Receipt, read_json(path, LARGEST))
        if wrong := [name for name in found.files if not is_plain(name)]:
            raise ValueError(f"it names {wrong[0][:60]!a}")
    except (ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: not a receipt of {TOOLKIT} ({reason(error)}): move the folder away") from None
    return found


def placed(path: Path, sha256: str) -> PlacedFile:
    """Return what is recorded of a file that was put somewhere."""
    found = path.lstat()
    return PlacedFile(found.st_size, sha256, found.st_ino, max(found.st_mtime_ns, 0))


def is_as_placed(folder: Path, name: str, record: PlacedFile, bar: "tqdm[Any]") -> bool:
    """Tell whether a file is the one that was put there: by its inode and time, else by its sha256."""
    path = folder / name
    if path.parent.resolve() != folder.resolve().joinpath(*name.split("/")[:-1]):  # a folder became a link
        return False
    try:
        found = path.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_size != record.size:
        return False
    same = (found.st_ino, max(found.st_mtime_ns, 0)) == (record.inode, record.modified)
    return same or hash_file(path, bar).sha256 == record.sha256


def contents_of(folder: Path) -> list[str]:
    """Return the names of all files and links below a folder, hidden ones included, links not followed."""
    names = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        names += [str(Path(parent, name).relative_to(folder)) for name in [*files, *links]]
    return sorted(names)


def remove_files(folder: Path, names: list[str]) -> None:
    """Remove files below a folder, the receipt last, and the folders that are empty then, this one included."""
    for name in sorted(names, key=lambda name: name == RECEIPT):
        (folder / name).unlink(missing_ok=True)
    for parent, _, _ in sorted(os.walk(folder), reverse=True):
        if not any(Path(parent).iterdir()):
            Path(parent).rmdir()
