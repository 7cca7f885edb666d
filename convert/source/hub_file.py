"""One file of the Hub, which becomes a blob of its client's cache when its hash is the Hub's.

The client drops what a killed process had of a file. Here parts stay beside the cache's blobs, and later runs resume.
"""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status

from ..errors import CheckFailed
from ..progress import Progress
from .hub_client import TRIES, asked_wait, git_blob, is_transient

_PATIENCE = 60.0  # seconds without a byte


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


def fetch(repository: str, commit: str, file: Remote, store: Path, bar: Progress) -> None:
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
