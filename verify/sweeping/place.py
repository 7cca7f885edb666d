"""Where a sweep's work is kept: a folder that all machines see, or a URL, with each machine's own disk before it."""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from tqdm import tqdm

from ...convert import typed_json
from ...convert.bundle.workspace import flush, write_durably
from ...convert.cache_folder import cache_folder
from ...convert.errors import UserError, reason
from ...convert.file_names import CARD, FILES
from ...convert.schema import FILE, Each
from ...convert.source.scan import Fingerprint, hash_file
from ...convert.source.source_files import NAMING, name_files

MARKER = "complete.json"  # written last: what has none is not there
_LARGEST_MARKER = 16 << 20  # bytes
_LARGEST_NAMING = 16 << 20
_LARGEST_FILE = 1 << 40
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Marker:
    """What a folder behind a URL holds, by name."""

    files: Annotated[dict[str, Fingerprint], Each(FILE)]


@dataclass(frozen=True)
class Place:
    """A sweep's folder, or where it is behind a URL. A folder gets its name when it is complete.

    folder: shared by all machines; with a URL, of the machine that began the sweep.
    """

    folder: Path
    url: str | None = None

    @property
    def here(self) -> Path:
        """The folder on this machine's disk: of results, or of copies of what is behind the URL."""
        if self.url is None:
            return self.folder
        return cache_folder() / "sweeps" / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def has(self, key: str) -> bool:
        """Tell whether something is there, whole."""
        return (self.folder / key).is_dir() if self.url is None else _marker(self.url, key) is not None

    def fetch(self, key: str) -> Path:
        """Return a folder of this machine that holds what is kept under a key; raises UserError if it is not whole."""
        target = self.here / key
        if self.url is not None and not target.is_dir():
            download(self.url, key, target)
        if not target.is_dir():
            raise UserError(f"{target}: not there: run the sweep again")
        return target

    def deliver(self, finished: Path, key: str) -> None:
        """Keep a finished folder under a key, and take it from where it is; one that is there already stays."""
        if self.url is None:
            for path in (path for path in finished.rglob("*") if path.is_file()):
                flush(path)
            target = self.folder / key
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # another machine was first: its result is the same
                finished.rename(target)
            if not target.is_dir():
                raise UserError(f"{target}: the result could not be put there: see that the folder is writable")
        else:
            upload(finished, self.url, key)
        shutil.rmtree(finished, ignore_errors=True)

    def remove(self, key: str) -> None:
        """Remove what is kept under a key: it stops being whole first."""
        if self.url is not None:
            filesystem, root = _opened(self.url)
            with suppress(FileNotFoundError):
                filesystem.rm_file(f"{root}/{key}/{MARKER}")
                filesystem.rm(f"{root}/{key}", recursive=True)
        for folder in {self.folder / key, self.here / key}:
            if folder.is_dir():
                grave = self.folder / "work" / f"removed-{uuid.uuid4().hex}"
                grave.parent.mkdir(parents=True, exist_ok=True)
                with suppress(OSError):  # another disk
                    folder = folder.rename(grave)
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def work(self, key: str) -> Iterator[Path]:
        """Make a folder to work in; it stays where the work does not succeed, so that another run resumes there.

        A process on a machine that was taken for dead may still be at work: then this one has a folder of its own.
        """
        name = key.replace("/", "+")
        folder = self.here / "work" / name
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.with_name(f"{name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            folder = folder.with_name(f"{name}.{uuid.uuid4().hex[:8]}")
            folder.mkdir()
        try:
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _opened(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it; raises UserError without its driver."""
    from fsspec.core import url_to_fs  # which may import a cloud's client

    try:
        filesystem, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{shown(url)}: fsspec cannot open it ({reason(error)}): install the driver, or give another"
        ) from None
    return filesystem, str(root).rstrip("/")


def shown(url: str) -> str:
    """Return a URL without a password or token that may stand in it."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what file systems raise into one line without secrets."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{shown(url)}: {error.strerror or type(error).__name__}: see that it can be read and written"
        ) from None


def upload(folder: Path, url: str, key: str) -> None:
    """Copy a folder's files behind a URL, then the marker that makes them whole."""
    filesystem, root = _opened(url)
    target = f"{root}/{key}"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with _translated(url):
        filesystem.makedirs(target, exist_ok=True)
        files = {}
        for path in paths:
            name = path.relative_to(folder).as_posix()
            filesystem.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(path), f"{target}/{name}")
            with tqdm(disable=True) as silent:
                files[name] = hash_file(path, silent)
        text = json.dumps(typed_json.to_json(Marker(files)), indent=1) + "\n"
        filesystem.pipe_file(f"{target}/{MARKER}", text.encode())


