"""The model card: read back with the Hub's own classes."""

import collections
import copy
import dataclasses
import json
import math
import re
import shutil
import tomllib
from collections.abc import Sequence
from typing import Any

import pytest
from hub_server import running
from huggingface_hub import ModelCard
from ppx.convert.bundle import moshi_mlx, shipped
from ppx.convert.bundle.describe import count, size
from ppx.convert.bundle.manifest import Manifest
from ppx.convert.bundle.plan import inventory_of_7b, make_plan
from ppx.convert.bundle.records import RecipeRecord, TensorRecord
from ppx.convert.bundle.run_memory import memory_of
from ppx.convert.bundle.targets import TARGETS
from ppx.convert.errors import UserError
from ppx.convert.source.license import NVIDIA, License, from_json, license_of
from ppx.model.tokens import SELF_GENERATED
from ppx.recipes.cli import convert
from ppx.verify import report as reports
from ppx.verify.limits import failure
from ppx.verify.publishing import card
from ppx.verify.records import Report, Verdict
from typer.testing import CliRunner

SOURCE = {"id": "nvidia/personaplex-7b-v1", "revision": "c0ffee" + "0" * 34}
FINE_TUNE: dict[str, Any] = {"id": "someone/tune", "revision": "0" * 40, "license": {"license": "cc-by-nc-4.0"}}


@pytest.fixture(scope="module")
def verified(program, pico, tmp_path_factory):
    """A folder with a bundle that was verified."""
    folder = tmp_path_factory.mktemp("made")
    program("ppx-convert", pico, "--verify", "-o", "bundle", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def made(verified):
    """Manifest and report of a bundle."""
    return json.loads((verified / "bundle" / "manifest.json").read_text()), reports.read(verified / "bundle")


def rendered(
    made: tuple[dict[str, Any], Report],
    repository: str = "me/mine",
    objections: Sequence[str] = (),
    target: str | None = None,
    base_model: str | None = None,
    **source: object,
) -> tuple[ModelCard, str]:
    """A card and a notice, as if the bundle had another source."""
    manifest, report = copy.deepcopy(made)
    manifest["source"] |= SOURCE | {"license": vars(NVIDIA)} | source
    manifest["target"] = target or manifest["target"]
    texts = card.files(Manifest.from_json(manifest), report, repository, objections, base_model)
    return ModelCard(texts["README.md"]), texts["NOTICE"]


def test_what_the_hub_reads(made):
    found, notice = rendered(made)
    data = found.data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "nvidia-open-model-license"
    assert data["license_link"].startswith("https://www.nvidia.com/")
    assert data["base_model"] == [SOURCE["id"]] or data["base_model"] == SOURCE["id"]
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "mlx"
    assert data["pipeline_tag"] == "audio-to-audio"
    assert {"mlx", "personaplex", "speech-swift", "4-bit"} <= set(data["tags"])
    assert "Licensed by NVIDIA Corporation under the NVIDIA Open Model License" in notice
    assert "CC BY 4.0" in notice
    assert "Licensed by NVIDIA Corporation under the NVIDIA Open Model License" in found.text


def test_the_hub_takes_it(made, monkeypatch):
    with running() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        rendered(made)[0].validate()
        assert hub.log[0][:2] == ("POST", "/api/validate-yaml")
        with pytest.raises(ValueError, match="no license"):
            ModelCard("---\nlanguage: en\n---\n").validate()


def test_a_fine_tune_that_is_not_for_commerce_says_so(made):
    found, notice = rendered(made, **FINE_TUNE)
    assert found.data["license"] == "cc-by-nc-4.0"
    assert found.data.get("license_name") is None
    assert "**Not for commercial use:**" in found.text
    assert "Commercial use is not allowed." in notice
    assert "**Not for commercial use:**" not in rendered(made)[0].text


def test_a_source_without_a_license(made):
    found, notice = rendered(made, id="my-folder", revision=None, license=None)
    assert found.data["license"] == "unknown"
    assert "The source names no license. Ask its authors before you use it." in found.text
    assert found.data.get("base_model") is None
    assert "base_model_relation" not in found.data.to_dict()
    assert "unknown" in notice


def test_the_demo_says_that_it_is_one(made):
    found, notice = rendered(made, id="demo", revision=None, license={"license": "mit"})
    assert found.data["license"] == "mit"
    assert "**The weights are made up**" in found.text
    assert "NVIDIA" not in notice


def test_another_license_is_not_called_nvidias(made):
    found, notice = rendered(made, id="kyutai/moshiko", license={"license": "cc-by-4.0"})
    assert "NVIDIA" not in notice + found.text
    assert "Derived from Moshi by Kyutai" in notice


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("speech-swift", 'PersonaPlexModel.fromPretrained(modelId: "me/mine")'),
        ("moshi-mlx", "python -m personaplex_mlx.local -q 4 --hf-repo me/mine"),
        ("moshi-mlx", "python -m moshi_mlx.local -q 4 --hf-repo me/mine"),
        ("mlx", 'snapshot_download("me/mine")'),
    ],
)
def test_how_it_is_loaded(target, said, made):
    text = rendered(made, target=target)[0].text
    assert said in text
    assert f"It loads in {TARGETS[target].programs}, and in `ppx-speak`" in text
    fallback = "ppx-speak me/mine question.wav --output answer.wav\n"
    assert fallback in text
    assert text.index(said) < text.index(fallback)


