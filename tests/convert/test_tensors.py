"""Names and shapes at full size, against the layouts of the real files."""

import json
from contextlib import closing
from typing import Any

import pytest
from ppx.convert.bundle import shipped
from ppx.convert.bundle.build import specs_of
from ppx.convert.bundle.plan import Plan, inventory_of_7b, make_plan
from ppx.convert.bundle.recipe import uniform
from ppx.convert.errors import UserError
from ppx.convert.source.architecture import Architecture, from_config, read_config, to_config
from ppx.convert.source.tensors import COMPONENTS, roles
from ppx.convert.tensorfile import TensorFile
from ppx.quant.affine import QuantizationConfig

LONG = {"U32": "uint32", "BF16": "bfloat16", "F16": "float16"}


def test_every_name_of_the_real_checkpoint_has_one_role(layout):
    real = {name: tuple(shape) for name, (_, shape) in layout("source").items()}
    assert {name: role.shape for name, role in roles(Architecture()).items()} == real
    assert len(real) == 475
    assert {role.component for role in roles(Architecture()).values()} == set(COMPONENTS)


def test_pico_is_of_its_configs_architecture(pico):
    architecture = from_config(read_config(pico / "config.json"))
    with closing(TensorFile(pico / "model.safetensors")) as file:
        found = {name: spec.shape for name, spec in file.specs.items()}
    assert {name: role.shape for name, role in roles(architecture).items()} == found


def planned(recipe: str) -> tuple[Plan, dict[str, dict[str, Any]]]:
    plan = make_plan(inventory_of_7b("nvidia/personaplex-7b-v1"), shipped.load(recipe))
    return plan, {
        file.name: {spec.name: [spec.dtype, list(spec.shape)] for output in file.outputs for spec in output.specs()}
        for file in plan.files
        if file.outputs
    }


def test_speech_swift_layout_at_full_size(layout):
    real = layout("speech-swift.4bit-g64")
    plan, files = planned("4bit")
    assert files == {name: tensors for name, tensors in real.items() if not name.startswith("voices/")}
    voice = next(file for file in plan.files if file.name == "voices/NATF0.safetensors")
    assert {spec.name: [spec.dtype, list(spec.shape)] for spec in specs_of(plan, voice)} == real[voice.name]
    assert plan.bits_per_weight == pytest.approx(5.18, abs=0.01)


@pytest.mark.parametrize(("recipe", "name"), [("moshi-q4", "model.q4"), ("moshi-q8", "model.q8"), ("bf16", "model")])
def test_moshi_mlx_layout_at_full_size(recipe, name, layout):
    _, files = planned(recipe)
    assert list(files) == [f"{name}.safetensors"]
    found = {tensor: [LONG[dtype], shape] for tensor, (dtype, shape) in files[f"{name}.safetensors"].items()}
    assert found == layout(f"personaplex-mlx.{name}.safetensors")


def test_mlx_layout_at_full_size(layout):
    """The names and shapes that moshi_mlx knows, in shards, with the same setting for all."""
    components = ("temporal", "depformer", "embeddings", "heads")
    plan = make_plan(inventory_of_7b("x/y"), uniform(QuantizationConfig(8, 64), "mlx", "bfloat16", components))
    shards = [file for file in plan.files if file.outputs]
    assert [file.name for file in shards] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert max(file.nbytes for file in shards) < 5.01 * 2**30
    found = {s.name: [LONG[s.dtype], list(s.shape)] for file in shards for o in file.outputs for s in o.specs()}
    assert found == layout("personaplex-mlx.model.q8.safetensors")
    index = json.loads(next(file.text for file in plan.files if file.name.endswith("index.json")))
    assert index["weight_map"] == {s.name: f.name for f in shards for o in f.outputs for s in o.specs()}


def test_a_config_survives_the_way_there_and_back(pico):
    architecture = from_config(read_config(pico / "config.json"))
    assert from_config(to_config(architecture)) == architecture
    assert from_config({"model_type": "personaplex"}) == Architecture()


def test_a_missing_feedforward_width_follows_from_the_scale():
    config = to_config(Architecture()) | {"depformer_dim_feedforward": None}
    assert from_config(config) == Architecture()


def test_all_mistakes_of_a_config_are_listed():
    config = to_config(Architecture()) | {
        "dim": "4096",
        "num_layers": 0,
        "gating": "gelu",
        "delays": [0, 1],
        "hidden_scale": -1,
    }
    del config["card"]
    with pytest.raises(UserError) as caught:
        from_config(config)
    for key in ("dim is '4096'", "num_layers is 0", "card is None", "gating is 'gelu'", "delays has 2", "hidden_scale"):
        assert any(key in problem.message for problem in caught.value.problems), key


@pytest.mark.parametrize(
    "odd",
    [
        {"num_layers": 1 << 20},
        {"dep_q": 1 << 20},
        {"dim": True},
        {"dim": 4096.0},
        {"depformer_dim_feedforward": 1},
        {"hidden_scale": float("nan")},
        {"delays": [True] * 17},
        {"gating": {"a": []}},
    ],
)
def test_absurd_sizes_are_refused_at_once(odd):
    with pytest.raises(UserError, match=next(iter(odd))):
        from_config(to_config(Architecture()) | odd)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00", "[" * 100000])
def test_a_config_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="download it again"):
        read_config(tmp_path / "config.json")
