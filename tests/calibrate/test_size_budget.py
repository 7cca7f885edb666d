"""Bits where they matter: what is measured, against the model run at once, and the recipes that come of it."""

import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ppx.calibrate import measurement, sensitivity, weight_only
from ppx.calibrate.allocation import AllocationRequest, Budget, best_recipe, check_budget, size_of, smallest_plan
from ppx.calibrate.kept_measurement import KeptMeasurement
from ppx.calibrate.sensitivity import TensorGroup
from ppx.convert import preparation
from ppx.convert.bundle import shipped
from ppx.convert.bundle.plan import make_plan
from ppx.convert.bundle.recipe import uniform
from ppx.convert.errors import UserError
from ppx.convert.source.source import Source, locate, open_source
from ppx.convert.source.tensors import COMPONENTS, roles
from ppx.model.forward import Tokens
from ppx.model.reference import reference_of
from ppx.model.tokens import TokenSet, read_tokens
from ppx.quant.affine import BITS, QuantizationConfig, dequantize, quantize
from safetensors.numpy import load_file, save_file
from stopping import Moment

SCALES = np.dtype(np.float32)


@pytest.fixture(scope="module")
def few(pico, tmp_path_factory):
    """A file of some calibration sequences."""
    path = tmp_path_factory.mktemp("few") / "tokens.safetensors"
    save_file({"tokens": load_file(pico / "calibration_tokens.safetensors")["tokens"][:6, :, :60].copy()}, path)
    return path


@pytest.fixture(scope="module")
def held(program, pico, few, tmp_path_factory):
    """What the program measures, in a file."""
    folder = tmp_path_factory.mktemp("held")
    options = ("--tokens", few, "--bits-per-weight", "4.5", "-o", "a.toml", "--plot", "a.svg")
    done = program("ppx-allocate", pico, *options, cwd=folder)
    assert done.stdout.startswith("4.5bpw: ")
    assert done.stdout.endswith("measured on 6 of 6 sequences of 60 frames\n")
    assert "temporal self_attn.* layer 1" in (folder / "a.svg").read_text()
    return folder / "a.sensitivity.json"


@pytest.fixture(scope="module")
def measured(pico, few, held):
    """Pico, what it was measured on, and its sensitivities."""
    with open_source(locate(str(pico))) as source:
        yield source, read_tokens(few, source.architecture, None, None), sensitivity.read(held)


def rounded(values: torch.Tensor, bits: int, importance: NDArray[np.float64] | None = None) -> torch.Tensor:
    flat = np.ascontiguousarray(values.float().numpy().reshape(-1, values.shape[-1]))
    quantization = QuantizationConfig(bits, 64, "lsq")
    return torch.from_numpy(dequantize(quantize(flat, quantization, SCALES, importance), quantization)).reshape(
        values.shape
    )


