"""Whether a bundle is whole: every file, name, shape, hash, setting and voice that it must have, and no other."""

import json
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..convert.bundle.integrity import differences
from ..convert.bundle.manifest import Manifest
from ..convert.bundle.plan import index_of, json_text
from ..convert.bundle.reader import Bundle, Layout
from ..convert.bundle.recipe import DTYPES
from ..convert.errors import Problem, UserError, reason
from ..convert.file_names import CONFIG, INDEX, MANIFEST, VOICES
from ..convert.hints import Hint
from ..convert.source.architecture import Architecture
from ..convert.source.architecture import read_config as read_json
from ..convert.source.scan import BLOCK, hash_file
from ..convert.source.source import Source
from ..convert.source.voices import Voice, read_voices
from ..convert.tensorfile import DTYPES as NUMPY_DTYPES
from ..convert.tensorfile import TensorFile
from ..quant.casting import cast


@dataclass(frozen=True)
class FileCheck:
    """What is wrong with a bundle's files, and whether its weights can still be read."""

    problems: list[Problem]
    readable: bool


def check_files(folder: Path, manifest: Manifest, layout: Layout, source: Source, bar: "tqdm[Any]") -> FileCheck:
    """Check every file of a bundle.

    The expected files and tensors follow from the source and the target; the manifest is trusted for hashes and
    settings only. Reads and hashes every file. In a file with another hash, the tensors that changed are named.
    """
    against_manifest = differences(folder, manifest, bar)
    problems = list(against_manifest.problems)
    problems += _unexpected(manifest, layout, source) + _copies(folder, manifest, layout, source)
    problems += _unaccounted(manifest, layout)
    readable = True
    if sizes := _other_sizes(layout.architecture, source.architecture):
        problems += sizes
        readable = False
    for name, specs in layout.specs().items():
        if not (folder / name).is_file():  # which is listed already
            readable = False
            continue
        expected = {spec.name: (spec.dtype, spec.shape) for spec in specs}
        try:
            with closing(TensorFile(folder / name)) as file:
                stored = {spec.name: (spec.dtype, spec.shape) for spec in file.specs.values()}
                stored |= {key: (dtype, ()) for key, dtype in file.unknown.items()}
                problems += [Problem(name, f"{key}: stands there twice") for key in file.doubled]
                if name in against_manifest.changed:
                    problems += _changed(file, name, manifest)
        except UserError as error:
            problems += _ours(error)
            readable = False
            continue
        for key in sorted(expected.keys() | stored.keys()):
            if expected.get(key) != stored.get(key):
                shown = f"{_shown(stored.get(key))}, where {_shown(expected.get(key))} is expected"
                problems.append(Problem(name, f"{key}: {shown}"))
                readable = readable and key not in expected
    try:
        read_json(folder / CONFIG)
    except UserError as error:
        return FileCheck(problems + _ours(error), readable=False)
    return FileCheck(problems + _settings(folder, manifest, layout, source), readable)


def _ours(error: UserError) -> list[Problem]:
    """Return what is wrong with a file that the conversion wrote: it was not downloaded."""
    return [
        replace(problem, hint=Hint.CONVERT_AGAIN) if problem.hint is Hint.DOWNLOAD_AGAIN else problem
        for problem in error.problems
    ]


def _unexpected(manifest: Manifest, layout: Layout, source: Source) -> list[Problem]:
    """Return files that the manifest names and the target does not have, or the other way round."""
    target = layout.target
    expected = {
        *layout.files.values(),
        *target.copies_of(bool(source.voices)).values(),
        CONFIG,
        *([INDEX] if target.indexed else []),
    }
    if target.voice_cache:
        expected |= {f"voices/{voice.name}.safetensors" for voice in source.voices}
    unnamed, others = sorted(expected - manifest.files.keys()), sorted(manifest.files.keys() - expected)
    wrong = f"stands in {MANIFEST}, and does not belong to a bundle for {target.name}"
    return [Problem(name, f"belongs to the bundle, and {MANIFEST} does not name it") for name in unnamed] + [
        Problem(name, wrong) for name in others
    ]


def _other_sizes(actual: Architecture, expected: Architecture) -> list[Problem]:
    """Return what of a bundle's architecture is not the source's."""
    values = [(field.name, getattr(actual, field.name), getattr(expected, field.name)) for field in fields(expected)]
    return [
        Problem(MANIFEST, f"architecture.{name} is {of_bundle}, the source's is {of_source}")
        for name, of_bundle, of_source in values
        if of_bundle != of_source
    ]


