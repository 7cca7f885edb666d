"""Installing a bundle where the program that loads it looks, and removing it from there."""

from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import Problem, UserError, refuse
from ..file_names import MANIFEST, NOTICE, is_plain
from ..hints import Hint
from ..progress import byte_bar
from ..source.scan import hash_file
from ..source.source import HUB_ID, is_hub_id
from .consumers import SWIFT, Usage, commands, older_swift_folder, swift_folder
from .location import locate_bundle
from .manifest import Manifest, read_manifest
from .placement import discard, leftovers, locked, place
from .reader import open_bundle
from .receipt import RECEIPT, Receipt, contents_of, is_as_placed, read_receipt, receipt, remove_files

_USER = "local"  # of a bundle that has no name on the Hub


@dataclass(frozen=True)
class Installation:
    """An installation, done or planned.

    folder: where the files go, None for a target whose programs take a bundle's own files. files: bytes by name.
    replaces: what was installed there before, if anything. unchanged: it is there already. usage: how to run it.
    """

    bundle: Path
    target: str
    identity: str
    folder: Path | None
    copied: bool
    files: dict[str, int]
    replaces: str | None
    unchanged: bool
    usage: list[Usage]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Removal:
    """What was removed of an installation. left: files in its folder that were not put there, or have changed since."""

    identity: str
    folder: Path
    description: str
    removed: list[str]
    left: list[str]


def install(
    bundle: str | Path,
    identity: str | None = None,
    *,
    revision: str | None = None,
    copy: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
) -> Installation:
    """Put a bundle where its program looks for it; return what was done, and how to run it.

    Example::

        install("my-bundle", "me/personaplex-4bit").usage

    bundle: a folder or Hub id, as ``locate_bundle`` takes it. identity: ``USER/NAME`` that the program calls it, its
    Hub id or ``local/FOLDER`` for None. copy: whether to copy the files, not to link them. dry_run: to change nothing.
    Raises UserError for what is not a bundle, and where files lie that no installation put there.
    """
    name = identity_of(bundle, identity)
    source = locate_bundle(bundle, revision, quiet)
    with closing(open_bundle(source)) as opened:
        manifest = opened.manifest
        opened.voices()  # absent or damaged ones would be skipped in silence
    usage = commands(source, manifest, name)
    if manifest.target != SWIFT:
        return Installation(source, manifest.target, name, None, False, {}, None, False, usage)
    folder, files = swift_folder(name), _files(source, manifest)
    with byte_bar("checking", sum(size for size, _ in files.values()), quiet) as bar:
        before = _receipt_at(folder, bar)
    _check_older(name)
    after = receipt(name, manifest.fingerprint, manifest.source.id, manifest.recipe.name, copy)
    there = {path: record.sha256 for path, record in before.files.items()} if before else {}
    wanted = {path: sha256 for path, (_, sha256) in files.items()}
    same = before is not None and replace(before, files={}) == after and there.items() >= wanted.items()
    if not same and not dry_run:
        with locked():
            place(source, folder, files, after, before, quiet)
    sizes = {path: size for path, (size, _) in files.items()}
    replaces = before.description if before and not same else None
    return Installation(source, manifest.target, name, folder, copy, sizes, replaces, same, usage)


def uninstall(bundle: str | Path, identity: str | None = None, *, dry_run: bool = False, quiet: bool = True) -> Removal:
    """Remove what ``install`` put there for a bundle, which itself may be gone; return what was removed and what stays.

    Raises UserError if nothing is installed under that name, or another bundle.
    """
    name = identity_of(bundle, identity)
    folder = swift_folder(name)
    before = None if folder.is_symlink() or not folder.is_dir() else read_receipt(folder)
    if before is None and (unfinished := leftovers(folder)):
        if not dry_run:
            with locked():
                discard(folder)
                _remove_empty(folder.parent)
        return Removal(name, folder, "unfinished", [path.name for path in unfinished], [])
    if before is None:
        raise UserError(f"{folder}: nothing is installed there", Hint.INSTALLED_AS)
    given = None
    with suppress(UserError):  # a damaged bundle is no reason to keep its files there
        given = read_manifest(Path(bundle))
    if given and given.fingerprint != before.fingerprint:
        raise UserError(f"{folder}: another bundle is installed as {name} ({before.description})", Hint.REMOVE_BY_NAME)
    with byte_bar("checking", sum(record.size for record in before.files.values()), quiet) as bar:
        ours = [path for path, record in before.files.items() if is_as_placed(folder, path, record, bar)]
    left = sorted({*contents_of(folder)} - {*ours, RECEIPT})
    if not dry_run:
        with locked():
            discard(folder)
            remove_files(folder, [*ours, RECEIPT])
            _remove_empty(folder.parent)
    return Removal(name, folder, before.description, sorted(ours), left)


def _remove_empty(user: Path) -> None:
    """Remove the folder of a user's models if none is left in it."""
    if user.is_dir() and not user.is_symlink() and not any(user.iterdir()):
        user.rmdir()


def identity_of(bundle: str | Path, identity: str | None = None) -> str:
    """Return the ``USER/NAME`` of a bundle in the programs that load it; raises UserError for what cannot be one."""
    given = identity or (str(bundle) if is_hub_id(str(bundle)) else f"{_USER}/{Path(bundle).resolve().name}")
    if HUB_ID.fullmatch(given) and all(is_plain(part) for part in given.split("/")):
        return given
    raise UserError(f"{given[:200]!r}: not a name such as me/personaplex-4bit", Hint.INSTALL_AS)


def _files(bundle: Path, manifest: Manifest) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of the files to place; raises UserError for those that are not as the manifest says."""
    problems, files = [], {}
    for name, record in manifest.files.items():
        found = (bundle / name).stat().st_size if (bundle / name).is_file() else None
        if not is_plain(name):
            problems.append(Problem(f"{bundle / MANIFEST}", f"names a file {name[:60]!a}", "do not trust it"))
        elif found != record.size:
            what = "missing" if found is None else f"has {found} bytes, {record.size} are in {MANIFEST}"
            problems.append(Problem(str(bundle / name), what, Hint.CONVERT_AGAIN))
        files[name] = (record.size, record.sha256)
    refuse(problems)
    with tqdm(disable=True) as silent:
        for name in (MANIFEST, NOTICE):
            if (bundle / name).is_file():
                found_here = hash_file(bundle / name, silent)
                files[name] = (found_here.size, found_here.sha256)
    return files


def _receipt_at(folder: Path, bar: "tqdm[Any]") -> Receipt | None:
    """Return the receipt of what is installed in a folder, None for nothing there.

    Raises UserError where anything lies there that an installation did not put there, or that changed since.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is not a folder that was installed", Hint.INSTALL_ELSEWHERE)
    before = read_receipt(folder) if folder.is_dir() else None
    records = before.files if before else {}
    ours = {RECEIPT} if before else set()
    ours |= {name for name, record in records.items() if is_as_placed(folder, name, record, bar)}
    if others := [name for name in contents_of(folder) if name not in ours]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        listed = ", ".join(others[:3]) + more
        raise UserError(f"{folder}: holds files that were not installed ({listed})", Hint.INSTALL_ELSEWHERE)
    return before


def _check_older(identity: str) -> None:
    """Raise UserError if speech-swift would read a folder of its earlier releases instead."""
    older = older_swift_folder(identity)
    if older.is_dir() and any(path.suffix == ".safetensors" for path in older.iterdir()):
        raise UserError(f"{older}: speech-swift reads this folder before the new one", Hint.INSTALL_ELSEWHERE)
