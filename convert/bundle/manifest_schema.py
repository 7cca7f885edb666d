"""What a manifest must hold: manifests come with the bundles of others, and are believed for hashes and settings."""

import re
from typing import Any

from ..schema import TEXT, Each, Leaf, Maybe, OrNull, mismatch, number, whole

_SHA256 = Leaf("a sha256", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None)
_CRC32 = Leaf("a CRC-32", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value) is not None)
_LINES = Leaf("text", lambda value: isinstance(value, str))
_RECORD = {"size": whole(), "sha256": _SHA256}
_ENTRY = {
    "file": TEXT,
    "overflowed": Maybe(whole()),
    "flushed": Maybe(whole()),
}
_TENSOR = _ENTRY | {  # of a voice there is no source
    "source": TEXT,
    "rows": [whole()],
    "outputs": [TEXT],
    "bits": Maybe(whole()),
    "group_size": Maybe(whole()),
    "method": Maybe(TEXT),
    "relative_rmse": Maybe(number(0)),
    "relative_rmse_by_step": Maybe([number(0)]),
    "crc32": Maybe([_CRC32]),
}
_CALIBRATION = {
    **dict.fromkeys(("sequences", "frames", "refined_steps"), number(0)),
    "kind": TEXT,
    "sha256": TEXT,
    "file": Maybe(TEXT),
}
_ADAPTER = _RECORD | {
    "id": TEXT,
    "revision": OrNull(TEXT),
    "rank": whole(1),
    "scaling": number(),
    "merged": [TEXT],
}
MANIFEST = {
    "fingerprint": TEXT,
    "target": TEXT,
    "dtype": TEXT,
    "bits_per_weight": number(0),
    "parameters": whole(),
    "toolkit": {"name": TEXT, "version": TEXT},
    "recipe": {"name": TEXT, "text": _LINES, "original": Maybe(_LINES)},
    "source": {
        "id": TEXT,
        "revision": OrNull(TEXT),
        "files": Each(_RECORD),
        "filled": Maybe(Each(TEXT)),
        "adapter": Maybe(_ADAPTER),
    },
    "architecture": Each(Leaf("a number or a list", lambda value: type(value) in (int, float, list))),
    "calibration": Maybe(_CALIBRATION),
    "voices": [TEXT],
    "dropped": Maybe(Each(TEXT)),
    "overflowed": Maybe(whole()),
    "flushed": Maybe(whole()),
    "files": Each(_RECORD),
}


def problem_of(manifest: dict[str, Any]) -> str | None:
    """Return a sentence on the first thing in a manifest that is not as it must be, None if nothing is."""
    if found := mismatch(manifest, MANIFEST):
        return found
    tensors = manifest.get("tensors")
    if not isinstance(tensors, list):
        return "tensors is not a list"
    for number_, entry in enumerate(tensors):
        place = f"tensors[{number_}]"
        schema = _TENSOR if isinstance(entry, dict) and ("source" in entry or "outputs" in entry) else _ENTRY
        if found := mismatch(entry, schema, place):
            return found
        if entry["file"] not in manifest["files"]:
            return f"{place}.file is {entry['file'][:60]!a}, which is not one of the bundle's files"
        if schema is _TENSOR and (found := _contradiction(entry)):
            return f"{place}.{found}"
    return None


def _contradiction(entry: dict[str, Any]) -> str | None:
    if len(entry["rows"]) != 2 or not entry["rows"][0] < entry["rows"][1]:
        return "rows is not the first and the last of some"
    if not entry["outputs"]:
        return "outputs is empty"
    if (entry.get("bits") is None) != (entry.get("group_size") is None):
        return "bits and group_size do not go together"
    return None
