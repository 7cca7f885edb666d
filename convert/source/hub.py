"""Files from the Hugging Face Hub, through its own client: its cache, its tokens, its environment variables.

The client drops what a killed process had of a file. Here parts stay beside the cache's blobs, are gone on with, and
become blobs when their hash is the Hub's.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status

from ..errors import CheckFailed, UserError, refuse
from ..hints import Hint
from ..progress import Progress, byte_bar
from .hub_client import TRIES, asked_wait, git_blob, is_transient, silent_client, translate_errors, with_retries

_PATIENCE = 60.0  # seconds without a byte
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # names a file in the cache


@dataclass(frozen=True)
class Remote:
    """A file on the Hub. sha256: of large files; blob: git's hash of small ones."""

    name: str
    size: int
    sha256: str | None
    blob: str

    @property
    def hash(self) -> str:
        """What its blob in the cache is called, by the client too."""
        return self.sha256 or self.blob

    @property
    def part(self) -> str:
        """What the begun blob is called."""
        return f"{self.hash}.ppx.incomplete"


@dataclass(frozen=True)
class DiskBudget:
    """Where the bundle will stand, and its bytes for each byte that is downloaded: both must fit on the disk."""

    folder: Path
    share: float


def cached(repository: str, revision: str | None, files: Sequence[str]) -> tuple[Path, str] | None:
    """Return folder and commit of files that the Hub's cache holds already, None if one is not there.

    A revision other than a commit is looked up in the cache, not on the Hub: ask ``download`` for the newest.
    """
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(files), local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return (folder, folder.name) if all((folder / name).is_file() for name in files) else None


def download(
    repository: str,
    revision: str | None,
    files: Sequence[str],
    optional: Sequence[str] = (),
    room: DiskBudget | None = None,
    quiet: bool = False,
) -> tuple[Path, str]:
    """Download files of a model repository into the Hub's cache; return their folder and the commit.

    optional: files that are taken where they are there. What is in the cache is not fetched again. Raises UserError,
    one line for what the user can do (accept a license, give a token, mend the id or the network, free some disk), and
    CheckFailed for a file whose hash is not the Hub's.
    """
    with silent_client(), translate_errors(repository, revision):
        api = HfApi()
        try:
            resolved = with_retries(lambda: api.resolve_revision(repository, revision=revision))
        except (RevisionResolutionError, RepositoryNotFoundError, HfHubHTTPError) as error:
            if not isinstance(error, RevisionNotFoundError) and (local := cached(repository, revision, files)):
                return local
            raise
        commit = resolved.resolved
        if local := cached(repository, commit, [*files, *optional]):
            return local
        try:
            remote = _listed(api, repository, commit, [*files, *optional])
        except (httpx2.TransportError, OfflineModeIsEnabled):
            if local := cached(repository, commit, files):  # what is optional may be nowhere
                return local
            raise
        refuse([f"{repository}: has no {n}: is this the right repository?" for n in files if n not in remote])
        store = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))
        folder = store / "snapshots" / commit
        missing = [file for name, file in remote.items() if not (folder / name).is_file()]
        _check_room(store, missing, room)
        with byte_bar("downloading", sum(file.size for file in missing), quiet) as bar:
            for file in missing:
                bar.set_postfix_str(file.name, refresh=False)
                _fetch(repository, commit, file, store, bar)
        snapshot_download(repository, revision=resolved, allow_patterns=list(remote))  # names the blobs
        if not cached(repository, commit, files):
            raise UserError(f"{repository}: its files came, and the cache does not show them: run the command again")
        return folder, commit


def remote_sizes(repository: str, revision: str | None, files: Sequence[str]) -> dict[str, int] | None:
    """Return the bytes of files of a repository, without downloading any; None if the Hub cannot be reached.

    Raises UserError for a repository or a revision that does not exist, and for files that it does not have.
    """
    with silent_client(), translate_errors(repository, revision):
        api = HfApi()
        try:  # resolving a revision would write it into the cache
            info = with_retries(lambda: api.model_info(repository, revision=revision))
            remote = _listed(api, repository, str(info.sha), files)
        except (httpx2.TransportError, OfflineModeIsEnabled):
            return None
    refuse([f"{repository}: has no {n}: is this the right repository?" for n in files if n not in remote])
    return {name: file.size for name, file in remote.items()}


