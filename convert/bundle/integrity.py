"""Whether a bundle's files are those that its manifest names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import Problem, UserError
from ..file_names import MANIFEST
from ..progress import byte_bar
from ..source.scan import hash_file
from .manifest import Manifest, files_of, read_manifest, untracked_files


@dataclass(frozen=True)
class Differences:
    """How a bundle's files differ from its manifest. changed: files of the same size whose sha256 is another."""

    problems: list[Problem]
    changed: frozenset[str]


def differences(folder: Path, manifest: Manifest, bar: "tqdm[Any]") -> Differences:
    """Hash every file of a bundle and compare it with the manifest."""
    sizes = files_of(folder)
    problems = [Problem(name, f"not named in {MANIFEST}") for name in untracked_files(folder, manifest)]
    changed = set()
    for name, record in manifest.files.items():
        if name not in sizes:
            problems.append(Problem(name, "missing"))
        elif sizes[name] != record.size:
            problems.append(Problem(name, f"has {sizes[name]} bytes, {record.size} are in {MANIFEST}"))
        elif hash_file(folder / name, bar).sha256 != record.sha256:
            problems.append(Problem(name, f"its sha256 is not the one in {MANIFEST}"))
            changed.add(name)
    return Differences(problems, frozenset(changed))


def check(folder: Path, quiet: bool = True) -> list[Problem]:
    """Hash every file of a bundle; return how it differs from its manifest.

    Raises UserError for a folder without a manifest.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: has no manifest to check against: it is not a bundle")
    with byte_bar("checking", manifest.nbytes, quiet) as bar:
        return differences(folder, manifest, bar).problems