LOCAL: dict[str, Any] = {"id": "my-folder", "revision": None, "license": None}
ADAPTER: dict[str, Any] = {"rank": 4, "scaling": 2.0, "size": 1, "sha256": "ab" * 32, "merged": ["out_norm.alpha"]}
LOCAL_ADAPTER = ADAPTER | {"id": "lora.safetensors", "revision": None}
HUB_ADAPTER = ADAPTER | {"id": "someone/lora", "revision": "1" * 40}


@pytest.mark.parametrize(
    ("source", "named", "bases", "name"),
    [
        ({}, None, [SOURCE["id"]], "personaplex-7b-v1"),
        (FINE_TUNE, None, ["someone/tune"], "tune"),
        (LOCAL, None, None, "my-folder"),
        (LOCAL, "me/talker", ["me/talker"], "talker"),
        ({"adapter": HUB_ADAPTER}, None, [SOURCE["id"], "someone/lora"], "lora"),
        ({"adapter": LOCAL_ADAPTER}, "me/lora", [SOURCE["id"], "me/lora"], "lora"),
        (LOCAL | {"adapter": HUB_ADAPTER}, "me/talker", ["me/talker", "someone/lora"], "lora"),
        (LOCAL | {"adapter": LOCAL_ADAPTER}, "me/talker", ["me/talker"], "talker"),
    ],
)
def test_title_and_base_model_are_the_fine_tunes(source, named, bases, name, made):
    found, _ = rendered(made, base_model=named, **source)
    data = found.data.to_dict()
    held = data.get("base_model")
    assert ([held] if isinstance(held, str) else held) == bases
    assert data.get("base_model_relation") == ("quantized" if bases else None)
    assert found.text.lstrip().startswith(f"# {name}, 4 bit, for speech-swift\n")
    if named:
        assert f"[{named}](https://huggingface.co/{named}) for Apple Silicon" in found.text


@pytest.mark.parametrize(
    ("source", "named", "message"),
    [
        ({}, "me/talker", "me/talker: not the base model: the bundle was made from nvidia/personaplex-7b-v1"),
        ({"adapter": HUB_ADAPTER}, "me/talker", "made from nvidia/personaplex-7b-v1 and someone/lora"),
        (LOCAL | {"id": "demo"}, "me/talker", "not the base model of demo"),
        (LOCAL, "talker", "talker: not the name of a base model: give USER/NAME"),
        (LOCAL, "me/x](javascript:alert)", "not the name of a base model"),
        (LOCAL, "me/x\nlicense: mit", "not the name of a base model"),
    ],
)
def test_base_models_that_are_refused(source, named, message, made):
    with pytest.raises(UserError, match=re.escape(message)):
        rendered(made, base_model=named, **source)


def test_quality_comes_before_hashes(made):
    text = rendered(made, **LOCAL, adapter=LOCAL_ADAPTER)[0].text
    first_hash = re.search("[0-9a-f]{64}", text)
    assert first_hash
    assert text.index("plain rounding at the same bits") < text.index("## Use")
    assert text.index("## Use") < text.index("## Quality") < text.index("| KL of text |") < first_hash.start()


def test_8_bit_stands_beside_it_where_it_was_computed(made):
    manifest, report = made
    assert "8 bit" not in rendered(made)[0].text
    agent = report.predictions["agent"]
    streams = {
        name: dataclasses.replace(stream, controls={"8": stream.noise}) for name, stream in report.predictions.items()
    }
    hidden = dataclasses.replace(report.hidden, controls={"8": report.hidden.noise})
    text = rendered((manifest, dataclasses.replace(report, predictions=streams, hidden=hidden)))[0].text
    assert "| figure | this bundle | plain rounding | 8 bit | limit | noise floor |" in text
    row = next(line for line in text.splitlines() if line.startswith("| KL of the agent"))
    assert row.split(" | ")[3] == reports.short(agent.noise.kl.mean)
    assert " times as much as 8 bit of the same checkpoint." in text


