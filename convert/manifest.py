"""``manifest.json``: where a bundle comes from, how it was made, and the sha256 of everything in it."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .architecture import Architecture, from_config, to_config
from .plan import Plan
from .problems import UserError
from .recipe import to_toml
from .scan import Fingerprint
from .source import Source
from .workspace import MANIFEST

VERSION = 1
TOOLKIT = "ppx-convert"
_LIBRARIES = ("ml_dtypes", "mlx", "numba", "numpy", "safetensors", "torch")
_NOT_OURS = f"not a manifest of {TOOLKIT}: move the folder away, and make the bundle again"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fingerprint(
    plan: Plan, source: Source, prints: Mapping[str, Fingerprint], solved: Mapping[str, Any] | None = None
) -> str:
    """Return what stands for everything that decides a bundle: toolkit, libraries, source, recipe and plan.

    solved: what a solver went by.
    """
    location = source.location
    decisive = {
        "toolkit": version(TOOLKIT),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "revision": location.revision,
        "licence": location.licence and asdict(location.licence),
        "source": {name: found.sha256 for name, found in prints.items()},
        "adapter": source.adapter,
        "calibration": solved,
        "recipe": to_toml(plan.recipe),
        "identity": plan.inventory.identity,
        "filled": plan.inventory.filled,
        "files": [(file.name, file.nbytes, file.text) for file in plan.files],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def make_manifest(
    plan: Plan,
    source: Source,
    prints: Mapping[str, Fingerprint],
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
        "fingerprint": fingerprint(plan, source, prints, solved),
        "toolkit": {"name": TOOLKIT, "version": version(TOOLKIT)},
        "libraries": {name: version(name) for name in _LIBRARIES},
        "source": {
            "id": plan.inventory.identity,
            "revision": location.revision,
            "files": {name: asdict(found) for name, found in prints.items()},
            "filled": dict(plan.inventory.filled),
            "license": location.licence and asdict(location.licence),
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
    if from_config(to_config(architecture)) != architecture:  # raises for sizes that no model has
        raise ValueError("its architecture is not one")
    return architecture


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a bundle's manifest, None for a folder that has none.

    Raises UserError for a manifest that is not one of ours, or that names files outside of the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["manifest_version"] != VERSION:
            raise UserError(f"{path}: version {manifest['manifest_version']!r}: this toolkit reads version {VERSION}")
        whole = _is_manifest(manifest)
        outside = [name for name in manifest["files"] if not _inside(folder, name)]
        architecture_of(manifest)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {_NOT_OURS} ({str(error)[:80]!r})") from None
    if not whole:
        raise UserError(f"{path}: {_NOT_OURS} (fields are missing or of the wrong type)")
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


def _is_manifest(manifest: dict[str, Any]) -> bool:
    """Tell whether what this toolkit uses of a manifest has the right types; may raise where it has not."""
    texts = [manifest["fingerprint"], manifest["target"], manifest["dtype"], manifest["recipe"]["name"]]
    texts += [manifest["source"]["id"], *manifest["voices"]]
    files = [*manifest["files"].values(), *manifest["source"]["files"].values()]
    figures = [manifest["bits_per_weight"], manifest["parameters"]]
    if calibration := manifest.get("calibration"):
        texts += [calibration["kind"], calibration["sha256"], calibration.get("file", "")]
        figures += [calibration[key] for key in ("sequences", "frames", "refined_steps")]
    if adapter := manifest["source"].get("adapter"):
        texts += [adapter["id"], str(adapter["revision"]), *adapter["merged"]]
        files.append(adapter)
        figures += [adapter["rank"], abs(adapter["scaling"])]
    return (
        (manifest["source"]["revision"] is None or str(manifest["source"]["revision"]).isprintable())
        and all(type(figure) in (int, float) and 0 <= figure < math.inf for figure in figures)
        and all(isinstance(text, str) and text.isprintable() for text in texts)
        and all(type(record["size"]) is int and _SHA256.fullmatch(record["sha256"]) for record in files)
        and all(_is_entry(entry) for entry in manifest["tensors"])
    )


def _is_entry(entry: dict[str, Any]) -> bool:
    if "source" not in entry:  # of a voice
        return isinstance(entry["file"], str) and "outputs" not in entry
    first, last = entry["rows"]
    names = [entry["file"], entry["source"], *entry["outputs"], *entry.get("crc32", [])]
    figures = [*entry.get("relative_rmse_by_step", []), *([entry["relative_rmse"]] if "relative_rmse" in entry else [])]
    return (
        bool(entry["outputs"])
        and type(first) is type(last) is int
        and ("bits" in entry) == ("group_size" in entry)
        and all(type(entry.get(key, 0)) is int for key in ("bits", "group_size"))
        and all(isinstance(name, str) and name.isprintable() for name in names)
        and all(type(figure) in (int, float) and 0 <= figure < math.inf for figure in figures)
    )


def strangers(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
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
