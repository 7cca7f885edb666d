"""Manifests: written as before, and those of earlier versions are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ppx.convert.bundle.manifest import Manifest, manifest_of
from ppx.convert.bundle.reader import layout_of
from ppx.convert.bundle.workspace import Journal
from ppx.verify.publishing import card

EARLIER = Path(__file__).parents[1] / "data" / "earlier"
WHOLE = ("4bit", "gptq", "adapter")
CUT = ("before-refined", "before-calibration", "before-checksums")


def earlier(name: str) -> Any:
    return json.loads((EARLIER / f"{name}.json").read_text())


def test_every_committed_file_is_tested():
    manifests = [path for path in EARLIER.glob("*.json") if "manifest_version" in json.loads(path.read_text())]
    assert {path.stem for path in manifests} == {*WHOLE, *CUT}


@pytest.mark.parametrize("name", WHOLE)
def test_what_the_last_version_wrote_is_written_again_byte_by_byte(name):
    text = (EARLIER / f"{name}.json").read_text("utf-8")
    manifest = Manifest.from_json(json.loads(text))
    assert json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n" == text


@pytest.mark.parametrize("name", CUT)
def test_what_an_earlier_version_lacks_has_a_neutral_value(name):
    data = earlier(name)
    manifest = Manifest.from_json(data)
    read = manifest.to_json()
    assert Manifest.from_json(read) == manifest
    assert read["tensors"] == data["tensors"]
    kept = {key: value for key, value in read["source"].items() if key in data["source"]}
    assert kept == data["source"]
    assert all(read["source"][key] is None for key in read["source"].keys() - data["source"].keys())
    assert read["calibration"] == data.get("calibration")


@pytest.mark.parametrize("name", [*WHOLE, *CUT])
def test_a_bundle_of_an_earlier_version_is_read(name, tmp_path):
    shutil.copy(EARLIER / f"{name}.json", tmp_path / "manifest.json")
    manifest, layout = layout_of(tmp_path)
    assert manifest == manifest_of(tmp_path)
    of_name = {output.name: output for output in layout.every()}
    quantized = [tensor for tensor in manifest.tensors if tensor.bits is not None]
    assert len(quantized) == sum("bits" in entry for entry in earlier(name)["tensors"]) > 0
    for tensor in quantized:
        setting = of_name[tensor.outputs[0]].quantization
        assert setting is not None
        assert (setting.bits, setting.group_size) == (tensor.bits, tensor.group_size)
    assert f"ppx-convert {manifest.toolkit.version}" in card.files(manifest, None)["README.md"]


def shape_of(value: Any) -> Any:
    """JSON with types in place of values, and keys in their order."""
    if isinstance(value, dict):
        return [(key, shape_of(inner)) for key, inner in value.items()]
    return [shape_of(inner) for inner in value] if isinstance(value, list) else type(value)


def test_a_manifest_has_the_keys_of_the_last_version_in_their_order(bundle, pico):
    if pico.name != "pico":
        pytest.skip("the committed manifest is pico's")
    now = json.loads((bundle("--bits", "4", "--group-size", "64") / "manifest.json").read_text())
    before = earlier("4bit")
    now["libraries"] = before["libraries"]  # whose versions may be others
    weighted = [entry.pop("weighted_by", None) for entry in now["tensors"]]  # the only key that was added since
    assert any(weighted)
    assert not all(weighted)
    assert shape_of(now) == shape_of(before)
    for key in ("source", "target", "dtype", "recipe", "architecture", "parameters", "bits_per_weight", "voices"):
        assert now[key] == before[key]


def test_the_norm_that_weighed_errors_is_written_after_the_method_and_read_again():
    data = earlier("4bit")
    entry = quantized(data)
    assert Manifest.from_json(data).to_json()["tensors"] == data["tensors"]
    entry["weighted_by"] = "transformer.layers.0.norm1.alpha"
    written = quantized(Manifest.from_json(data).to_json())
    assert written == entry
    keys = list(written)
    assert keys[keys.index("method") + 1] == "weighted_by"


def test_a_journal_of_an_earlier_version_is_resumed():
    """Its entries named no file."""
    entries = earlier("before-checksums")["tensors"]
    name = entries[0]["file"]
    of_file = [entry for entry in entries if entry["file"] == name]
    written = [{key: value for key, value in entry.items() if key != "file"} for entry in of_file]
    data = {"fingerprint": "x", "files": {name: {"size": 5, "sha256": "ab" * 32, "tensors": written}}}
    journal = Journal.from_json(data)
    assert [tensor.to_json() for tensor in journal.files[name].tensors] == of_file
    assert Journal.from_json(journal.to_json()) == journal


@pytest.mark.parametrize(
    "change",
    [
        lambda journal: journal.pop("fingerprint"),
        lambda journal: journal.update(files=[]),
        lambda journal: journal["files"]["a"].pop("tensors"),
        lambda journal: journal["files"]["a"].update(size="5"),
        lambda journal: journal["files"]["a"].update(tensors=[3]),
        lambda journal: journal["files"]["a"].update(tensors=[{"source": 3}]),
    ],
)
def test_a_damaged_journal_is_refused(change):
    journal = {"fingerprint": "x", "files": {"a": {"size": 5, "sha256": "ab" * 32, "tensors": []}}}
    assert Journal.from_json(journal).files["a"].size == 5
    change(journal)
    with pytest.raises(ValueError, match=r"."):
        Journal.from_json(journal)


def quantized(manifest: Any) -> dict[str, Any]:
    return next(entry for entry in manifest["tensors"] if "bits" in entry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(manifest_version=2), "manifest_version is 2: version 1 is needed"),
        (lambda m: m["libraries"].update(mlx=3), r"libraries\.mlx is 3: a line of printable text is needed"),
        (lambda m: m["calibration"].update(refined=["x"]), r"calibration\.refined is a list"),
        (lambda m: m["tensors"][1].update(adjusted=[{"reason": "x"}]), r"tensors\[1\]\.adjusted\[0\]\.step is missing"),
        (lambda m: quantized(m).update(weighted_by=3), r"tensors\[\d+\]\.weighted_by is 3"),
        (lambda m: quantized(m).update(group_size=None), r"tensors\[\d+\]\.bits is there without group_size"),
    ],
)
def test_what_no_manifest_holds_is_refused(change, message):
    data = earlier("gptq")
    Manifest.from_json(data)
    change(data)
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(data)