def hub_sha256(path: Path) -> str | None:
    """Return the sha256 that the Hub gave for a large file in its cache: the name of its blob. None for others."""
    name = path.readlink().name if path.is_symlink() else ""  # the first link only: blobs may be links themselves
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def _listed(api: HfApi, repository: str, commit: str, names: Sequence[str]) -> dict[str, Remote]:
    """Return those files of a commit that are asked for; other names in the listing are skipped."""
    found = {}
    for entry in with_retries(lambda: list(api.list_repo_tree(repository, revision=commit))):
        if isinstance(entry, RepoFile) and entry.path in names:
            file = Remote(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id or "")
            if not _HASH.fullmatch(file.hash):
                named = f"{file.name} {file.hash[:40]!r}"
                raise UserError(f"{repository}: the Hub names {named}, which is no hash: do not trust it")
            found[entry.path] = file
    return found


def _check_room(store: Path, missing: Sequence[Remote], room: DiskBudget | None) -> None:
    """Raise UserError if what is missing, and the bundle that is made of it, do not fit on their disks."""
    size = sum(file.size for file in missing)
    begun = [store / "blobs" / name for file in missing for name in (file.hash, file.part)]
    there = sum(path.stat().st_size for path in begun if path.is_file())
    needed = {str(store): max(0, size - there)}
    if room:
        same = _existing(store).stat().st_dev == _existing(room.folder).stat().st_dev
        place = str(store) if same else str(room.folder)
        needed[place] = needed.get(place, 0) + int(room.share * size)
    for place, amount in needed.items():
        free = shutil.disk_usage(_existing(Path(place))).free
        if free < amount:
            raise UserError(
                f"{place}: {free / 1e9:.2f} GB are free, and download and bundle need {amount / 1e9:.2f} GB there",
                Hint.FREE_DISK_OR_MOVE_CACHE,
            )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _fetch(repository: str, commit: str, file: Remote, store: Path, bar: Progress) -> None:
    """Make the cache's blob of one file, going on from the part of it that an earlier run left."""
    url = hf_hub_url(repository, file.name, revision=commit)
    blob = store / "blobs" / file.hash
    part = blob.with_name(file.part)
    lock = store.parent / ".locks" / store.name / f"{file.hash}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            _complete(url, part, file.size, bar)
            _check(part, file)
            part.rename(blob)
        else:
            bar.skip(file.size)


def _complete(url: str, part: Path, size: int, bar: Progress) -> None:
    """Append to a partial file what it lacks; resumes after a broken connection, and gives up after some in a row.

    Bytes are written as they come: the client's own download loses up to 10 MB at every break.
    """
    part.touch()
    if part.stat().st_size > size:
        part.unlink()
        part.touch()
    bar.skip(part.stat().st_size)
    tries = TRIES
    while (have := part.stat().st_size) < size:
        wait = 1.0
        try:
            _append(url, part, size, bar)
        except (httpx2.TransportError, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError):
                if not is_transient(error):
                    raise
                asked = asked_wait(error)
                wait = wait if asked is None else asked
            tries = TRIES if part.stat().st_size > have else tries - 1
            if not tries:
                raise
            time.sleep(wait)


def _append(url: str, part: Path, size: int, bar: Progress) -> None:
    """Fetch what a partial file lacks, once; an answer of another length is somebody else's, and not written."""
    have = part.stat().st_size
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with get_session().stream("GET", url, headers=headers, timeout=_PATIENCE) as response:
        hf_raise_for_status(response)
        whole = response.status_code == 200  # also where a part was asked for: then all of it comes again
        expected = str(size if whole else size - have)
        if response.status_code not in (200, 206) or response.headers.get("Content-Length", expected) != expected:
            raise httpx2.RemoteProtocolError(f"an answer of another length than the {expected} bytes of the file")
        with part.open("wb" if whole else "ab", buffering=0) as target:
            bar.skip(-have if whole else 0)
            for block in response.iter_bytes():
                target.write(block)
                if target.tell() > size:
                    raise httpx2.RemoteProtocolError(f"more than the {size} bytes that were announced")
                bar.update(len(block))
            if target.tell() < size:
                raise httpx2.RemoteProtocolError("it broke off")


def _check(part: Path, file: Remote) -> None:
    """Raise CheckFailed if a file is not what the Hub says, and remove it."""
    small = len(file.hash) == 40
    digest = git_blob(file.size) if small else hashlib.sha256()
    with part.open("rb") as data:
        os.fsync(data.fileno())
        while block := data.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != file.hash:
        part.unlink()
        kind = "git hash" if small else "sha256"
        raise CheckFailed(f"{file.name}: its {kind} is not the Hub's: damaged on its way, and removed: try again")
