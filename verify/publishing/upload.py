"""Files of a bundle into a repository on the Hugging Face Hub, in one commit, and a look at what arrived."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from ...convert.errors import CheckFailed, UserError
from ...convert.file_names import CARD, MANIFEST
from ...convert.hints import Hint
from ...convert.progress import watched
from ...convert.source.hub_client import HOW_TO_LOG_IN, git_blob, silent_client, translate_errors, with_retries

_ALONE = 1 << 20  # bytes from which a file is sent for itself, so that a break costs no other


@dataclass(frozen=True)
class Local:
    """A file to upload, under its name in the repository."""

    name: str
    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Uploaded:
    """What an upload did. changed: names that were sent. others: what the repository holds beside the bundle."""

    page: str
    changed: list[str]
    others: list[str]


@dataclass(frozen=True)
class PublishOptions:
    """How to publish. create_pr: as a pull request. revision: a branch, None for main. force: despite objections.

    base_model: the repository of a source or adapter that was read from this machine, for the card.
    Raises UserError for a pull request to a branch.
    """

    private: bool = False
    create_pr: bool = False
    revision: str | None = None
    force: bool = False
    base_model: str | None = None

    def __post_init__(self) -> None:
        if self.create_pr and self.revision:
            raise UserError(
                "a pull request and a revision contradict each other: a pull request is for main",
                Hint.PULL_REQUEST_OR_REVISION,
            )


def check_token(repository: str) -> None:
    """Raise UserError if there is no token to publish with."""
    if get_token() is None:
        raise UserError(f"{repository}: publishing needs a token with write access: {HOW_TO_LOG_IN}")


def upload(
    repository: str, files: Sequence[Local], message: str, wish: PublishOptions, quiet: bool = False
) -> Uploaded:
    """Make a repository hold these files, and compare every one of them with what is there then.

    Large files go first, one after the other; the Hub does not take again what it has. A single commit then names all
    that changed, and none is made where nothing did. Raises UserError for what the user can mend, CheckFailed if the
    repository holds something else afterwards.
    """
    check_token(repository)
    with silent_client(bars=not quiet and watched()), translate_errors(repository, wish.revision, "the upload"):
        api = HfApi()
        _open_repository(api, repository, wish)
        there = _tree(api, repository, wish.revision)
        _check_own(repository, there, wish)
        changed = [file for file in files if not _is_same(there.get(file.name), file)]
        page = f"{constants.ENDPOINT}/{repository}"
        commit, place = wish.revision, f"{page}/tree/{wish.revision}" if wish.revision else page
        if changed and wish.create_pr and (number := _own_request(api, repository, message, files)):
            changed, commit, place = [], f"refs/pr/{number}", f"{page}/discussions/{number}"
        if changed:
            done = _commit(api, repository, changed, message, wish)
            commit, place = done.oid, done.pr_url or place
        there = _tree(api, repository, commit)
        _compare(repository, commit, files, there)
    names = {file.name for file in files}
    return Uploaded(place, [file.name for file in changed], sorted(there.keys() - names - {".gitattributes"}))


def _commit(api: HfApi, repository: str, changed: Sequence[Local], message: str, wish: PublishOptions) -> CommitInfo:
    """Send files, and name them all in one commit; the card is shown to the Hub before the first byte."""
    for file in changed:
        if file.name == CARD:
            try:
                with_retries(ModelCard(file.path.read_text("utf-8")).validate)
            except ValueError as error:
                raise UserError(f"{repository}: the Hub does not take {file.name}: {error}") from None
    operations = [_operation(file) for file in changed]
    where: dict[str, Any] = {"revision": wish.revision, "create_pr": wish.create_pr}
    for operation in operations:
        if operation.upload_info.size >= _ALONE:
            with_retries(partial(api.preupload_lfs_files, repository, additions=[operation], **where))
    commit = partial(api.create_commit, repository, operations, commit_message=message, **where)
    done: CommitInfo = commit() if wish.create_pr else with_retries(commit)  # a second try might open a second request
    return done


def _open_repository(api: HfApi, repository: str, wish: PublishOptions) -> None:
    """Make sure that repository and branch are there; raises UserError if all could see what should be private."""
    try:
        info = with_retries(lambda: api.model_info(repository))
    except RepositoryNotFoundError:
        if wish.create_pr:
            raise
        with_retries(lambda: api.create_repo(repository, private=wish.private or None, exist_ok=True))
    else:
        if wish.private and info.private is False:
            raise UserError(f"{repository}: is there already, and public: make it private in its settings first")
    if wish.revision:
        with_retries(lambda: api.create_branch(repository, branch=str(wish.revision), exist_ok=True))


def _check_own(repository: str, there: dict[str, RepoFile], wish: PublishOptions) -> None:
    """Raise UserError if a repository holds something else than a bundle, which publishing would write over."""
    others = there.keys() - {".gitattributes", CARD}
    if others and MANIFEST not in there and not (wish.create_pr or wish.force):
        raise UserError(f"{repository}: holds {', '.join(sorted(others)[:3])}, and is no bundle", Hint.OTHER_REPOSITORY)


def _tree(api: HfApi, repository: str, revision: str | None) -> dict[str, RepoFile]:
    found = with_retries(lambda: list(api.list_repo_tree(repository, recursive=True, revision=revision)))
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def _is_same(there: RepoFile | None, file: Local) -> bool:
    """Tell whether the repository's file is this one: by sha256 if it is a large one, else by git's hash."""
    if there is None or there.size != file.size:
        return False
    if there.lfs:
        return there.lfs.sha256 == file.sha256
    digest = git_blob(file.size)
    digest.update(file.path.read_bytes())
    return there.blob_id == digest.hexdigest()


def _operation(file: Local) -> CommitOperationAdd:
    """Return what sends a file; raises CheckFailed if it is no longer the one that was looked at."""
    operation = CommitOperationAdd(file.name, file.path)
    if operation.upload_info.sha256.hex() != file.sha256:
        raise CheckFailed(f"{file.path}: changed while it was published: run the command again")
    return operation


def _own_request(api: HfApi, repository: str, message: str, files: Sequence[Local]) -> int | None:
    """Return the number of an open pull request of this title that holds these very files."""
    try:
        open_ones = api.get_repo_discussions(repository, discussion_type="pull_request", discussion_status="open")
        for request in open_ones:
            if request.title == message:
                there = _tree(api, repository, f"refs/pr/{request.num}")
                if all(_is_same(there.get(file.name), file) for file in files):
                    return request.num
    except HfHubHTTPError:  # requests cannot be listed: then another one is made
        pass
    return None


def _compare(repository: str, revision: str | None, files: Sequence[Local], there: dict[str, RepoFile]) -> None:
    """Raise CheckFailed for files that are not in the repository as they are here; small ones are fetched for that."""
    wrong = []
    for file in files:
        entry = there.get(file.name)
        if entry is None:
            wrong.append(f"{file.name} is not there")
        elif entry.size != file.size:
            wrong.append(f"{file.name} has {entry.size} bytes there, {file.size} here")
        elif (entry.lfs.sha256 if entry.lfs else _fetched_sha256(repository, file.name, revision)) != file.sha256:
            wrong.append(f"{file.name} has another sha256 there")
    if wrong:
        raise CheckFailed(f"{repository}: does not hold what was sent: {'; '.join(wrong)}: run the command again")


def _fetched_sha256(repository: str, name: str, revision: str | None) -> str:
    response = http_backoff("GET", hf_hub_url(repository, name, revision=revision), headers=build_hf_headers())
    hf_raise_for_status(response)
    return hashlib.sha256(response.content).hexdigest()
