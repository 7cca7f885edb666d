"""Whether a bundle's files are those that its manifest names."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from ..file_names import MANIFEST
from ..progress import byte_bar
from ..source.scan import hash_file
from .manifest import Manifest, files_of, read_manifest, untracked_files


def differences(folder: Path, manifest: Manifest, bar: "tqdm[Any]") -> list[str]:
    """Hash every file of a bundle and return what is not as its manifest says, one sentence each."""
    sizes = files_of(folder)
    found = [f"{name}: not named in {MANIFEST}" for name in untracked_files(folder, manifest)]
    for name, record in manifest.files.items():
        if name not in sizes:
            found.append(f"{name}: missing")
        elif sizes[name] != record.size:
            found.append(f"{name}: has {sizes[name]} bytes, {record.size} are in {MANIFEST}")
        elif hash_file(folder / name, bar).sha256 != record.sha256:
            found.append(f"{name}: its sha256 is not the one in {MANIFEST}")
    return found


def check(folder: Path, quiet: bool = True) -> list[str]:
    """Hash every file of a bundle; return what is not as its manifest says.

    Raises UserError for a folder without a manifest.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: has no manifest to check against: it is not a bundle")
    with byte_bar("checking", manifest.nbytes, quiet) as bar:
        return differences(folder, manifest, bar)
