"""The folder in which a bundle is made: ``NAME.partial``, renamed to ``NAME`` when it is whole.

A journal names the files that are complete and were read back, so that a killed run resumes from there.
"""

import fcntl
import glob
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..errors import UserError
from ..file_names import MANIFEST
from ..hints import Hint
from .manifest_schema import journal_problem
from .records import WrittenFile

JOURNAL = ".journal.json"
LOCK = ".lock"
_OWN = (JOURNAL, f"{JOURNAL}.tmp", LOCK)


@dataclass(frozen=True)
class Journal:
    """The files of an unfinished bundle that are complete. fingerprint: stands for all that decides the bundle."""

    fingerprint: str
    files: Mapping[str, WrittenFile]

    def to_json(self) -> dict[str, Any]:
        """Return it as it is stored."""
        files = {name: file.to_json() for name, file in self.files.items()}
        return {"fingerprint": self.fingerprint, "files": files}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return what ``to_json`` wrote; raises ValueError for anything else."""
        if problem := journal_problem(data):
            raise ValueError(problem)
        files = {name: WrittenFile.from_json(name, file) for name, file in data["files"].items()}
        return cls(data["fingerprint"], files)


class Workspace:
    """An open, locked workspace, to be closed. Files are written under a temporary name and committed one by one."""

    def __init__(self, output: Path, fingerprint: str, force: bool = False) -> None:
        """Open the workspace of an output folder; ``fingerprint`` stands for all that decides the bundle's bytes.

        Raises UserError if another run holds it, or if it was begun with another fingerprint and not ``force``.
        """
        self.output = output
        self.folder = output.with_name(f"{output.name}.partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(f"{self.folder}: another conversion is at work there", Hint.WAIT_OR_OTHER_OUTPUT) from None
        journal = _journal(self.folder)
        if journal is None and any(path.name not in _OWN for path in self.folder.iterdir()):
            self.close()
            raise UserError(f"{self.folder}: holds files of something else", Hint.MOVE_FILES)
        if journal is not None and journal.fingerprint != fingerprint and not force:
            self.close()
            raise UserError(
                f"{self.folder}: holds an unfinished conversion of another source or with other settings",
                Hint.DISCARD_UNFINISHED,
            )
        self.files = dict(journal.files) if journal and journal.fingerprint == fingerprint else {}
        self._fingerprint = fingerprint
        self._journal_lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        """Remove what is not in the journal: temporary files, and files whose commit was cut off."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = str(path.relative_to(self.folder))
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in self.files and name not in _OWN:
                path.unlink()
        self._save()

    def path(self, name: str) -> Path:
        """Return where a file of the bundle lies, in the workspace."""
        return self.folder / name

    def temporary(self, name: str) -> Path:
        """Return where to write a file, and make its folder."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f"{path.name}.tmp")

    def rename(self, name: str) -> None:
        """Give a flushed temporary file its name."""
        self.temporary(name).rename(self.path(name))
        flush(self.path(name).parent)

    def commit(self, name: str, record: WrittenFile) -> None:
        """Note in the journal that a file is complete and was read back; may be called from another thread."""
        with self._journal_lock:
            self.files[name] = record
            self._save()

    def forget(self, name: str) -> None:
        """Take a file out of the journal, and remove it: it has to be made again."""
        with self._journal_lock:
            self.files.pop(name, None)
            self.path(name).unlink(missing_ok=True)
            self._save()

    def _save(self) -> None:
        write_durably(self.folder / JOURNAL, json.dumps(Journal(self._fingerprint, self.files).to_json()))

    def publish(self, manifest: str, replaces: bool) -> None:
        """Write the manifest, and give the folder its final name.

        replaces: whether a bundle at the output may be put out of the way; it is removed when the new one is there.
        Raises UserError if something stands at the output and must not be replaced; the workspace then stays.
        """
        write_durably(self.folder / MANIFEST, manifest)
        if self.output.exists() and any(self.output.iterdir()):
            if not replaces:
                raise UserError(f"{self.output}: something was put there meanwhile: move it, and run the command again")
            aside = Path(tempfile.mkdtemp(prefix=_aside(self.output), dir=self.output.parent))
            self.output.rename(aside / self.output.name)
        self.folder.rename(self.output)
        flush(self.output.parent)
        clear_leftovers(self.output)

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock)


def _aside(output: Path) -> str:
    return f".{output.name}.ppx-replaced-"


def clear_leftovers(output: Path) -> None:
    """Remove what a finished bundle no longer needs: its journal and lock, and bundles that it replaced."""
    for name in _OWN:
        (output / name).unlink(missing_ok=True)
    for folder in output.parent.glob(f"{glob.escape(_aside(output))}*"):
        shutil.rmtree(folder)


def _journal(folder: Path) -> Journal | None:
    """Return a workspace's journal, None if none can be used."""
    try:
        return Journal.from_json(json.loads((folder / JOURNAL).read_text("utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def write_durably(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all: temporary name, flush, rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
