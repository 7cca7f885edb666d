"""Where a bundle is: a folder, or a repository on the Hub, as every program that reads bundles takes them."""

from pathlib import Path

from ..errors import Problem, UserError, refuse
from ..file_names import CARD, MANIFEST, NOTICE, is_plain
from ..source import hub
from ..source.source import is_hub_id
from .manifest import LARGEST, TOOLKIT, Manifest, manifest_of

_REPORT = ("parity/report.json", "parity/report.md", "parity/report.html")
_ADDED = 256 << 20  # bytes of card, notice and report, with the recordings in it


def locate_bundle(where: str | Path, revision: str | None = None, quiet: bool = True) -> Path:
    """Return the folder of a bundle: ``where`` itself, or what is downloaded of a Hub id such as ``me/personaplex``.

    A folder of that name comes before the Hub. revision: branch, tag or commit of a Hub id. Downloads resume, are
    compared with the Hub's hashes, and lie in its cache, where nothing may be written. Raises UserError for a
    repository without a manifest, one that names other files than it has, and for what goes wrong on the way.
    """
    name = str(where)
    if not is_hub_id(name):
        if revision is not None:
            raise UserError(f"{name}: is not on the Hub, and only what is there has a revision: leave {revision!r} out")
        return Path(where)
    absent = f"not a bundle of {TOOLKIT}; a source can be inspected after `hf download {name}`"
    folder, commit = hub.download(name, revision, (MANIFEST,), quiet=True, most=LARGEST, absent=absent)
    manifest = manifest_of(folder)
    refuse([f"{name}: {MANIFEST} names a file {file[:60]!a}: do not trust it" for file in _odd(manifest)])
    most = manifest.nbytes + LARGEST + _ADDED
    folder, _ = hub.download(
        name, commit, [MANIFEST, *manifest.files], (CARD, NOTICE, *_REPORT), quiet=quiet, most=most
    )
    refuse(_wrong_sizes(name, folder, manifest))
    return folder


def _odd(manifest: Manifest) -> list[str]:
    """Return names that a download must not ask for."""
    return [file for file in manifest.files if not is_plain(file)]


def _wrong_sizes(name: str, folder: Path, manifest: Manifest) -> list[Problem]:
    sizes = {file: (folder / file).stat().st_size for file in manifest.files}
    return [
        Problem(f"{name}: {file}", f"has {sizes[file]} bytes, {record.size} are in {MANIFEST}", "do not trust it")
        for file, record in manifest.files.items()
        if sizes[file] != record.size
    ]


def published_as(folder: Path) -> tuple[str, str] | None:
    """Return Hub id and commit of a folder in the Hub's cache, where nothing may be written; None for another one."""
    folder = folder.resolve()
    store = folder.parent.parent
    kind, *parts = store.name.split("--")
    if kind != "models" or len(parts) != 2 or folder.parent.name != "snapshots" or not (store / "blobs").is_dir():
        return None
    return "/".join(parts), folder.name
