"""Whether a bundle's files are those that its manifest names."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..convert.scan import hash_file
from ..convert.workspace import MANIFEST
from .contents import Contents

OURS = ("README.md", MANIFEST)  # not named in the manifest: it cannot hold its own hash, and the card comes later


def differences(contents: Contents, bar: "tqdm[Any]") -> list[str]:
    """Hash every file of a bundle and return what is not as its manifest says, one sentence each."""
    named = (contents.manifest or {}).get("files", {})
    found = [f"{name}: not named in {MANIFEST}" for name in contents.files if name not in named and not _ours(name)]
    for name, record in named.items():
        path: Path = contents.folder / name
        if name not in contents.files:
            found.append(f"{name}: missing")
        elif contents.files[name] != record["size"]:
            found.append(f"{name}: has {contents.files[name]} bytes, {record['size']} are in {MANIFEST}")
        elif hash_file(path, bar).sha256 != record["sha256"]:
            found.append(f"{name}: its sha256 is not the one in {MANIFEST}")
    return found


def _ours(name: str) -> bool:
    return name in OURS or name.startswith("parity/")
