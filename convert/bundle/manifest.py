"""``manifest.json``: where a bundle comes from, how it was made, and the sha256 of everything in it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from ..errors import Problem, UserError, reason
from ..file_names import CARD, MANIFEST, NOTICE
from ..regular_files import read_json
from ..source.architecture import Architecture, from_config, to_config
from ..source.recorded_voice import VoiceOrigin
from ..source.scan import Fingerprint
from ..source.source import Source
from .manifest_schema import problem_of
from .plan import Plan
from .recipe_file import to_toml
from .records import (
    CalibrationRecord,
    RecipeRecord,
    Software,
    SourceRecord,
    TensorRecord,
    VoiceRecord,
    WrittenFile,
    files_from_json,
    files_to_json,
    records_of,
)

VERSION = 1
TOOLKIT = "ppx-convert"
_LIBRARIES = ("ml_dtypes", "mlx", "numba", "numpy", "safetensors", "torch")
# Of methods that use data: counted up where the same inputs give other codes. A killed run of an earlier version is
# then not resumed, and its bundle not taken for the one that is asked for.
_DATA_DRIVEN_REVISION = 2
_NOT_OURS = f"not a manifest of {TOOLKIT}: move the folder away, and make the bundle again"
LARGEST = 64 << 20  # bytes; that of the 7B model has 300 thousand


@dataclass(frozen=True)
class Manifest:
    """What is known of a bundle. It contains no time, so that the same conversion gives the same manifest.

    fingerprint: stands for everything that decides the bundle. libraries: versions by name. target, dtype: names as a
    recipe has them. parameters: of the source's model. bits_per_weight: of the bundle's tensors for each of them.
    dropped: what of the source is not in the bundle, with the reason. overflowed, flushed: values that became infinite
    or zero in the dtype. files: size and sha256 of every file but this one. recorded_voices: those of the voices that
    were made from recordings.
    """

    fingerprint: str
    toolkit: Software
    libraries: dict[str, str]
    source: SourceRecord
    calibration: CalibrationRecord | None
    target: str
    dtype: str
    recipe: RecipeRecord
    architecture: Architecture
    parameters: int
    bits_per_weight: float
    voices: tuple[str, ...]
    dropped: dict[str, str]
    overflowed: int
    flushed: int
    files: dict[str, Fingerprint]
    tensors: tuple[TensorRecord, ...]
    voice_records: tuple[VoiceRecord, ...] = ()
    recorded_voices: tuple[VoiceOrigin, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of every file that it names."""
        return sum(file.size for file in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Return it as ``manifest.json`` holds it."""
        entries = [tensor.to_json() for tensor in self.tensors] + [asdict(voice) for voice in self.voice_records]
        return {
            "manifest_version": VERSION,
            "fingerprint": self.fingerprint,
            "toolkit": asdict(self.toolkit),
            "libraries": self.libraries,
            "source": self.source.to_json(),
            "calibration": self.calibration and self.calibration.to_json(),
            "target": self.target,
            "dtype": self.dtype,
            "recipe": asdict(self.recipe),
            "architecture": asdict(self.architecture) | {"delays": list(self.architecture.delays)},
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "voices": list(self.voices),
            "dropped": self.dropped,
            "overflowed": self.overflowed,
            "flushed": self.flushed,
            "files": files_to_json(self.files),
            "tensors": entries,
            **_recorded(self.recorded_voices),
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Return the manifest in parsed JSON, of this version or an earlier one, which lacked some keys.

        Raises ValueError with a sentence on what is not as it must be.
        """
        if problem := problem_of(data):
            raise ValueError(problem)
        tensors, voice_records = records_of(data["tensors"])
        recipe = data["recipe"]
        return cls(
            fingerprint=data["fingerprint"],
            toolkit=Software(data["toolkit"]["name"], data["toolkit"]["version"]),
            libraries=dict(data.get("libraries") or {}),
            source=SourceRecord.from_json(data["source"]),
            calibration=CalibrationRecord.from_json(data["calibration"]) if data.get("calibration") else None,
            target=data["target"],
            dtype=data["dtype"],
            recipe=RecipeRecord(recipe["name"], recipe["text"], recipe.get("original")),
            architecture=_architecture(data["architecture"]),
            parameters=data["parameters"],
            bits_per_weight=data["bits_per_weight"],
            voices=tuple(data["voices"]),
            dropped=dict(data.get("dropped") or {}),
            overflowed=data.get("overflowed") or 0,
            flushed=data.get("flushed") or 0,
            files=files_from_json(data["files"]),
            tensors=tensors,
            voice_records=voice_records,
            recorded_voices=tuple(map(VoiceOrigin.from_json, data.get("recorded_voices") or ())),
        )


def _recorded(voices: Iterable[VoiceOrigin]) -> dict[str, Any]:
    """Return the key for voices that were made from recordings, which a manifest without any lacks."""
    entries = [voice.to_json() for voice in voices]
    return {"recorded_voices": entries} if entries else {}


def fingerprint(
    plan: Plan,
    source: Source,
    fingerprints: Mapping[str, Fingerprint],
    calibration: CalibrationRecord | None = None,
) -> str:
    """Return what stands for everything that decides a bundle: toolkit, libraries, source, recipe and plan."""
    location = source.location
    decisive = {
        "toolkit": version(TOOLKIT),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "revision": location.revision,
        "licence": location.license and asdict(location.license),
        "source": {name: file.sha256 for name, file in fingerprints.items()},
        "adapter": source.adapter and source.adapter.to_json(),
        "calibration": calibration and [_DATA_DRIVEN_REVISION, calibration.to_json()],
        "recipe": to_toml(plan.recipe),
        "identity": plan.inventory.identity,
        "filled": plan.inventory.copied_steps,
        "files": [(file.name, file.nbytes, file.text) for file in plan.files],
        **_recorded(recorded.origin for recorded in source.recorded),
        "weighted": [(output.name, output.weighted_by) for output in plan.outputs if output.weighted_by],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def make_manifest(
    plan: Plan,
    source: Source,
    fingerprints: Mapping[str, Fingerprint],
    written: Mapping[str, WrittenFile],
    calibration: CalibrationRecord | None = None,
) -> Manifest:
    """Return the manifest of a bundle whose files were written. fingerprints: of the source's files."""
    location = source.location
    tensors = tuple(tensor for file in plan.files for tensor in written[file.name].tensors)
    voices = tuple(voice for file in plan.files for voice in written[file.name].voices)
    return Manifest(
        fingerprint=fingerprint(plan, source, fingerprints, calibration),
        toolkit=Software(TOOLKIT, version(TOOLKIT)),
        libraries={name: version(name) for name in _LIBRARIES},
        source=SourceRecord(
            plan.inventory.identity,
            location.revision,
            dict(fingerprints),
            dict(plan.inventory.copied_steps),
            location.license,
            source.adapter,
        ),
        calibration=calibration,
        target=plan.target.name,
        dtype=plan.recipe.dtype,
        recipe=RecipeRecord(plan.recipe.name, to_toml(plan.recipe), plan.recipe.original or None),
        architecture=plan.inventory.architecture,
        parameters=plan.parameters,
        bits_per_weight=round(plan.bits_per_weight, 4),
        voices=tuple(sorted(plan.inventory.voices)),
        dropped=plan.dropped,
        overflowed=sum(tensor.overflowed for tensor in tensors) + sum(voice.overflowed for voice in voices),
        flushed=sum(tensor.flushed for tensor in tensors) + sum(voice.flushed for voice in voices),
        files={file.name: Fingerprint(written[file.name].size, written[file.name].sha256) for file in plan.files},
        tensors=tensors,
        voice_records=voices,
        recorded_voices=tuple(recorded.origin for recorded in source.recorded),
    )


def _architecture(sizes: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a manifest records; raises UserError for sizes that no model has."""
    architecture = Architecture(**{**sizes, "delays": tuple(sizes["delays"])})
    try:
        if from_config(to_config(architecture)) == architecture:
            return architecture
        problems = [Problem("", "its sizes are of other types")]
    except UserError as error:
        problems = error.problems
    raise UserError([replace(problem, place=f"{MANIFEST}: architecture") for problem in problems])


def read_manifest(folder: Path) -> Manifest | None:
    """Return a bundle's manifest, None for a folder that has none.

    Raises UserError for a manifest that is not one of ours, or that names files outside of the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        data = read_json(path, LARGEST)
        if data["manifest_version"] != VERSION:
            shown = ascii(data["manifest_version"])[:40]
            raise UserError(f"{path}: version {shown}: this toolkit reads version {VERSION}")
        manifest = Manifest.from_json(data)
        outside = [name for name in manifest.files if not _inside(folder, name)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {_NOT_OURS} ({reason(error)})") from None
    if outside:
        raise UserError(f"{path}: names files outside of its folder: {', '.join(outside)}: do not trust this bundle")
    return manifest


def manifest_of(bundle: Path) -> Manifest:
    """Return the manifest of what must be a bundle; raises UserError for anything else."""
    manifest = read_manifest(bundle) if bundle.is_dir() else None
    if manifest is None:
        raise UserError(f"{bundle}: not a bundle: give a folder that ppx-convert wrote (with a {MANIFEST})")
    return manifest


def _inside(folder: Path, name: str) -> bool:
    if not name.isprintable() or Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    path, home = (folder / name).resolve(), folder.resolve()
    return path.is_relative_to(home) or _in_hub_cache(home, path)


def _in_hub_cache(folder: Path, path: Path) -> bool:
    """Tell whether a file is a blob of the repository whose snapshot a folder is: there the Hub's client links to."""
    blobs = folder.parent.parent / "blobs"
    return folder.parent.name == "snapshots" and not blobs.is_symlink() and path.parent == blobs


def untracked_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return files in a bundle's folder that its manifest does not name, and that this toolkit does not add to one."""
    return [name for name in files_of(folder) if name not in manifest.files and not _added(name)]


def _added(name: str) -> bool:
    return name in (MANIFEST, CARD, NOTICE) or name.startswith("parity/")


def files_of(folder: Path) -> dict[str, int]:
    """Return name and size of the files below a folder, sorted; hidden ones and broken links are skipped."""
    sizes = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.is_file():
                sizes[str(path.relative_to(folder))] = path.stat().st_size
    return sizes
