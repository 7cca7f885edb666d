"""Publishing a bundle: only one that its own report proves, exactly its files, nothing that tells of its maker."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from jinja2 import UndefinedError
from tqdm import tqdm

from ...convert.bundle.describe import size
from ...convert.bundle.manifest import Manifest, manifest_of
from ...convert.bundle.workspace import write_durably
from ...convert.errors import CheckFailed, UserError, printable, refuse
from ...convert.file_names import MANIFEST
from ...convert.hints import Hint
from ...convert.progress import byte_bar
from ...convert.source.demo import SIZES
from ...convert.source.source import HUB_ID, is_hub_id
from .. import report as reports
from ..recorded_voices import without_consent
from ..records import Report
from . import card
from .upload import Local, PublishOptions, check_token, upload

__all__ = ["PublishOptions", "UploadPlan", "check_name", "check_names", "check_token", "publish", "ready"]

_TOKEN = re.compile(rb"(?:hf|api_org)_[A-Za-z0-9]{20,}")
_HOMES = re.compile(rb"/(?:home|Users)/[^/\s\"'<>]{1,64}/")
_TEXT = (".json", ".md", ".html", ".txt", ".toml")
_BLOCK, _OVERLAP = 4 << 20, 256
Private = tuple[bytes | None, bytes | None]  # what of this user must not be in a file: the token, the home directory


@dataclass(frozen=True)
class UploadPlan:
    """A bundle that may go up. objections: why it should not, where it goes all the same. base_models: in the card."""

    repository: str
    files: list[Local]
    card: dict[str, str]
    objections: list[str]
    message: str
    base_models: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Published:
    """What came of it: where it is, what was sent, what else is there, and all of it as a line."""

    page: str
    changed: list[str]
    others: list[str]
    line: str


def check_name(repository: str) -> None:
    """Raise UserError for what is no name of a repository."""
    if not HUB_ID.fullmatch(repository):
        raise UserError(f"{repository}: not the name of a repository: give USER/NAME")


def check_names(repository: str | None, base_model: str | None, source: str, adapter: str | None) -> None:
    """Raise UserError, before a conversion, for names that ``ready`` would refuse after it."""
    if repository is not None:
        check_name(repository)
    if base_model is not None:
        card.check_base_model(base_model)
        if source in SIZES or (adapter is None and is_hub_id(source)):
            raise UserError(f"{base_model}: not the base model: the bundle is made from {source}")


def ready(
    bundle: Path, repository: str, force: bool = False, quiet: bool = False, base_model: str | None = None
) -> UploadPlan:
    """Check everything that would be published; needs no network. base_model: see ``PublishOptions``.

    Raises CheckFailed if the report is missing, failing or of other files and not ``force``, and always if a file holds
    a token or somebody's home directory, or a voice has no consent; UserError for what is no bundle or lacks files.
    """
    check_name(repository)
    manifest = manifest_of(bundle)
    missing = [name for name in manifest.files if not (bundle / name).is_file()]
    if missing:
        raise UserError([f"{bundle / name}: missing: make the bundle again" for name in missing])
    _check_consent(bundle, manifest)
    report, objections = _report(bundle, manifest)
    names = [*manifest.files, MANIFEST]
    names += [f"{reports.FOLDER}/{reports.JSON}"] if report else []
    root = bundle.resolve()
    refuse(
        [
            f"{bundle / name}: leads out of the bundle"
            for name in names
            if not (bundle / name).resolve().is_relative_to(root)
        ]
    )
    private = _private()
    local, leaks = _look(bundle, names, private, quiet)
    objections += [
        f"{file.name} is not the file that {MANIFEST} names"
        for file in local
        if file.name in manifest.files and file.sha256 != manifest.files[file.name].sha256
    ]
    if objections and not force:
        raise CheckFailed(f"{bundle}: not published: {'; '.join(objections)}", Hint.PUBLISH_ANYWAY)
    try:
        written = reports.pages(report) if report else {}  # those in the folder may be of another report
        written |= card.files(manifest, report, repository, objections, base_model)
    except (UndefinedError, LookupError, TypeError) as error:
        raise UserError(f"{bundle}: manifest or report is of another version ({error}): make them again") from None
    for name, text in written.items():
        data = text.encode()
        leaks += [f"{name} {leak}" for leak in _leaks(data, name, private)]
        local.append(Local(name, bundle / name, len(data), hashlib.sha256(data).hexdigest()))
    if leaks:
        raise CheckFailed(
            f"{bundle}: not published: {'; '.join(leaks)}: make the bundle or its report again without it"
        )
    message = f"{manifest.recipe.name} for {manifest.target}, made from {manifest.source.id}"
    bases = card.base_models(manifest, base_model)
    return UploadPlan(repository, local, written, objections, message, bases)


def publish(
    bundle: str | Path, repository: str, options: PublishOptions | None = None, *, quiet: bool = True
) -> Published:
    """Write the card, upload a bundle's files, and compare what arrived; raises what ``ready`` and ``upload`` raise.

    Example::

        publish("my-bundle", "me/personaplex-4bit", PublishOptions(private=True)).page
    """
    bundle, wish = Path(bundle), options or PublishOptions()
    plan = ready(bundle, repository, wish.force, quiet, wish.base_model)
    for name, text in plan.card.items():
        if not (bundle / name).is_file() or (bundle / name).read_bytes() != text.encode():
            write_durably(bundle / name, text)
    done = upload(repository, plan.files, plan.message, wish, quiet)
    sent = sum(file.size for file in plan.files if file.name in done.changed)
    sent_files = f"{len(done.changed)} files sent ({size(sent)})" if done.changed else "nothing new"
    total = len(plan.files)
    line = f"{done.page}: {sent_files}; all {total} files are there with the sizes and sha256 that they have here"
    if done.others:
        line += f"; it also holds {', '.join(done.others[:5])}, which is not of this bundle"
    return Published(done.page, done.changed, done.others, printable(line))


def _check_consent(bundle: Path, manifest: Manifest) -> None:
    """Raise CheckFailed for voices without the consent of the person in them; no option publishes those."""
    names = without_consent(manifest)
    if names:
        raise CheckFailed(
            f"{bundle}: not published: no consent is recorded for the voice of {', '.join(names)}", Hint.ADD_VOICE
        )


def _report(bundle: Path, manifest: Manifest) -> tuple[Report | None, list[str]]:
    """Return a bundle's report, and its objections to publishing."""
    path = bundle / reports.FOLDER / reports.JSON
    if not path.is_file():
        return None, ["it has no report: run ppx-verify first"]
    try:
        report = reports.read(bundle)
    except UserError as error:
        wrong = "; ".join(problem.message for problem in error.problems)
        return None, [f"its report cannot be read: run ppx-verify again ({wrong})"]
    objections = []
    failures = report.verdict.failures
    if not report.verdict.passed:
        objections.append(f"its report fails: {failures[0].message if failures else 'no reason given'}")
    elif failures or any(figure.is_beyond for figure in reports.figures(report)) or not report.predictions:
        objections.append("its report says that it passes, and contradicts itself")
    if not report.is_about(manifest):
        objections.append("its report is older, or about other files: run ppx-verify again")
    return report, objections


