"""What a manifest must look like: it comes with the bundles of others, and is believed for hashes and settings."""

import re
from collections.abc import Mapping
from typing import Any

from ..schema import FILE, SHA256, TEXT, Each, Leaf, Maybe, OrNull, mismatch, number, whole

_CRC32 = Leaf("a CRC-32", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value) is not None)
_LINES = Leaf("text", lambda value: isinstance(value, str))
_ENTRY = {
    "overflowed": Maybe(whole()),
    "flushed": Maybe(whole()),
}
_ADJUSTMENT = {"step": OrNull(whole()), "reason": TEXT, "method": Maybe(TEXT), "damping": Maybe(number(0))}
_TENSOR = _ENTRY | {  # an entry without these keys is for a voice
    "source": TEXT,
    "rows": [whole()],
    "outputs": [TEXT],
    "bits": Maybe(whole()),
    "group_size": Maybe(whole()),
    "method": Maybe(TEXT),
    "weighted_by": Maybe(TEXT),
    "relative_rmse": Maybe(number(0)),
    "relative_rmse_by_step": Maybe([number(0)]),
    "adjusted": Maybe([_ADJUSTMENT]),
    "crc32": Maybe([_CRC32]),
}
_CALIBRATION = {
    **dict.fromkeys(("sequences", "frames", "refined_steps"), number(0)),
    "kind": TEXT,
    "sha256": TEXT,
    "file": Maybe(TEXT),
    "refined": Maybe(TEXT),
}
_ADAPTER = FILE | {
    "id": TEXT,
    "revision": OrNull(TEXT),
    "rank": whole(1),
    "scaling": number(),
    "merged": [TEXT],
}
_RECORDED_VOICE = {
    **dict.fromkeys(("name", "consent", "tokens"), TEXT),
    **dict.fromkeys(("recording_sha256", "embedding_tables_sha256"), SHA256),
    "codebooks": whole(1, 64),
}
_VERSION = Leaf("version 1", lambda value: value == 1 and type(value) is int)
MANIFEST = {
    "manifest_version": _VERSION,
    "fingerprint": TEXT,
    "target": TEXT,
    "dtype": TEXT,
    "bits_per_weight": number(0),
    "parameters": whole(),
    "toolkit": {"name": TEXT, "version": TEXT},
    "libraries": Maybe(Each(TEXT)),
    "recipe": {"name": TEXT, "text": _LINES, "original": Maybe(_LINES)},
    "source": {
        "id": TEXT,
        "revision": OrNull(TEXT),
        "files": Each(FILE),
        "filled": Maybe(Each(TEXT)),
        "adapter": Maybe(_ADAPTER),
    },
    "architecture": Each(Leaf("a number or a list", lambda value: type(value) in (int, float, list))),
    "calibration": Maybe(_CALIBRATION),
    "voices": [TEXT],
    "recorded_voices": Maybe([_RECORDED_VOICE]),
    "dropped": Maybe(Each(TEXT)),
    "overflowed": Maybe(whole()),
    "flushed": Maybe(whole()),
    "files": Each(FILE),
}


def problem_of(manifest: Any) -> str | None:
    """Return a sentence on the first thing in parsed JSON that no manifest has there, None if all of it fits."""
    if problem := mismatch(manifest, MANIFEST):
        return problem
    tensors = manifest.get("tensors")
    if not isinstance(tensors, list):
        return "tensors is not a list"
    for number_, entry in enumerate(tensors):
        place = f"tensors[{number_}]"
        if problem := mismatch(entry, {"file": TEXT}, place) or _entry_problem(entry, place):
            return problem
        if entry["file"] not in manifest["files"]:
            return f"{place}.file is {entry['file'][:60]!a}, which is not one of the bundle's files"
    return None


def journal_problem(journal: Any) -> str | None:
    """Return the same for the journal of a conversion."""
    if problem := mismatch(journal, {"fingerprint": TEXT, "files": Each(FILE)}):
        return problem
    for name, file in journal["files"].items():
        if not isinstance(file.get("tensors"), list):
            return f"files.{name}.tensors is not a list"
        for place, entry in enumerate(file["tensors"]):
            if problem := mismatch(entry, {}, "entry") or _entry_problem(entry, f"files.{name}.tensors[{place}]"):
                return problem
    return None


def _entry_problem(entry: Mapping[str, Any], place: str) -> str | None:
    is_tensor = "source" in entry or "outputs" in entry
    if problem := mismatch(entry, _TENSOR if is_tensor else _ENTRY, place):
        return problem
    problem = _contradiction(entry) if is_tensor else None
    return problem and f"{place}.{problem}"


def _contradiction(entry: Mapping[str, Any]) -> str | None:
    if len(entry["rows"]) != 2 or not entry["rows"][0] < entry["rows"][1]:
        return "rows is not a first row and the one after the last"
    if not entry["outputs"]:
        return "outputs is empty"
    if (entry.get("bits") is None) != (entry.get("group_size") is None):
        return "bits is there without group_size, or that without bits"
    return None
