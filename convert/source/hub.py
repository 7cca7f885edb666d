"""Files from the Hugging Face Hub, through its own client: its cache, its tokens, its environment variables."""

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download
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

from ..errors import UserError, refuse
from ..hints import Hint
from ..progress import byte_bar
from .hub_client import silent_client, translate_errors, with_retries
from .hub_file import Remote, fetch

_LARGEST_NAMING = 16 << 20  # bytes of a config.json or an index
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # names a file in the cache


@dataclass(frozen=True)
class DiskBudget:
    """Where the bundle will stand, and its bytes for each byte that is downloaded: both must fit on the disk."""

    folder: Path
    share: float


@dataclass(frozen=True)
class Choice:
    """Files that others name.

    naming: the small files that do, taken where the repository has them. choose: takes the folder that holds these, and
    a function that tells whether the repository has a file of a name; it returns the files that are needed.
    """

    naming: tuple[str, ...]
    choose: Callable[[Path, Callable[[str], bool]], Sequence[str]]

    def of(self, folder: Path) -> Sequence[str]:
        """Return the files that are needed, as far as a folder tells."""
        return self.choose(folder, lambda name: (folder / name).is_file())


def cached(
    repository: str, revision: str | None, files: Sequence[str], choice: Choice | None = None
) -> tuple[Path, str] | None:
    """Return folder and commit of files that the Hub's cache holds already, None if one is not there.

    choice: which other files must be there. A revision other than a commit is looked up in the cache, not on the Hub:
    ask ``download`` for the newest.
    """
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(files), local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    needed = [*files, *(choice.of(folder) if choice and folder.is_dir() else ())]
    return (folder, folder.name) if needed and all((folder / name).is_file() for name in needed) else None


def download(
    repository: str,
    revision: str | None,
    files: Sequence[str],
    optional: Sequence[str] = (),
    room: DiskBudget | None = None,
    quiet: bool = False,
    choice: Choice | None = None,
    most: int | None = None,
    absent: str = "is this the right repository?",
) -> tuple[Path, str]:
    """Download files of a model repository into the Hub's cache; return their folder and the commit.

    optional: files that are taken where they are there. choice: files that are named by others, which are fetched
    first. most: bytes that all of them may have together, None for any number. absent: what to say of a file that is
    not there. What is in the cache is not fetched again. Raises UserError, one line for what the user can do (accept a
    license, give a token, mend the id or the network, free some disk), and CheckFailed for a file whose hash is not the
    Hub's.
    """
    with silent_client(), translate_errors(repository, revision):
        api = HfApi()
        try:
            resolved = with_retries(lambda: api.resolve_revision(repository, revision=revision))
        except (RevisionResolutionError, RepositoryNotFoundError, HfHubHTTPError) as error:
            if not isinstance(error, RevisionNotFoundError) and (local := cached(repository, revision, files, choice)):
                return local
            raise
        commit = resolved.resolved
        if local := cached(repository, commit, [*files, *optional], choice):
            return local
        try:
            listing = _listed(api, repository, commit, any("/" in name for name in (*files, *optional)))
        except (httpx2.TransportError, OfflineModeIsEnabled):
            if local := cached(repository, commit, files, choice):  # what is optional may be nowhere
                return local
            raise
        store = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))
        folder = store / "snapshots" / commit

        def bring(names: Iterable[str], room: DiskBudget | None, quiet: bool) -> None:
            remote = [_remote(repository, listing[name]) for name in dict.fromkeys(names) if name in listing]
            missing = [file for file in remote if not (folder / file.name).is_file()]
            _check_room(store, missing, room)
            with byte_bar("downloading", sum(file.size for file in missing), quiet) as bar:
                for file in missing:
                    bar.set_postfix_str(file.name, refresh=False)
                    fetch(repository, commit, file, store, bar)
            if remote:  # the client names the blobs
                snapshot_download(repository, revision=resolved, allow_patterns=[file.name for file in remote])

        if choice:
            large = [n for n in choice.naming if n in listing and listing[n].size > _LARGEST_NAMING]
            refuse([f"{repository}: its {name} has {listing[name].size} bytes: do not trust it" for name in large])
            bring(choice.naming, None, True)
            files = [*files, *choice.choose(folder, listing.__contains__)]
        refuse([f"{repository}: has no {n}: {absent}" for n in files if n not in listing])
        total = sum(listing[name].size for name in {*files, *optional} if name in listing)
        if most is not None and total > most:
            raise UserError(f"{repository}: its files have {total} bytes, at most {most} are expected: do not trust it")
        bring([*files, *optional], room, quiet)
        if not cached(repository, commit, files):
            raise UserError(f"{repository}: its files came, and the cache does not show them: run the command again")
        return folder, commit


def remote_sizes(repository: str, revision: str | None) -> dict[str, int] | None:
    """Return the bytes of the files in a repository's first folder, without downloading any; None if it is not reached.

    Raises UserError for a repository or a revision that does not exist.
    """
    with silent_client(), translate_errors(repository, revision):
        api = HfApi()
        try:  # resolving a revision would write it into the cache
            info = with_retries(lambda: api.model_info(repository, revision=revision))
            listing = _listed(api, repository, str(info.sha))
        except (httpx2.TransportError, OfflineModeIsEnabled):
            return None
    return {name: entry.size for name, entry in listing.items()}


def hub_sha256(path: Path) -> str | None:
    """Return the sha256 that the Hub gave for a large file in its cache: the name of its blob. None for others."""
    name = path.readlink().name if path.is_symlink() else ""  # the first link only: blobs may be links themselves
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def _listed(api: HfApi, repository: str, commit: str, below: bool = False) -> dict[str, RepoFile]:
    """Return the files of a commit by name: those in its first folder, or with ``below`` all of them."""
    entries = with_retries(lambda: list(api.list_repo_tree(repository, recursive=below, revision=commit)))
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _remote(repository: str, entry: RepoFile) -> Remote:
    """Return a file that is asked for; raises UserError if its hash is not one: it would name a file here."""
    file = Remote(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id or "")
    if not _HASH.fullmatch(file.hash):
        named = f"{file.name} {file.hash[:40]!r}"
        raise UserError(f"{repository}: the Hub names {named}, which is no hash: do not trust it")
    return file


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
    what = "download and bundle need" if room else "the download needs"
    for place, amount in needed.items():
        free = shutil.disk_usage(_existing(Path(place))).free
        if free < amount:
            raise UserError(
                f"{place}: {free / 1e9:.2f} GB are free, and {what} {amount / 1e9:.2f} GB there",
                Hint.FREE_DISK_OR_MOVE_CACHE,
            )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
