import json
import shutil

import pytest


@pytest.fixture
def copy(bundle, tmp_path):
    shutil.copytree(bundle("--recipe", "4bit"), tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("recipe", ["4bit", "moshi-q8", "mixed", "bf16"])
def test_a_bundle_adds_up(recipe, bundle, program, tmp_path):
    folder = bundle("--recipe", recipe)
    said = json.loads(program("ppx-inspect", folder, "--json", "--tensors", "--check", cwd=tmp_path).stdout)
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = {row["component"]: row for row in said["components"]}
    assert rows["model"]["parameters"] == manifest["parameters"]
    assert rows["model"]["bits_per_weight"] == pytest.approx(manifest["bits_per_weight"], abs=0.001)
    assert said["kind"] == "bundle"
    assert said["differences"] == said["missing"] == []
    assert len(said["tensors"]) == sum(row["tensors"] for name, row in rows.items() if name != "model")
    dtypes = {"4bit": ["F16"], "bf16": ["BF16"]}.get(recipe, ["BF16", "U32"])
    assert rows["embeddings"]["dtypes"] == dtypes


def test_check_names_every_difference(copy, program, tmp_path):
    (copy / "config.json").unlink()
    (copy / "extra").write_text("")
    (copy / "README.md").write_text("a card")
    (copy / "temporal.safetensors").write_bytes((copy / "temporal.safetensors").read_bytes()[:-1])
    data = bytearray((copy / "depformer.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "depformer.safetensors").write_bytes(data)
    done = program("ppx-inspect", copy, "--check", "--json", cwd=tmp_path, status=1)
    found = json.loads(done.stdout)["differences"]
    assert [difference.split(":")[0] for difference in found] == [
        "extra", "temporal.safetensors", "depformer.safetensors", "config.json"
    ]  # fmt: skip


def test_what_is_missing_is_said(copy, pico, program, tmp_path):
    (copy / "voices" / "NATF0.safetensors").unlink()
    assert "missing: voices/NATF0.safetensors" in program("ppx-inspect", copy, cwd=tmp_path).stdout
    said = program("ppx-inspect", pico, cwd=tmp_path).stdout
    assert "missing" not in said
    assert "18 voices: NATF0" in said
    assert "151       4,587,264" in said


@pytest.mark.parametrize("name", ["", "nothing", "file"])
def test_what_is_neither(name, program, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("/nowhere")
    done = program("ppx-inspect", tmp_path / name, cwd=tmp_path, status=2)
    assert len(done.stderr.splitlines()) == 1


def odd_manifests():
    yield "not json", lambda _: "{"
    yield "nested", lambda _: "[" * 100000
    yield "a list", lambda _: [1]
    for key in ("files", "tensors", "voices", "source", "recipe", "architecture", "fingerprint", "dtype"):
        yield f"{key} missing", lambda m, key=key: {k: v for k, v in m.items() if k != key}
        yield f"{key} a number", lambda m, key=key: m | {key: 3}
        yield f"{key} a list", lambda m, key=key: m | {key: [1]}
    yield "another version", lambda m: m | {"manifest_version": 2}
    yield "outside", lambda m: m | {"files": {"../../x": next(iter(m["files"].values()))}}
    yield "absolute", lambda m: m | {"files": {"/etc/passwd": next(iter(m["files"].values()))}}
    yield "nul", lambda m: m | {"files": {"a\x00b": next(iter(m["files"].values()))}}
    yield "surrogate", lambda m: m | {"voices": ["\ud800"]}
    yield "layers", lambda m: m | {"architecture": m["architecture"] | {"num_layers": 1 << 40}}
    yield "text layers", lambda m: m | {"architecture": m["architecture"] | {"num_layers": "x"}}
    for key, value in (("rows", []), ("rows", "x"), ("outputs", []), ("outputs", [1]), ("source", [1]), ("file", 1)):
        yield f"{key} {value}", lambda m, key=key, value=value: m | {"tensors": [m["tensors"][0] | {key: value}]}


@pytest.mark.parametrize(("name", "change"), [*odd_manifests()], ids=[name for name, _ in odd_manifests()])
def test_a_strangers_manifest_ends_in_a_line(name, change, bundle, tmp_path):
    from ppx.convert.bundle.manifest import read_manifest
    from ppx.convert.errors import UserError

    manifest = json.loads((bundle("--recipe", "4bit") / "manifest.json").read_text())
    changed = change(manifest)
    (tmp_path / "manifest.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert len(caught.value.problems) == 1, name
