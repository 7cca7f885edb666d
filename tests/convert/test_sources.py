"""What is read as a source: file names, shards, names of tensors, 8 steps, no voices."""

import json
from pathlib import Path

import numpy as np
import pytest
from ppx.convert.bundle.inspect import read_contents
from ppx.convert.bundle.recipe_choice import make_recipe
from ppx.convert.errors import UserError
from ppx.convert.preparation import open_merged, plan
from ppx.convert.source.checkpoint import Checkpoint
from ppx.convert.source.source import fingerprint, locate, open_source
from safetensors.torch import save_file
from sources import INDEX, base_moshi, copy_of, edit_config, keep_apart, rename, shard, weights


def read_all(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.read(name, 0, tensor.spec.rows) for name, tensor in checkpoint.tensors.items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n].view("u2"), other[n].view("u2")) for n in one)


@pytest.fixture(scope="module")
def moshi(tmp_path_factory) -> Path:
    return base_moshi(tmp_path_factory.mktemp("moshi") / "moshiko")


@pytest.fixture
def moshi_copy(moshi, tmp_path) -> Path:
    return copy_of(moshi, tmp_path / "copy")


@pytest.fixture(scope="module")
def of_pico(pico):
    with open_source(locate(str(pico))) as source:
        return read_all(source.checkpoint)


def problems(folder: Path) -> list[str]:
    with pytest.raises(UserError) as caught, open_source(locate(str(folder))):
        pass
    return [str(problem) for problem in caught.value.problems]


def test_base_moshi_has_8_steps_and_no_voices(moshi):
    with open_source(locate(str(moshi))) as source:
        assert (source.architecture.steps, source.architecture.n_q, source.voices) == (8, 16, [])
        stored = weights(moshi)
        assert source.checkpoint.tensors.keys() == stored.keys()
        assert set(fingerprint(source)) == {path.name for path in moshi.iterdir()}


def test_a_config_without_sizes_leaves_the_steps_to_the_checkpoint(moshi_copy, monkeypatch):
    from ppx.convert.source import architecture as sizes

    small = sizes.from_config(json.loads((moshi_copy / "config.json").read_text()))
    given = {name: getattr(small, name) for name in small.__dataclass_fields__ if name != "steps"}
    monkeypatch.setattr("ppx.convert.source.source.sizes_of", lambda _: sizes.Architecture(**given))
    (moshi_copy / "config.json").unlink()  # as in repositories from before there was one
    with open_source(locate(str(moshi_copy))) as source:
        assert source.architecture.steps == 8
        assert "config.json" not in fingerprint(source)
    with open_source(locate(str(moshi_copy)), fill_depformer_steps=True) as source:
        assert source.architecture.steps == 16


def test_8_steps_where_config_json_says_16_are_no_choice_of_ours(moshi_copy):
    edit_config(moshi_copy, lambda config: config | {"dep_q": 16})
    (line,) = problems(moshi_copy)
    assert "has 8 depformer steps, as base Moshi does; config.json says 16 (dep_q)" in line


@pytest.mark.parametrize("sharded", [False, True])
def test_projections_that_are_stored_apart_are_the_same_tensors(sharded, pico_copy, of_pico):
    apart = keep_apart(pico_copy)
    assert len(apart) == 2 * (2 + 2 * 16)  # layers: 2 temporal, 2 of the depformer
    if sharded:
        shard(pico_copy)
    with open_source(locate(str(pico_copy))) as source:
        checkpoint = source.checkpoint
        assert same(read_all(checkpoint), of_pico)
        name = "depformer.layers.0.self_attn.in_proj_weight"  # rows across the borders of steps
        height = len(of_pico[name]) // 16
        across = checkpoint.read(name, height - 3, 2 * height + 5)
        assert np.array_equal(across.view("u2"), of_pico[name][height - 3 : 2 * height + 5].view("u2"))
        few = checkpoint.trimmed(8)
        assert np.array_equal(few.read(name, 0, 8 * height).view("u2"), of_pico[name][: 8 * height].view("u2"))


def test_of_projections_apart_every_tensor_is_accounted_for(pico_copy):
    keep_apart(pico_copy)
    stored = weights(pico_copy)
    stem = "depformer.layers.1.self_attn"
    stored[f"{stem}.in_projs.16.weight"] = stored[f"{stem}.in_projs.0.weight"].clone()
    del stored[f"{stem}.out_projs.3.weight"]
    stored[f"{stem}.in_projs.5.weight"] = stored[f"{stem}.in_projs.5.weight"].float()
    stored[f"{stem}.in_projs.6.weight"] = stored[f"{stem}.in_projs.6.weight"][:-1].clone()
    first = "transformer.layers.0.self_attn"
    stored[f"{first}.in_proj_weight"] = stored[f"{first}.in_projs.0.weight"].clone()
    save_file(stored, pico_copy / "model.safetensors")
    lines = problems(pico_copy)
    assert f"{stem}.in_projs.16.weight: unknown, no part of this architecture claims it" in lines
    assert f"{stem}.out_projs.3.weight: missing" in lines
    assert f"{stem}.in_proj_weight: its parts are BF16 and F32: one dtype is needed" in lines
    assert any(line.startswith(f"{stem}.in_projs.6.weight: shape ") for line in lines)
    twice = f"{first}.in_proj_weight: is there twice, also as {first}.in_projs.0.weight: delete one of them"
    assert twice in lines
    assert len(lines) == 6


