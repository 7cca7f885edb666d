"""``manifest.json``: where a bundle comes from, how it was made, and the sha256 of everything in it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .architecture import Architecture
from .plan import Plan
from .problems import UserError
from .recipe import to_toml
from .scan import Fingerprint
from .source import Location
from .workspace import MANIFEST

VERSION = 1
TOOLKIT = "ppx-convert"
_LIBRARIES = ("ml_dtypes", "mlx", "numba", "numpy", "safetensors", "torch")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fingerprint(plan: Plan, prints: Mapping[str, Fingerprint]) -> str:
    """Return what stands for everything that decides a bundle's bytes: toolkit, source, recipe and plan."""
    decisive = {
        "toolkit": version(TOOLKIT),
        "source": {name: found.sha256 for name, found in prints.items()},
        "recipe": to_toml(plan.recipe),
        "identity": plan.inventory.identity,
        "filled": plan.inventory.filled,
        "files": [(file.name, file.nbytes, file.text) for file in plan.files],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def make_manifest(
    plan: Plan, location: Location, prints: Mapping[str, Fingerprint], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the manifest of a bundle; the same conversion gives the same manifest, so it holds no time.

    records: for each file its ``size``, ``sha256`` and ``tensors`` (the entries that ``stream`` returns).
    """
    tensors = [{"file": file.name, **entry} for file in plan.files for entry in records[file.name].get("tensors", ())]
    return {
        "manifest_version": VERSION,
        "fingerprint": fingerprint(plan, prints),
        "toolkit": {"name": TOOLKIT, "version": version(TOOLKIT)},
        "libraries": {name: version(name) for name in _LIBRARIES},
        "source": {
            "id": plan.inventory.identity,
            "revision": location.revision,
            "files": {name: asdict(found) for name, found in prints.items()},
            "filled": dict(plan.inventory.filled),
        },
        "target": plan.target.name,
        "dtype": plan.recipe.dtype,
        "recipe": {"name": plan.recipe.name, "text": to_toml(plan.recipe)},
        "architecture": asdict(plan.inventory.architecture),
        "parameters": plan.parameters,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "voices": sorted(plan.inventory.voices),
        "dropped": plan.dropped,
        "overflowed": sum(entry.get("overflowed", 0) for entry in tensors),
        "flushed": sum(entry.get("flushed", 0) for entry in tensors),
        "files": {file.name: {key: records[file.name][key] for key in ("size", "sha256")} for file in plan.files},
        "tensors": tensors,
    }


def architecture_of(manifest: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a manifest records."""
    sizes = dict(manifest["architecture"])
    return Architecture(**sizes | {"delays": tuple(sizes["delays"])})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a bundle's manifest, None for a folder that has none.

    Raises UserError for a manifest that is not one of ours, or that names files outside of the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        files = manifest["files"]
        if manifest["manifest_version"] != VERSION:
            raise UserError(f"{path}: version {manifest['manifest_version']!r}: this toolkit reads version {VERSION}")
        whole = isinstance(files, dict) and all(
            isinstance(record["size"], int) and _SHA256.fullmatch(record["sha256"]) for record in files.values()
        )
        whole = whole and isinstance(manifest["fingerprint"], str) and isinstance(manifest["target"], str)
        whole = whole and all(isinstance(entry["file"], str) for entry in manifest["tensors"])
        whole = whole and isinstance(manifest["voices"], list) and isinstance(manifest["recipe"]["name"], str)
        architecture_of(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of {TOOLKIT} ({error!r})") from None
    if not whole:
        raise UserError(f"{path}: not a manifest of {TOOLKIT}: fields are missing or of the wrong type")
    outside = [name for name in files if not (folder / name).resolve().is_relative_to(folder.resolve())]
    if outside:
        raise UserError(f"{path}: names files outside of its folder: {', '.join(outside)}: do not trust this bundle")
    return dict(manifest)
