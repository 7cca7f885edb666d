"""Whether a bundle is whole: every file, name, shape, hash, setting and voice that it must have, and no other."""

import json
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..convert.architecture import read_config
from ..convert.problems import UserError
from ..convert.recipe import DTYPES
from ..convert.scan import BLOCK, hash_file
from ..convert.source import CONFIG
from ..convert.tensorfile import DTYPES as NUMPY_DTYPES
from ..convert.tensorfile import TensorFile
from ..convert.voices import Voice
from ..quant.casting import cast
from .bundle import Bundle, Layout
from .integrity import differences

INDEX = "model.safetensors.index.json"


def problems(folder: Path, manifest: dict[str, Any], layout: Layout, bar: "tqdm[Any]") -> tuple[list[str], bool]:
    """Return what is wrong with a bundle's files, one sentence each, and whether its weights can be read for all that.

    Reads and hashes every file. A file with another hash is looked through for the tensors that changed.
    """
    found = differences(folder, manifest, bar)
    found += _unaccounted(manifest, layout)
    readable = True
    for name, specs in layout.specs().items():
        expected = {spec.name: (spec.dtype, spec.shape) for spec in specs}
        try:
            with closing(TensorFile(folder / name)) as file:
                held = {spec.name: (spec.dtype, spec.shape) for spec in file.specs.values()}
                held |= {key: (dtype, ()) for key, dtype in file.unknown.items()}
                found += [f"{name}: {key}: stands there twice" for key in file.doubled]
                if any(f"{name}: its sha256" in problem for problem in found):
                    found += _changed(file, name, manifest)
        except UserError as error:
            found += error.problems
            readable = False
            continue
        for key in sorted(expected.keys() | held.keys()):
            if expected.get(key) != held.get(key):
                found.append(f"{name}: {key}: {_shown(held.get(key))}, where {_shown(expected.get(key))} is expected")
                readable = readable and key not in expected
    try:
        read_config(folder / CONFIG)
    except UserError as error:
        return found + error.problems, False
    return found + _settings(folder, manifest, layout), readable


def _shown(spec: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{spec[0]} {list(spec[1])}" if spec else "nothing"


def _unaccounted(manifest: dict[str, Any], layout: Layout) -> list[str]:
    """Return outputs that the manifest has no entry for, and entries that stand for no output of the target."""
    expected = {(output.role.name, output.name) for output in layout.every()}
    entries = {(entry["source"], entry["outputs"][0]) for entry in manifest["tensors"] if "outputs" in entry}
    found = [f"manifest.json: says nothing of {name}, made of {source}" for source, name in sorted(expected - entries)]
    return found + [
        f"manifest.json: names {name}, made of {source}, which {layout.target.name} does not have"
        for source, name in sorted(entries - expected)
    ]


def _changed(file: TensorFile, name: str, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield the tensors of a file whose checksum is not the manifest's."""
    for entry in manifest["tensors"]:
        if entry["file"] != name:
            continue
        for tensor, checksum in zip(entry.get("outputs", ()), entry.get("crc32", ()), strict=False):
            spec = file.specs.get(tensor)
            if spec is None:
                continue
            height, found = max(1, BLOCK * spec.rows // max(spec.nbytes, 1)), 0
            for first in range(0, spec.rows, height):
                rows = file.read(tensor, first, min(first + height, spec.rows))
                found = zlib.crc32(rows.reshape(-1).view(np.uint8).data, found)
            if f"{found:08x}" != checksum:
                yield f"{name}: {tensor}: its bytes are not those that were written"


def _settings(folder: Path, manifest: dict[str, Any], layout: Layout) -> list[str]:
    """Return settings of config.json, and of the index, that are not what the conversion writes."""
    outputs, target = layout.every(), layout.target
    config = target.config(layout.architecture, outputs, manifest["source"]["id"], sorted(manifest["voices"]))
    found = list(_unequal(folder, CONFIG, config))
    if target.indexed:
        names = {spec.name: file for file, specs in layout.specs().items() for spec in specs}
        size = sum(output.nbytes for output in outputs)
        index = {"metadata": {"total_size": size}, "weight_map": names}
        found += _unequal(folder, INDEX, index)
    return found


def _unequal(folder: Path, name: str, expected: dict[str, Any]) -> Iterator[str]:
    """Yield the keys of a JSON file that are not as expected."""
    try:
        held = read_config(folder / name)
    except UserError as error:
        yield from error.problems
        return
    flat, wanted = _flat(held), _flat(json.loads(json.dumps(expected)))
    for key in sorted(flat.keys() | wanted.keys()):
        if flat.get(key, ...) != wanted.get(key, ...):
            shown = [repr(values[key])[:60] if key in values else "nothing" for values in (flat, wanted)]
            yield f"{name}: {key} is {shown[0]}, where {shown[1]} is expected"


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) and inner else {f"{prefix}{key}": inner}
    return found


def copy_problems(manifest: dict[str, Any], layout: Layout, source: Path) -> list[str]:
    """Return files that are copies of the source's by their names, and hold something else."""
    found = []
    for original, name in layout.target.copies.items():
        with tqdm(disable=True) as unseen:  # 400 MB at most: a second
            expected = hash_file(source / original, unseen).sha256
        if manifest["files"].get(name, {}).get("sha256") != expected:
            found.append(f"{name}: is not the source's {original}")
    return found


def voice_problems(bundle: Bundle, voices: list[Voice]) -> list[str]:
    """Return what of a bundle's voices is not the source's, in the bundle's dtype."""
    try:
        held = {voice.name: voice for voice in bundle.voices()}
    except UserError as error:
        return error.problems
    found = [f"voice {name}: not in the source" for name in sorted(held.keys() - {voice.name for voice in voices})]
    packed = bundle.layout.target.voice_cache is None
    dtype = None if packed else NUMPY_DTYPES[DTYPES[bundle.manifest["dtype"]]]
    for voice in voices:
        other = held.get(voice.name)
        if other is None:
            found.append(f"voice {voice.name}: missing")
            continue
        expected = voice.embeddings if dtype is None else cast(voice.embeddings, dtype).array
        for what, mine, theirs in (("embeddings", expected, other.embeddings), ("cache", voice.cache, other.cache)):
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                found.append(f"voice {voice.name}: {what}: {theirs.dtype} {list(theirs.shape)}, not {list(mine.shape)}")
            elif count := int(np.count_nonzero(mine.astype(np.float32) != theirs.astype(np.float32))):
                found.append(f"voice {voice.name}: {what}: {count} of {mine.size} values are not the source's")
    return found