def _marker(url: str, key: str) -> Marker | None:
    """Return the marker of a folder behind a URL, None if it has none; raises UserError for one that is not ours."""
    filesystem, root = _opened(url)
    path = f"{root}/{key}/{MARKER}"
    with _translated(url):
        filesystem.invalidate_cache()
        try:
            if filesystem.info(path)["size"] > _LARGEST_MARKER:
                raise UserError(f"{shown(url)}/{key}/{MARKER}: too large: not a sweep's")
            data = filesystem.cat_file(path)
        except FileNotFoundError:
            return None
    try:
        marker = typed_json.from_json(Marker, json.loads(data))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(url)}/{key}/{MARKER}: not a sweep's ({reason(error)})") from None
    outside = [name for name in marker.files if not _is_inside(name)]
    if outside:
        raise UserError(
            f"{shown(url)}/{key}/{MARKER}: names files outside of its folder ({outside[0]}): do not trust it"
        )
    return marker


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and name.isprintable() and "\\" not in name


def download(url: str, key: str, target: Path) -> None:
    """Copy a whole folder from behind a URL, check its hashes, and name it; raises UserError for anything else."""
    marker = _marker(url, key)
    if marker is None:
        raise UserError(f"{shown(url)}/{key}: not there, or not whole: run the sweep again")
    filesystem, root = _opened(url)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        for name, expected in marker.files.items():
            path = partial / name
            _copy(filesystem, f"{root}/{key}/{name}", path, expected.size, f"{shown(url)}/{key}/{name}")
            with tqdm(disable=True) as silent:
                if hash_file(path, silent) != expected:
                    raise UserError(f"{shown(url)}/{key}/{name}: not what its marker says: remove it, and run again")
        with suppress(OSError):  # another process was first
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(filesystem: Any, remote: str, path: Path, largest: int, name: str) -> None:
    """Copy a file of at most so many bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with _translated(name), filesystem.open(remote, "rb", block_size=_BLOCK) as stream, path.open("wb") as file:
        while block := stream.read(_BLOCK):
            size += len(block)
            if size > largest:
                raise UserError(f"{name}: more than {largest} bytes: not what it should be")
            file.write(block)
    flush(path)


def _source_names(filesystem: Any, root: str, url: str) -> list[str]:
    """Return the names of a source's files behind a URL; raises UserError for what is not a source."""
    with _translated(url), TemporaryDirectory(prefix="ppx-sweep-") as temporary:
        folder = Path(temporary)
        for name in NAMING:
            if filesystem.exists(f"{root}/{name}"):
                _copy(filesystem, f"{root}/{name}", folder / name, _LARGEST_NAMING, f"{shown(url)}/{name}")
        names = name_files(folder, lambda name: bool(filesystem.exists(f"{root}/{name}"))).names
        missing = [name for name in names if not filesystem.exists(f"{root}/{name}")]
    if missing:
        raise UserError(f"{shown(url)}: {', '.join(missing)} not there; a source holds {', '.join(FILES[:3])}")
    return list(names)


def source_fingerprint(url: str) -> list[Any]:
    """Return what changes when a source behind a URL does: what its file system knows of each of its files.

    Raises UserError for what is not a source.
    """
    filesystem, root = _opened(url)
    with _translated(url):
        filesystem.invalidate_cache()
        names = _source_names(filesystem, root, url)
        return [(name, filesystem.info(f"{root}/{name}")["size"], filesystem.ukey(f"{root}/{name}")) for name in names]


def fetch_source(url: str, target: Path) -> Path:
    """Return a folder with the files of a source behind a URL, and its card; copied if it is not there yet."""
    if target.is_dir():
        return target
    filesystem, root = _opened(url)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        for name in (*_source_names(filesystem, root, url), CARD):
            if name != CARD or filesystem.exists(f"{root}/{CARD}"):
                _copy(filesystem, f"{root}/{name}", partial / name, _LARGEST_FILE, f"{shown(url)}/{name}")
        with suppress(OSError):  # another process was first
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text)