def _look(bundle: Path, names: Iterable[str], private: Private, quiet: bool) -> tuple[list[Local], list[str]]:
    """Hash files and search them, in one pass; return them, and what must not go up."""
    local, leaks = [], []
    paths = [(name, bundle / name) for name in names if (bundle / name).is_file()]
    total = sum(path.stat().st_size for _, path in paths)
    with byte_bar("checking", total, quiet) as bar:
        for name, path in paths:
            digest, seen = hashlib.sha256(), set()
            for block, window in _blocks(path, bar):
                digest.update(block)
                seen.update(_leaks(window, name, private))
            local.append(Local(name, path, path.stat().st_size, digest.hexdigest()))
            leaks += [f"{name} {leak}" for leak in sorted(seen)]
    return local, leaks


def _blocks(path: Path, bar: "tqdm[Any]") -> Iterable[tuple[bytes, bytes]]:
    """Yield a file's blocks, each also with the end of the one before it."""
    before = b""
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            yield block, before + block
            before = block[-_OVERLAP:]
            bar.update(len(block))


def _private() -> Private:
    """Return this user's token and home directory, each None if it is too short to be told from chance."""
    token, home = (get_token() or "").encode(), f"{Path.home()}/".encode()
    return (token if len(token) > 8 else None, home if len(home) > 5 else None)


def _leaks(data: bytes, name: str, private: Private) -> list[str]:
    """Return what of a piece of a file must not be published; in weights only what cannot be there by chance."""
    leaks = []
    token, home = private
    if _TOKEN.search(data) or (token and token in data):
        leaks.append("holds a token")
    is_text = name.endswith(_TEXT) or "." not in name
    if (home and home in data) or (is_text and _HOMES.search(data)):
        leaks.append("holds the path of a home directory")
    return leaks
