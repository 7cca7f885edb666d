"""``manifest.json``: where a bundle comes from, how it was made, and the sha256 of everything in it."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import UserError, reason
from ..file_names import MANIFEST
from ..regular_files import read_json
from ..source.architecture import Architecture, from_config, to_config
from ..source.scan import Fingerprint
from ..source.source import Source
from .manifest_schema import problem_of
from .plan import Plan
from .recipe import to_toml

VERSION = 1
TOOLKIT = "ppx-convert"
_LIBRARIES = ("ml_dtypes", "mlx", "numba", "numpy", "safetensors", "torch")
_NOT_OURS = f"not a manifest of {TOOLKIT}: move the folder away, and make the bundle again"
_LARGEST = 64 << 20  # bytes; that of the 7B model has 300 thousand


def fingerprint(
    plan: Plan, source: Source, fingerprints: Mapping[str, Fingerprint], solved: Mapping[str, Any] | None = None
) -> str:
    """Return what stands for everything that decides a bundle: toolkit, libraries, source, recipe and plan.

    solved: what a solver went by.
    """
    location = source.location
    decisive = {
        "toolkit": version(TOOLKIT),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "revision": location.revision,
        "licence": location.license and asdict(location.license),
        "source": {name: found.sha256 for name, found in fingerprints.items()},
        "adapter": source.adapter,
        "calibration": solved,
        "recipe": to_toml(plan.recipe),
        "identity": plan.inventory.identity,
        "filled": plan.inventory.copied_steps,
        "files": [(file.name, file.nbytes, file.text) for file in plan.files],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def make_manifest(
    plan: Plan,
    source: Source,
    fingerprints: Mapping[str, Fingerprint],
    records: Mapping[str, Mapping[str, Any]],
    solved: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the manifest of a bundle; the same conversion gives the same manifest, so it holds no time.

    records: for each file its ``size``, ``sha256`` and ``tensors`` (the entries that ``stream`` returns).
    """
    location = source.location
    tensors = [{"file": file.name, **entry} for file in plan.files for entry in records[file.name].get("tensors", ())]
    return {
        "manifest_version": VERSION,
        "fingerprint": fingerprint(plan, source, fingerprints, solved),
        "toolkit": {"name": TOOLKIT, "version": version(TOOLKIT)},
        "libraries": {name: version(name) for name in _LIBRARIES},
        "source": {
            "id": plan.inventory.identity,
            "revision": location.revision,
            "files": {name: asdict(found) for name, found in fingerprints.items()},
            "filled": dict(plan.inventory.copied_steps),
            "license": location.license and asdict(location.license),
            "adapter": source.adapter,
        },
        "calibration": solved,
        "target": plan.target.name,
        "dtype": plan.recipe.dtype,
        "recipe": {
            "name": plan.recipe.name,
            "text": to_toml(plan.recipe),
            "original": plan.recipe.original or None,
        },
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
    architecture = Architecture(**sizes | {"delays": tuple(sizes["delays"])})
    try:
        if from_config(to_config(architecture)) == architecture:
            return architecture
        wrong = ["its sizes are of other types"]
    except UserError as error:
        wrong = [problem.removeprefix("config.json: ") for problem in error.problems]
    raise UserError([f"{MANIFEST}: architecture: {problem}" for problem in wrong])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a bundle's manifest, None for a folder that has none.

    Raises UserError for a manifest that is not one of ours, or that names files outside of the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = read_json(path, _LARGEST)
        if manifest["manifest_version"] != VERSION:
            shown = ascii(manifest["manifest_version"])[:40]
            raise UserError(f"{path}: version {shown}: this toolkit reads version {VERSION}")
        problem = problem_of(manifest)
        if problem:
            raise ValueError(problem)
        outside = [name for name in manifest["files"] if not _inside(folder, name)]
        architecture_of(manifest)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {_NOT_OURS} ({reason(error)})") from None
    if outside:
        raise UserError(f"{path}: names files outside of its folder: {', '.join(outside)}: do not trust this bundle")
    return dict(manifest)


def manifest_of(bundle: Path) -> dict[str, Any]:
    """Return the manifest of what must be a bundle; raises UserError for anything else."""
    manifest = read_manifest(bundle) if bundle.is_dir() else None
    if manifest is None:
        raise UserError(f"{bundle}: not a bundle: give a folder that ppx-convert wrote (with a {MANIFEST})")
    return manifest


def _inside(folder: Path, name: str) -> bool:
    return name.isprintable() and (folder / name).resolve().is_relative_to(folder.resolve())


def untracked_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return files in a bundle's folder that neither its manifest names nor this toolkit adds to a bundle."""
    return [name for name in files_of(folder) if name not in manifest["files"] and not _added(name)]


def _added(name: str) -> bool:
    return name in (MANIFEST, "README.md", "NOTICE") or name.startswith("parity/")


def files_of(folder: Path) -> dict[str, int]:
    """Return name and size of the files below a folder, sorted; hidden ones are passed over, and links to nowhere."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.is_file():
                found[str(path.relative_to(folder))] = path.stat().st_size
    return found