def test_shards_are_read_as_one_file(pico_copy, of_pico):
    placed = shard(pico_copy)
    with open_source(locate(str(pico_copy))) as source:
        assert same(read_all(source.checkpoint), of_pico)
        shards = source.location.files.weights
        assert shards == tuple(sorted(set(placed.values())))
        prints = fingerprint(source)
        assert {*shards, INDEX} < set(prints)
        assert source.checkpoint.file.nbytes == sum((pico_copy / name).stat().st_size for name in shards)
        path = pico_copy / shards[1]
        path.write_bytes(path.read_bytes())
        with pytest.raises(UserError, match=f"{shards[1]}: changed while it was converted"):
            source.check_unchanged("converted")
    inspected = read_contents(pico_copy)
    assert (inspected.missing, len(inspected.voices)) == ([], 18)
    components = {row.component for row in inspected.components()}
    assert components == {"temporal", "depformer", "embeddings", "heads", "codec", "model"}
    assert sum(tensor.component == "other" for tensor in inspected.tensors) == 0


def test_a_plan_of_shards_is_that_of_one_file(pico, pico_copy):
    shard(pico_copy)
    plans = [plan(folder, make_recipe("moshi-q4")) for folder in (pico, pico_copy)]
    assert plans[0].nbytes == plans[1].nbytes
    assert [o.name for o in plans[0].outputs] == [o.name for o in plans[1].outputs]


def test_an_index_must_say_what_is_in_the_shards(pico_copy):
    placed = shard(pico_copy)
    index, names = pico_copy / INDEX, sorted(set(placed.values()))
    moved, unnamed = sorted(placed)[0], sorted(placed)[1]
    changed = dict(placed) | {moved: names[1], "nowhere.weight": names[2]}
    del changed[unnamed]
    index.write_text(json.dumps({"weight_map": changed}))
    text = "\n".join(problems(pico_copy))
    assert f"{moved}: is not in {names[1]}, which is named for it" in text
    assert f"{moved}: is in {names[0]} as well as in {names[1]}" in text
    assert f"nowhere.weight: is not in {names[2]}, which is named for it" in text
    assert f"{unnamed}: is in {placed[unnamed]}, and the index does not name it" in text
    index.write_text(json.dumps({"weight_map": placed}))
    (pico_copy / names[2]).unlink()
    with pytest.raises(UserError, match=f"{names[2]} not there; a source folder holds"):
        locate(str(pico_copy))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "../a.safetensors"}}', "not the plain name of a safetensors file: do not trust"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not the plain name of a safetensors file"),
        ('{"weight_map": {"a": "model.bin"}}', "not the plain name of a safetensors file"),
        ('{"weight_map": {"a": 3}}', "not the plain name of a safetensors file"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("[]", "has no weight_map"),
        ('{"weight_map": ', "not readable as JSON"),
        (json.dumps({"weight_map": {str(n): f"m-{n}.safetensors" for n in range(600)}}), "lists 600 shards: at most"),
    ],
)
def test_an_index_is_not_trusted(text, message, pico_copy):
    (pico_copy / "model.safetensors").unlink()
    (pico_copy / INDEX).write_text(text)
    with pytest.raises(UserError, match=message):
        locate(str(pico_copy))


def test_config_json_names_the_files(moshi, moshi_copy):
    names = {"moshi_name": "consolidated.safetensors", "mimi_name": "mimi-x.safetensors", "tokenizer_name": "t.model"}
    rename(moshi_copy, **names)
    with open_source(locate(str(moshi))) as one, open_source(locate(str(moshi_copy))) as other:
        assert same(read_all(one.checkpoint), read_all(other.checkpoint))
        assert set(fingerprint(other)) == {*names.values(), "config.json"}
    contents = read_contents(moshi_copy)
    assert (contents.missing, contents.voices) == ([], [])
    assert {tensor.component for tensor in contents.tensors if tensor.file == "mimi-x.safetensors"} == {"codec"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"moshi_name": "../model.safetensors"}, "moshi_name is '../model.safetensors': not a plain file name"),
        ({"mimi_name": "/tmp/x.safetensors"}, "not a plain file name: do not trust this source"),
        ({"tokenizer_name": ".hidden"}, "not a plain file name"),
        ({"tokenizer_name": 7}, "tokenizer_name is 7: not a plain file name"),
        ({"moshi_name": "model.pth"}, "only safetensors files are read"),
        ({"mimi_name": "hf://kyutai/moshiko/m.safetensors"}, "a file of another repository: put it into the folder"),
        ({"mimi_name": "model.safetensors"}, "gives two files the same name"),
    ],
)
def test_names_in_config_json_are_not_trusted(names, message, moshi_copy):
    edit_config(moshi_copy, lambda config: config | names)
    with pytest.raises(UserError) as caught:
        locate(str(moshi_copy))
    assert message in str(caught.value)


def test_weights_that_want_an_adapter_are_not_converted_without(moshi_copy):
    edit_config(moshi_copy, lambda config: config | {"lora": True, "lora_name": "lora.safetensors"})
    with pytest.raises(UserError, match=r"the model is these weights with lora\.safetensors added: give its file as"):
        open_merged(locate(str(moshi_copy)), None)


def test_speech_swift_says_how_8_steps_become_16(program, moshi, tmp_path):
    done = program("ppx-convert", moshi, "--dry-run", cwd=tmp_path, status=2)
    assert "speech-swift loads a depformer of 16 steps, not 8: the targets moshi-mlx and mlx load fewer" in done.stderr
    assert "--fill-depformer-steps copies steps 0-7 to 8-15" in done.stderr
    done = program("ppx-convert", moshi, "--fill-depformer-steps", "--dry-run", cwd=tmp_path)
    assert "no voices, as the source has none: the library then speaks in whatever voice the model" in done.stdout


def test_a_bundle_is_not_a_source(bundle):
    with pytest.raises(UserError, match="is a bundle, which is made from a source"):
        locate(str(bundle("--recipe", "moshi-q4")))