def test_parameters_and_memory_have_units_that_fit(made):
    manifest, _ = made
    text = rendered(made)[0].text
    assert "4.59 million parameters" in text
    memory = memory_of(Manifest.from_json(manifest))
    assert f"A conversation takes about {size(memory.total)} of memory, computed" in text


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (8_371_408_896, "8.37 billion"),
        (31_200_000, "31.2 million"),
        (999_600_000, "1 billion"),
        (999_400_000, "999 million"),
        (4_589_056, "4.59 million"),
        (12_345, "12.3 thousand"),
        (999, "999"),
        (0, "0"),
        (1_234_000_000_000, "1,234 billion"),
    ],
)
def test_counts(parameters, expected):
    assert count(parameters) == expected


def test_it_says_all_that_the_report_and_the_manifest_prove(made):
    manifest, report = made
    text = rendered(made)[0].text
    assert "**Intact: " in text
    for row in reports.figures(report):
        assert f"| {row.name} | {reports.short(row.bundle)} | {reports.short(row.control)} | {row.sign} " in text
    for name, record in {**manifest["files"], **manifest["source"]["files"]}.items():
        assert name in text
        assert record["sha256"] in text
    assert SOURCE["revision"] in text
    assert f"ppx-convert {manifest['toolkit']['version']}" in text
    assert ", ".join(manifest["voices"]) in text
    recipe = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)[0]
    assert "lsq" in manifest["recipe"]["text"]
    assert tomllib.loads(recipe) == tomllib.loads(manifest["recipe"]["text"].replace("lsq", "mse"))


def test_the_command_makes_the_same_bundle_again(made, program, pico, tmp_path):
    manifest, report = made
    text = card.files(Manifest.from_json(manifest), report)["README.md"]
    (tmp_path / "recipe.toml").write_text(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)[0])
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / manifest["source"]["id"]).symlink_to(pico)
    command = re.findall(r"```sh\n(ppx-convert .*)\n```", text)[0].split()
    program(*command, cwd=tmp_path)
    again = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert again["files"] == manifest["files"]


def test_a_bundle_of_an_earlier_version_has_a_card(made):
    manifest, report = copy.deepcopy(made)
    del manifest["calibration"], manifest["source"]["adapter"], manifest["source"]["license"]
    assert "The source names no license." in card.files(Manifest.from_json(manifest), report)["README.md"]


def test_what_it_was_quantized_by(made):
    manifest, report = copy.deepcopy(made)
    record = {"kind": "tokens", "file": "my talks.safetensors", "sequences": 7, "frames": 250, "sha256": "ab" * 32}
    manifest["calibration"] = record | {"refined_steps": 600}
    text = card.files(Manifest.from_json(manifest), report)["README.md"]
    assert "tokens (my talks.safetensors): 7 sequences of 250 frames" in text
    assert "refined for 600 steps" in text
    assert "--tokens 'my talks.safetensors' --refine 600" in text


def test_sampled_calibration_is_sampled_again(made):
    """Nobody else has the file, which a conversion without --tokens makes."""
    manifest, report = copy.deepcopy(made)
    record = {
        "kind": SELF_GENERATED,
        "file": "out.spoken.safetensors",
        "sequences": 108,
        "frames": 250,
        "sha256": "ab" * 32,
    }
    manifest["calibration"] = record | {"refined_steps": 600}
    text = card.files(Manifest.from_json(manifest), report)["README.md"]
    assert "out.spoken.safetensors" not in text
    assert "--tokens" not in text
    assert "--refine 600" in text
    assert "samples the calibration sequences from the source's model again" in text
    manifest["calibration"] |= {"sequences": 12}  # those of a file that ppx-calibrate made
    text = card.files(Manifest.from_json(manifest), report)["README.md"]
    assert "--tokens out.spoken.safetensors" in text
    assert "`out.spoken.safetensors` is not part of these files" in text


def test_the_bits_of_mixed_are_those_of_most_weights(made):
    """At 7B most tensors have 6 bit, most weights 5."""
    plan = make_plan(inventory_of_7b(SOURCE["id"]), shipped.load("mixed"))
    tensors: collections.Counter[int] = collections.Counter()
    weights: collections.Counter[int] = collections.Counter()
    entries = []
    for output in plan.outputs:
        if output.quantization:
            tensors[output.quantization.bits] += 1
            weights[output.quantization.bits] += math.prod(output.shape)
            names = [spec.name for spec in output.specs()]
            entries.append(
                TensorRecord("file", output.role.name, output.rows, tuple(names), **vars(output.quantization))
            )
    assert tensors.most_common(1)[0][0] == 6
    assert weights.most_common(1)[0][0] == 5
    manifest = Manifest.from_json(made[0])
    manifest = dataclasses.replace(manifest, architecture=plan.inventory.architecture, tensors=tuple(entries))
    assert card.bits_of(manifest) == 5
    assert len({file.name for file in plan.files if file.outputs}) == 2  # which the example must load