def predictions(
    source: Source, token_set: TokenSet, altered: Callable[[str, int | None], bool] | None = None, bits: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the whole model, run at once; altered: tells of a tensor and step if it is quantized."""
    model = reference_of(source.checkpoint)

    class Altered:
        def weights(self, name: str, step: int | None) -> torch.Tensor:
            held, importance = model.weights(name, step), source.checkpoint.importance(name)
            return rounded(held, bits, importance) if altered and altered(name, step) else held

        def rows(self, name: str, tokens: Tokens) -> torch.Tensor:
            held = model.rows(name, tokens)
            return rounded(held, bits) if altered and altered(name, None) else held

    both = Altered()
    with torch.inference_mode():
        text, audio = replace(model, weights=both.weights, rows=both.rows).logits(
            token_set.tokens, token_set.targets, source.architecture.n_q // 2
        )
    return text.double().log_softmax(-1), audio.double().log_softmax(-1)


def divergence(reference: torch.Tensor, other: torch.Tensor, counted: NDArray[np.bool_]) -> float:
    return float((reference.exp() * (reference - other)).sum(-1)[torch.from_numpy(counted)].mean())


@pytest.mark.parametrize(
    ("part", "bits", "altered"),
    [
        (
            TensorGroup("temporal", "self_attn.*", layer=0),
            3,
            lambda name, _: name.startswith("transformer.layers.0.self_attn."),
        ),
        (
            TensorGroup("temporal", "gating.*", layer=1),
            4,
            lambda name, _: name.startswith("transformer.layers.1.gating."),
        ),
        (
            TensorGroup("depformer", "self_attn.*", step=2),
            2,
            lambda name, step: "depformer" in name and "self_attn" in name and step == 2,
        ),
        (TensorGroup("depformer", "gating.*", step=1), 4, lambda name, _: "depformer" in name and ".gating.1." in name),
        (TensorGroup("depformer", "depformer_in", step=0), 3, lambda name, _: name == "depformer_in.0.weight"),
        (TensorGroup("embeddings", "emb"), 3, lambda name, _: name.startswith("emb.")),
        (TensorGroup("embeddings", "depformer_emb"), 2, lambda name, _: name.startswith("depformer_emb.")),
        (TensorGroup("heads", "linears", step=3), 4, lambda name, _: name == "linears.3.weight"),
        (TensorGroup("heads", "text_linear"), 3, lambda name, _: name == "text_linear.weight"),
    ],
    ids=lambda value: "altered" if callable(value) else str(value),
)
def test_a_part_costs_what_the_whole_model_loses_by_it(part, bits, altered, measured):
    source, token_set, found = measured
    half = source.architecture.n_q // 2
    heard = token_set.counted[:, 1 : half + 1].all(1)
    text, audio = predictions(source, token_set)
    other_text, other_audio = predictions(source, token_set, altered, bits)
    cost = found.costs[part][bits]
    assert cost["text"] == pytest.approx(divergence(text, other_text, token_set.counted[:, 0]), rel=1e-3, abs=1e-7)
    agent = [divergence(audio[:, :, step], other_audio[:, :, step], heard) for step in range(half)]
    assert cost["agent"] == pytest.approx(np.mean(agent), rel=1e-3, abs=1e-7)
    assert sum(cost.values()) > 1e-4


class Bar:
    """A progress bar that counts."""

    def __init__(self, total: int) -> None:
        self.total, self.count, self.ended = total, 0, 0

    def update(self, more: int) -> None:
        self.count += more

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended += 1


def test_several_passes_measure_what_one_does(measured, monkeypatch):
    """With memory for two sequences at a time, as many are read as are asked for."""
    bars: list[Bar] = []

    def shown(_label: str, total: int, _unit: str, _quiet: bool) -> Bar:
        bars.append(Bar(total))
        return bars[-1]

    monkeypatch.setattr(measurement, "bar", shown)
    source, token_set, once = measured
    two = 2 * token_set.tokens.shape[2] * source.architecture.dim * 4
    memory = two * (1 + sum(part.component != "depformer" for part in once.costs))
    apart = measurement.measure(source, token_set, "mark", quiet=True, bits=[3], sequences=6, memory=memory)
    assert apart.measured_on == "6 of 6 sequences of 60 frames"
    assert [(one.count, one.ended) for one in bars] == [(one.total, 1) for one in bars] != []
    assert apart.errors == once.errors
    for part, costs in once.costs.items():
        assert apart.costs[part][3] == pytest.approx(costs[3], rel=1e-3, abs=1e-7), part


def test_a_part_whose_predictions_are_not_finite_is_named(measured, monkeypatch):
    """It would be the cheapest of all: max(0.0, nan) is 0.0."""
    source, token_set, _ = measured
    head = source.checkpoint.tensors["text_linear.weight"].role.shape

    def broken(weight, quantization, storage, importance):
        made = quantize(weight, quantization, storage, importance)
        return replace(made, scales=np.full_like(made.scales, np.nan)) if weight.shape == head else made

    monkeypatch.setattr(weight_only, "quantize", broken)
    with pytest.raises(UserError, match="heads text_linear at 2 bit: the text's predictions are not finite"):
        measurement.measure(source, token_set.chosen(np.array([0])), "mark", quiet=True, bits=[2])


def test_sequences_that_tell_nothing_of_the_agent_are_refused(measured):
    """Everything would cost it nothing."""
    source, token_set, _ = measured
    counted = token_set.counted.copy()
    counted[:, 3] = False
    with pytest.raises(UserError, match="the 1 sequences that were measured on have no known tokens of agent"):
        measurement.measure(
            source, replace(token_set.chosen(np.array([0])), counted=counted[:1]), "mark", True, bits=[2]
        )


def test_weights_that_cannot_be_quantized_are_named(measured):
    """Their inputs are always zero, so that the original is sound."""
    source, token_set, _ = measured
    gating, norm = "transformer.layers.0.gating.linear_in.weight", "transformer.layers.0.norm2.alpha"

    def altered(name, _, weights):
        found = weights.astype(np.float32)
        found[..., :2] = 0 if name == norm else [3e38, -3e38]
        return found

    checkpoint = source.checkpoint.with_adapter(altered, [gating, norm], source.checkpoint.file)
    with pytest.raises(UserError, match=f"{gating} at 2 bit .*too far apart"):
        measurement.measure(replace(source, checkpoint=checkpoint), token_set, "mark", quiet=True, bits=[2])


def test_every_tensor_that_the_agent_depends_on_is_in_a_part(measured):
    source, _, found = measured
    half = source.architecture.n_q // 2
    heard = {
        sensitivity.group_of(role, step)
        for role in roles(source.architecture).values()
        for step in (range(half) if role.stacked > 1 else [role.step])
        if role.kind != "norm" and (step is None or step < half)
    }
    assert set(found.costs) == set(found.errors) == heard
    for part, costs in found.costs.items():
        total = [sum(costs[bits].values()) for bits in BITS]
        assert total[0] > 3 * total[2] > 9 * total[-1], part


def test_other_group_sizes_cost_as_their_errors_grow(measured):
    found = measured[2]
    part = TensorGroup("temporal", "self_attn.*", layer=0)
    small, usual, large = (found.cost(part, QuantizationConfig(4, size, "lsq"))["agent"] for size in (32, 64, 128))
    assert small < usual < large
    assert usual == found.costs[part][4]["agent"]
    assert found.cost(part, None) == {"text": 0.0, "agent": 0.0}
    assert (
        found.cost(TensorGroup("temporal", "gating.*", layer=0), QuantizationConfig(4, 128, "lsq")) is None
    )  # does not divide its rows


def test_a_file_of_them_comes_back_as_it_was(measured, tmp_path):
    path = tmp_path / "s.json"
    sensitivity.write(measured[2], path)
    assert sensitivity.read(path) == measured[2]
    held = json.loads(path.read_text())
    for wrong in (
        "{",
        "[]",
        json.dumps(held | {"sensitivities": 2}),
        json.dumps(held | {"parts": [held["parts"][0] | {"divergence": {}}]}),
        json.dumps(held | {"parts": [held["parts"][0] | {"error": {}}]}),
        json.dumps(held | {"parts": [held["parts"][0] | {"layer": "0"}]}),
        path.read_text().replace(str(held["parts"][0]["divergence"]["4"]["text"]), "NaN", 1),
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match="not a file of sensitivities"):
            sensitivity.read(path)


def test_files_of_earlier_versions_are_read(tmp_path):
    earlier = Path(__file__).parents[1] / "data" / "earlier"
    whole, lacking = (sensitivity.read(earlier / name) for name in ("sensitivity.json", "sensitivity-lacking.json"))
    assert whole.measured_on == "2 of 2 sequences of 24 frames"
    assert lacking.measured_on == "2 sequences of 24 frames"
    assert list(lacking.costs) == list(whole.costs)[:2]
    assert all(lacking.costs[part] == whole.costs[part] for part in lacking.costs)
    sensitivity.write(whole, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (earlier / "sensitivity.json").read_bytes()


@pytest.mark.parametrize("budget", [Budget(None, 3.2), Budget(None, 4.5), Budget(3_400_000)], ids=str)
def test_a_recipe_is_within_its_budget_and_beats_uniform_ones(budget, measured):
    source, _, found = measured
    inventory = preparation.inventory(source)
    wanted = AllocationRequest(budget, "mlx", "float16", "lsq", 8)
    mixed = best_recipe(inventory, wanted, found)
    plan = make_plan(inventory, mixed.recipe)
    assert plan.nbytes == mixed.nbytes
    used = plan.nbytes if budget.nbytes else plan.bits_per_weight
    limit = budget.nbytes or budget.bits_per_weight
    assert limit is not None
    assert 0.985 * limit < used <= limit
    total = sum(mixed.expected.values())
    assert mixed.bound is not None
    assert 0.98 * total < mixed.bound <= total * (1 + 1e-9)  # the same sum in another order
    settings = {
        (output.quantization.bits, output.quantization.group_size) if output.quantization else None
        for output in plan.outputs
    }
    assert len(settings) > 3
    compared = 0
    for bits, group_size in filter(None, settings):
        quantization = QuantizationConfig(bits, group_size, "lsq")
        everything = {part: found.cost(part, quantization) for part in found.costs}
        if None not in everything.values():
            alike = make_plan(inventory, uniform(quantization, "mlx", "float16", COMPONENTS))
            if (alike.nbytes if budget.nbytes else alike.bits_per_weight) <= limit:
                assert total < sum(sum(cost.values()) for cost in everything.values())
                compared += 1
    assert compared


def test_what_is_kept_is_kept_and_the_users_steps_get_least(measured):
    source, _, found = measured
    inventory = preparation.inventory(source)
    kept = best_recipe(
        inventory, AllocationRequest(Budget(None, 7.0), "mlx", "float16", "lsq", None, ("embeddings", "heads")), found
    )
    for part, quantization in kept.settings.items():
        if part.component in ("embeddings", "heads"):
            assert quantization is None
        elif part.step is not None and part.step >= 8:
            assert quantization is not None
            assert quantization.bits == 2
    assert max(quantization.bits for quantization in kept.settings.values() if quantization) > 4


def test_targets_of_one_setting_get_the_best_that_they_load(measured):
    source, _, found = measured
    inventory = preparation.inventory(source)

    def chosen(target, bits_per_weight):
        recipe = best_recipe(
            inventory, AllocationRequest(Budget(None, bits_per_weight), target, "float16", "lsq"), found
        ).recipe
        return [
            (rule.quantization and (rule.quantization.bits, rule.quantization.group_size), rule.components)
            for rule in recipe.rules
        ]

    everything = ("temporal", "depformer", "embeddings", "heads")
    assert chosen("moshi-mlx", 6) == [((4, 32), everything)]
    assert chosen("moshi-mlx", 9) == [((8, 64), everything)]
    assert chosen("moshi-mlx", 17) == []
    assert chosen("speech-swift", 8)[0][1] in (("temporal",), ("temporal", "depformer"))
    with pytest.raises(UserError, match=r"smallest bundle for moshi-mlx is larger \(.*5\.\d\d bits per weight\)"):
        chosen("moshi-mlx", 4)
    with pytest.raises(UserError, match="smallest bundle for mlx is larger"):
        chosen("mlx", 1.5)


class Overrun(Budget):
    """A budget that headers overrun by a byte, however little is left for the weights, until a plan is small enough."""

    def left(self, plan):
        left = super().left(plan)
        return left if plan.nbytes < 2_030_000 else min(left, -1)


def test_what_the_smallest_bundle_fits_into_is_met(measured):
    """A search that overruns the budget many times must not end in the claim that nothing fits."""
    source, _, found = measured
    inventory = preparation.inventory(source)

    def within(budget):
        return best_recipe(inventory, AllocationRequest(budget, "mlx", "float16", "lsq"), found).nbytes

    with pytest.raises(UserError, match="is larger") as caught:
        within(Budget(1000))
    smallest = int(re.findall(r"(\d+) bytes", str(caught.value))[0])
    assert within(Budget(smallest)) == smallest
    with pytest.raises(UserError, match=f"is larger .*{smallest} bytes"):
        within(Budget(smallest - 1))
    assert smallest <= within(Overrun(2_050_000)) < 2_030_000


def test_sizes():
    assert [size_of(text) for text in ("5.3GB", "800 MB", "2 GiB", "12kB", "700")] == [
        5_300_000_000, 800_000_000, 2 << 30, 12_000, 700
    ]  # fmt: skip
    for text in ("", "GB", "5,3GB", "-1GB", "1e9", "5 TB"):
        with pytest.raises(UserError, match="not a size"):
            size_of(text)


def test_the_program_writes_a_recipe_and_keeps_what_it_measured(program, pico, few, held, tmp_path):
    before = held.read_bytes()
    common = ("ppx-allocate", pico, "--tokens", few, "--sensitivity", held, "--depformer-steps", "8")
    said = json.loads(program(*common, "--target-size", "2.2MB", "-o", "b.toml", "--json", cwd=tmp_path).stdout)
    assert said["bytes"] <= 2_200_000
    assert held.read_bytes() == before
    recipe = shipped.load(str(tmp_path / "b.toml"))
    assert "expected divergence" in recipe.description
    assert recipe.depformer_steps == 8
    program("ppx-convert", pico, "--recipe", "b.toml", "-o", "out", cwd=tmp_path)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sum(record["size"] for record in manifest["files"].values()) == said["bytes"]
    done = program("ppx-verify", "out", "--reference", pico, "--tokens", few, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)["predictions"]
    for stream in ("text", "agent"):
        assert 0.5 < found[stream]["bundle"]["kl"]["mean"] / said["expected"][stream] < 2


def test_the_program_refuses_what_contradicts_itself(program, pico, tmp_path):
    (tmp_path / "there.toml").write_text("")
    for options, words in (
        (("-o", "a.toml"), "no size is given"),
        (("--target-size", "1GB", "--bits-per-weight", "4", "-o", "a.toml"), "contradict"),
        (("--target-size", "1GB", "-o", "a.json"), ".toml file"),
        (("--target-size", "1GB", "-o", "there.toml"), "there already"),
        (("--target-size", "1GB", "--keep", "codec", "-o", "a.toml"), "component codec: cannot be kept float"),
    ):
        assert words in program("ppx-allocate", pico, *options, cwd=tmp_path, status=2).stderr
    assert not (tmp_path / "a.toml").exists()


def test_measurements_of_another_source_are_refused(program, pico, few, measured, tmp_path):
    sensitivity.write(replace(measured[2], fingerprint="another", source="another"), tmp_path / "held.json")
    given = ("--tokens", few, "--sensitivity", "held.json", "--bits-per-weight", "4", "-o", "a.toml")
    done = program("ppx-allocate", pico, *given, cwd=tmp_path, status=2)
    assert "measured on another source" in done.stderr


def test_measurements_are_used_without_their_tokens_and_refused_with_others(program, pico, few, held, tmp_path):
    """Nothing is generated or measured anew in silence; the number of steps that are kept changes nothing."""
    common = ("ppx-allocate", pico, "--sensitivity", held, "--bits-per-weight", "4.5")
    done = program(*common, "--depformer-steps", "8", "-o", "a.toml", cwd=tmp_path)
    assert done.stdout.endswith("measured on 6 of 6 sequences of 60 frames\n")
    assert f"wrote a.toml; next: ppx-convert {pico} --recipe a.toml\n" in done.stdout
    save_file({"tokens": load_file(few)["tokens"][:4].copy()}, tmp_path / "others.safetensors")
    others = program(*common, "--tokens", "others.safetensors", "-o", "b.toml", cwd=tmp_path, status=2)
    assert others.stderr == (
        f"error: {held}: was measured on other tokens than others.safetensors (6 of 6 sequences of 60 frames): "
        "leave --tokens out to use it, or measure on them with another --sensitivity\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a.toml", "others.safetensors"}


def test_measurements_of_an_earlier_version_need_their_tokens(program, pico, few, measured, tmp_path):
    sensitivity.write(replace(measured[2], source=""), tmp_path / "old.json")
    common = ("ppx-allocate", pico, "--sensitivity", "old.json", "--bits-per-weight", "4.5")
    done = program(*common, "-o", "a.toml", cwd=tmp_path, status=2)
    assert "does not say which source it was measured on: give those as --tokens" in done.stderr
    program(*common, "--tokens", few, "-o", "a.toml", cwd=tmp_path)


def test_a_size_below_the_smallest_bundle_is_refused_before_anything_is_measured(program, pico, tmp_path):
    for name, output in (("ppx-allocate", "a.toml"), ("ppx-convert", "out")):
        for more in ((), ("--target", "moshi-mlx")):
            done = program(name, pico, "--target-size", "1KB", *more, "-o", output, cwd=tmp_path, status=2)
            assert re.fullmatch(
                r"error: 1kB: the smallest bundle for [\w-]+ is larger \([\d.]+ MB or \d+ bytes, .*: give at .*\n",
                done.stderr,
            )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["mlx", "moshi-mlx", "speech-swift"])
def test_the_smallest_bundle_is_known_without_a_measurement(target, measured):
    source, _, found = measured
    inventory = preparation.inventory(source)

    def request(budget):
        return AllocationRequest(budget, target, "float16", "lsq")

    smallest = smallest_plan(inventory, request(Budget(1))).nbytes
    check_budget(inventory, request(Budget(smallest)))
    assert best_recipe(inventory, request(Budget(smallest)), found).nbytes == smallest
    with pytest.raises(UserError, match=f"{smallest} bytes"):
        check_budget(inventory, request(Budget(smallest - 1)))


def test_a_measurement_that_is_stopped_and_killed_resumes(program, pico, few, held, tmp_path):
    options = ("ppx-allocate", pico, "--tokens", few, "--bits-per-weight", "4.5", "-o", "a.toml")
    unfinished = "a.sensitivity.json.unfinished"

    def stop(number, signal_number, status):
        moment = Moment("os.rename", unfinished, number, after=True)
        return program(*options, cwd=tmp_path, status=status, stop=(moment, signal_number))

    stopped = stop(1, signal.SIGINT, 130)
    assert stopped.stderr.endswith(
        "interrupted: 1 of 11 parts of the measurement are kept; run the same command again to resume\n"
    )
    stop(2, signal.SIGKILL, -signal.SIGKILL)
    assert {path.name for path in tmp_path.iterdir()} == {unfinished}
    assert len(json.loads((tmp_path / unfinished).read_text())["units"]) == 3
    program(*options, cwd=tmp_path)
    assert (tmp_path / "a.sensitivity.json").read_bytes() == held.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.toml", "a.sensitivity.json"}


def test_what_is_kept_of_another_measurement_is_not_used(tmp_path):
    path = tmp_path / "m.json.unfinished"
    kept = KeptMeasurement.open(path, "mark")
    kept.add("0.0", {"text": 3, "agent": 4}, {"a": {"4": {"text": 0.5, "agent": 1.25}}})
    again = KeptMeasurement.open(path, "mark")
    assert again.units == kept.units
    assert again.has("0.0", ["a"], [4])
    assert not again.has("0.0", ["a", "b"], [4])
    assert not again.has("0.0", ["a"], [4, 8])
    assert KeptMeasurement.open(path, "other").units == {}
    text = path.read_text()
    for wrong in (
        "{",
        "[]",
        text.replace("0.5", "NaN"),
        text.replace('"counts"', '"count"'),
        text.replace("3,", "-1,"),
    ):
        path.write_text(wrong)
        assert KeptMeasurement.open(path, "mark").units == {}, wrong


def test_a_conversion_to_a_size(program, pico, few, held, tmp_path):
    shutil.copy(held, tmp_path / "out.sensitivity.json")
    common = ("ppx-convert", pico, "--depformer-steps", "8", "--calibration", few, "-o", "out")
    done = program(*common, "--target-size", "2.2MB", cwd=tmp_path)
    assert "2.2MB: " in done.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["target"] == "mlx"
    assert sum(record["size"] for record in manifest["files"].values()) <= 2_200_000
    assert shipped.load(str(tmp_path / "out.recipe.toml")).rules
    assert "measures nothing" in program(*common, "--target-size", "2MB", "--dry-run", cwd=tmp_path, status=2).stderr
    again = program(*common, "--target-size", "2MB", "--recipe", "4bit", cwd=tmp_path, status=2)
    assert "contradict" in again.stderr


def test_the_command_of_the_readme(program, pico, few, held, tmp_path):
    root = Path(__file__).parent.parent.parent
    pages = [(root / name).read_text() for name in ("README.md", "docs/quantizing.md")]
    (command,) = {command for page in pages for command in re.findall(r"^ppx-allocate (.*)$", page, re.MULTILINE)}
    arguments = [pico if argument == "./my-finetune" else argument for argument in shlex.split(command)]
    program("ppx-allocate", *arguments, "--tokens", few, "--sensitivity", held, cwd=tmp_path)
    assert shipped.load(str(tmp_path / "mine.toml")).depformer_steps == 8
    assert (tmp_path / "mine.svg").read_text().startswith("<svg")