def _shown(spec: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{spec[0]} {list(spec[1])}" if spec else "nothing"


def _unaccounted(manifest: Manifest, layout: Layout) -> list[Problem]:
    """Return outputs that the manifest has no entry for, and entries that stand for no output of the target."""
    expected = {(output.role.name, output.name) for output in layout.every()}
    entries = {(tensor.source, tensor.outputs[0]) for tensor in manifest.tensors}
    unnamed, others = sorted(expected - entries), sorted(entries - expected)
    wrong = f"which {layout.target.name} does not have"
    return [Problem(MANIFEST, f"does not name {name}, made of {source}") for source, name in unnamed] + [
        Problem(MANIFEST, f"names {name}, made of {source}, {wrong}") for source, name in others
    ]


def _changed(file: TensorFile, name: str, manifest: Manifest) -> Iterator[Problem]:
    """Yield the tensors of a file whose checksum is not the manifest's."""
    for record in manifest.tensors:
        if record.file != name:
            continue
        for tensor, checksum in zip(record.outputs, record.crc32, strict=False):
            spec = file.specs.get(tensor)
            if spec is None:
                continue
            actual = 0
            for first, last in spec.pieces(BLOCK):
                rows = file.read(tensor, first, last)
                actual = zlib.crc32(rows.reshape(-1).view(np.uint8).data, actual)
            if f"{actual:08x}" != checksum:
                yield Problem(name, f"{tensor}: its bytes are not those that were written")


def _settings(folder: Path, manifest: Manifest, layout: Layout, source: Source) -> list[Problem]:
    """Return settings of config.json, and of the index, that are not what the conversion writes."""
    outputs, target = layout.every(), layout.target
    voices = sorted(voice.name for voice in source.voices)
    problems = []
    if list(manifest.voices) != voices:
        problems.append(Problem(MANIFEST, f"names the voices {', '.join(manifest.voices) or 'none'}"))
    config = target.config(source.architecture, outputs, manifest.source.id, voices)
    problems += _unequal(folder, CONFIG, config)
    if target.indexed:
        problems += _unequal(folder, INDEX, index_of(layout.files))
    return problems


def _unequal(folder: Path, name: str, expected: dict[str, Any]) -> list[Problem]:
    """Return the keys of a JSON file that are not as expected; its text must be what the conversion writes."""
    path = folder / name
    try:
        settings, text = (read_json(path), path.read_text("utf-8"))
    except UserError as error:
        return _ours(error)
    except (OSError, ValueError) as error:
        return [Problem(name, reason(error))]
    if text == json_text(expected):
        return []
    flat, wanted = _flat(settings), _flat(json.loads(json.dumps(expected)))
    problems = []
    for key in sorted(flat.keys() | wanted.keys()):
        if flat.get(key, ...) != wanted.get(key, ...):
            shown = [repr(values[key])[:60] if key in values else "nothing" for values in (flat, wanted)]
            problems.append(Problem(name, f"{'.'.join(key)} is {shown[0]}, where {shown[1]} is expected"))
    return problems or [Problem(name, "is not written as the conversion writes it: does a key stand there twice?")]


def _flat(value: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return nested settings under the path of their keys."""
    settings: dict[tuple[str, ...], Any] = {}
    for key, inner in value.items():
        path = (*prefix, key)
        settings |= _flat(inner, path) if isinstance(inner, dict) and inner else {path: inner}
    return settings


def _copies(folder: Path, manifest: Manifest, layout: Layout, source: Source) -> list[Problem]:
    """Return files that are copies of the source's by their names, and hold something else."""
    problems = []
    kinds = source.location.files.by_kind()
    for kind, name in layout.target.copies_of(bool(source.voices)).items():
        if kind == VOICES and source.recorded:  # its voices are compared one by one, with those that were added
            problems += _other_members(name, folder, source)
            continue
        (original,) = kinds[kind]
        with tqdm(disable=True) as unseen:  # 400 MB at most: a second
            expected = hash_file(source.location.folder / original, unseen).sha256
        if name not in manifest.files or manifest.files[name].sha256 != expected:
            problems.append(Problem(name, f"is not the source's {original}"))
    return problems


def _other_members(name: str, folder: Path, source: Source) -> list[Problem]:
    """Return what an archive of voices holds beside voices, where some were added to the source's."""
    try:
        others = read_voices(folder / name, source.architecture)[1]
    except UserError:  # which the comparison of voices lists
        return []
    return [Problem(f"{name}: {other}", "is not a voice, and was not written with this archive") for other in others]


def voice_problems(bundle: Bundle, voices: list[Voice]) -> list[Problem]:
    """Return what of a bundle's voices is not the source's, in the bundle's dtype."""
    try:
        stored = {voice.name: voice for voice in bundle.voices()}
    except UserError as error:
        return error.problems
    others = sorted(stored.keys() - {voice.name for voice in voices})
    problems = [Problem(f"voice {name}", "not in the source") for name in others]
    quantization = bundle.layout.target.voice_cache
    dtype = NUMPY_DTYPES[DTYPES[bundle.manifest.dtype]]
    for voice in voices:
        other = stored.get(voice.name)
        if other is None:
            problems.append(Problem(f"voice {voice.name}", "missing"))
            continue
        expected = cast(voice.embeddings, dtype).array if quantization else voice.embeddings
        cache = voice.cache.astype(NUMPY_DTYPES[quantization]) if quantization else voice.cache
        for what, mine, theirs in (("embeddings", expected, other.embeddings), ("cache", cache, other.cache)):
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                shown = [f"{array.dtype} {list(array.shape)}" for array in (theirs, mine)]
                message = f"{what}: {shown[0]}, where {shown[1]} is expected"
                problems.append(Problem(f"voice {voice.name}", message))
            elif count := int(np.count_nonzero(mine.astype(np.float32) != theirs.astype(np.float32))):
                message = f"{what}: {count} of {mine.size} values are not the source's"
                problems.append(Problem(f"voice {voice.name}", message))
    return problems