def test_the_example_loads_all_shards(pico, tmp_path, monkeypatch):
    """As at 7B, where ``mixed`` has two."""
    monkeypatch.setattr(moshi_mlx, "SHARD", 1 << 20)
    arguments = [str(pico), "--recipe", "mixed", "--no-verify", "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(convert.app, arguments).exit_code == 0
    text = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _: str(tmp_path / "out"))
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], found)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len({entry["file"] for entry in manifest["tensors"] if "outputs" in entry}) > 1
    assert found["weights"].keys() == {name for entry in manifest["tensors"] for name in entry.get("outputs", ())}


def test_a_bundle_that_was_not_compared_or_fails(made):
    manifest, report = copy.deepcopy(made)
    checked = Manifest.from_json(manifest)
    assert "It was not compared with the original." in card.files(checked, None)["README.md"]
    failed = Verdict(passed=False, failures=(failure("predictions", "text", "x", limit="text_kl"),))
    report = dataclasses.replace(report, verdict=failed)
    text = card.files(checked, report, objections=["its report fails: x"])["README.md"]
    assert "**Not intact: " in text
    assert text.index("Published with `--force`") < text.index("# Use")


def test_converting_again_without_verification_keeps_what_the_card_proves(verified, program, pico, tmp_path):
    shutil.copytree(verified / "bundle", tmp_path / "bundle")
    card_of, report = tmp_path / "bundle" / "README.md", tmp_path / "bundle" / "parity" / "report.json"
    before = card_of.read_text()
    assert "**Intact: " in before
    program("ppx-convert", pico, "-o", "bundle", cwd=tmp_path)  # with --no-verify
    assert card_of.read_text() == before
    report.write_text(report.read_text().replace('"sha256": "', '"sha256": "0'))  # of other files
    program("ppx-convert", pico, "-o", "bundle", cwd=tmp_path)
    assert "It was not compared with the original." in card_of.read_text()
    report.write_text("{}")
    program("ppx-convert", pico, "-o", "bundle", cwd=tmp_path)
    assert "It was not compared with the original." in card_of.read_text()


def test_strangers_strings_command_neither_yaml_nor_markdown(made):
    evil = "x](javascript:alert)<script>\u202e```|\n---\nlicense: mit\n# "
    manifest, report = copy.deepcopy(made)
    manifest["source"]["license"] = {"license": "a: [b", "license_name": "c\nd", "license_link": "img src=x"}
    checked = Manifest.from_json(manifest)
    with pytest.raises(ValueError, match=r"target is .*: a line of printable text is needed"):
        Manifest.from_json(manifest | {"target": evil})  # which is why the rest is set behind its back
    whole = next(iter(checked.files.values()))
    checked = dataclasses.replace(
        checked,
        source=dataclasses.replace(checked.source, id=evil, files={evil: whole}),
        voices=(evil,),
        recipe=RecipeRecord(evil, "description = 'x'\n```\n<script>\n"),
        target=evil,
    )
    report = dataclasses.replace(report, tokens=dataclasses.replace(report.tokens, kind=evil))
    found = ModelCard(card.files(checked, report, "me/mine", [evil])["README.md"])
    assert found.data["license"] == "a: [b"
    outside = re.sub(r"```.*?```", "", found.text, flags=re.DOTALL)
    assert "<script>" not in outside
    assert "\nlicense: mit" not in outside
    assert "javascript:alert)" not in outside
    assert "\u202e" not in found.text
    assert len(re.findall("^```", found.text, re.MULTILINE)) % 2 == 0
    assert len(found.text.split("\n---\n")) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", License("apache-2.0")),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n", License("other", "own", "LICENSE")),
        ("# no front matter", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: {{{\n---\n", None),
        ("---\n- a\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.system ['false']\n---\n", None),
        ("---\nlicense: 'a\\u202eb'\n---\n", License("a\\u202eb")),
        ('---\nlicense: "a\\u202eb"\n---\n', None),
        ("---\nlicense: " + "x" * 400 + "\n---\n", None),
        (None, None),
    ],
)
def test_licenses_of_source_cards(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == expected


def test_licenses_that_forbid_commerce():
    assert License("cc-by-nc-sa-4.0").non_commercial
    assert License("other", "Foo Non-Commercial License").non_commercial
    assert not License("cc-by-4.0").non_commercial
    assert not NVIDIA.non_commercial
    assert from_json([]) is None
