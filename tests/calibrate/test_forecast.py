"""What a conversion by data is expected to take: the counts against what is computed, and where it is shown."""

import json
import re
from dataclasses import replace

import pytest
import torch
from ppx.calibrate import forecast, layerwise, rates, work
from ppx.calibrate.forecast import Forecast
from ppx.calibrate.rates import Rates
from ppx.calibrate.work import Work
from ppx.convert import preparation
from ppx.convert.bundle.plan import inventory_of_7b, make_plan
from ppx.convert.bundle.quantized_store import QuantizedStore, quantizations_of
from ppx.convert.bundle.recipe_choice import make_recipe
from ppx.convert.progress import duration
from ppx.convert.source.source import locate, open_source
from ppx.model import torch_device
from ppx.model.tokens import read_tokens
from ppx.quant import gptq, rounding
from torch.utils.flop_counter import FlopCounterMode

RATES = Rates(1e-11, 3e-11, 5e-8, 3e-9, 1e-3, 1e-9, 1e-9, 1e-3, 1e-9, 2e-9)


@pytest.fixture(scope="module")
def opened(pico):
    with open_source(locate(str(pico))) as source:
        yield source, make_plan(preparation.inventory(source), make_recipe(bits=4, method="gptq"))


@pytest.mark.parametrize(("sequences", "frames"), [(2, 20), (3, 120)])
def test_the_work_is_what_is_computed(sequences, frames, opened, pico, tmp_path, monkeypatch):
    """Few frames, whose inputs are kept, and more than any matrix has columns."""
    source, plan = opened
    token_set = read_tokens(pico / "calibration_tokens.safetensors", source.architecture, sequences, frames)
    rounded, factored, solved = [], [], []
    round_columns, cholesky, solve = rounding.round_columns, torch.linalg.cholesky_ex, torch.linalg.solve_triangular

    def counted(goal, *rest):
        rounded.append(goal.shape)
        return round_columns(goal, *rest)

    def factor(matrix, **options):
        if matrix.dim() == 2:  # not the many small ones of gradients
            factored.append(len(matrix))
        return cholesky(matrix, **options)

    def solve_counted(factor, values, **options):
        solved.append(len(factor) * values.numel())  # which the counter of operations leaves out
        return solve(factor, values, **options)

    monkeypatch.setattr(gptq, "round_columns", counted)
    monkeypatch.setattr(torch.linalg, "solve_triangular", solve_counted)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", factor)

    def in_place(_total, left, right, **_shapes):
        return 2 * left[0] * left[1] * right[1]

    more = {torch.ops.aten.addmm_: in_place}  # which the counter leaves out as well
    counter = FlopCounterMode(display=False, custom_mapping=more)
    with QuantizedStore(tmp_path / "store", "x") as store, counter as flops:
        layerwise.quantize_model(source, plan.outputs, token_set, store, quiet=True)
    expected = work.gptq_work(plan, sequences, frames)
    assert expected.rounded == sum(rows * columns for rows, columns in rounded)
    assert expected.groups == sum(columns // 64 for _, columns in rounded)
    assert expected.factors == pytest.approx(sum(size**3 / 3 for size in factored))
    assert expected.products == pytest.approx(flops.get_total_flops() + sum(solved), rel=1 / 4)


def test_a_run_that_resumes_has_less_to_do(opened):
    _, plan = opened
    keys = list(quantizations_of(plan.outputs))
    whole, half, nothing = (work.gptq_work(plan, 4, 100, keys[:count]) for count in (0, len(keys) // 2, len(keys)))
    assert nothing.rounded == nothing.factors == 0
    assert 0 < half.rounded < whole.rounded
    assert 0 < nothing.products < half.products < whole.products  # both models go through the blocks all the same


def test_more_frames_take_more_of_what_grows_with_them():
    plan = make_plan(inventory_of_7b("x"), make_recipe(bits=4, method="gptq"))
    few, many = (work.gptq_work(plan, sequences, 256) for sequences in (8, 32))
    assert few.rounded == many.rounded == pytest.approx(7.9e9, rel=0.01)  # all linears but the heads
    assert few.factors < 1.1 * many.factors
    assert 2 < many.products / few.products < 4
    assert work.gptq_work(plan, 10**6, 256) == work.gptq_work(plan, 10**5, 256)  # streams are limited
    generated = [work.generation_work(plan, memory << 30) for memory in (24, 128)]
    assert generated[0].unread > 0 == generated[1].unread  # weights that fit are read once
    assert generated[0].thin > generated[1].thin  # and more sessions run side by side


def test_rates_are_measured_in_any_unit_of_time(opened):
    ticks = iter(range(10**6))
    measured = rates.measure(opened[0].architecture, "cpu", lambda: float(next(ticks)))
    work_of_one = Work(products=1, factors=2)
    assert measured.seconds(work_of_one) == pytest.approx(measured.products + 2 * measured.factors)
    assert min(getattr(measured, name) for name in ("products", "factors", "read", "groups", "thin")) > 0


def test_a_forecast_is_rates_times_work(opened, pico, monkeypatch):
    source, plan = opened
    monkeypatch.setattr(forecast, "_measured", lambda _: RATES)
    tokens = pico / "calibration_tokens.safetensors"
    sequences, _, frames = read_tokens(tokens, source.architecture, None, None).tokens.shape
    expected = forecast.forecast(plan, tokens)
    assert expected == Forecast(0, RATES.seconds(work.gptq_work(plan, sequences, frames)))
    generated = forecast.forecast(plan)
    assert generated is not None
    assert generated.generating > 0
    assert "for generating calibration tokens" in generated.text
    plain = make_plan(preparation.inventory(source), make_recipe(bits=4))
    assert forecast.forecast(plain) is None


def test_several_gpus_share_the_work(opened, pico, monkeypatch):
    """All but reading weights, and what each does for its rows of a matrix."""
    plan = make_plan(inventory_of_7b("x"), make_recipe(bits=4, method="gptq"))
    one, two = (work.gptq_work(plan, 128, 250, workers=count) for count in (1, 2))
    for name in ("products", "rounded", "streamed", "stepped"):
        assert getattr(two, name) == pytest.approx(getattr(one, name) / 2)
    for name in ("factors", "groups"):
        assert getattr(one, name) / 2 < getattr(two, name) < getattr(one, name)
    assert two.read == one.read

    monkeypatch.setattr(forecast, "_measured", lambda _: RATES)
    tokens = pico / "calibration_tokens.safetensors"
    seconds = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(torch_device, "device", lambda device=device: device)
        for gpus in (1, 2):
            expected = forecast.forecast(opened[1], tokens, gpus=gpus)
            assert expected is not None
            seconds[device, gpus] = expected.gptq
    assert seconds["cpu", 1] == seconds["cpu", 2] == seconds["cuda", 1]
    assert 0.5 < seconds["cuda", 2] / seconds["cuda", 1] < 0.9


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (99.4, "99 s"), (100, "2 min"), (2700, "45 min"), (7920, "2.2 h"), (97200, "27 h")],
)
def test_durations_have_two_digits(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("layers", "percent"), [(4, "34%"), (6, "34%"), (24, "10%"), (32, "10%")])
def test_advice_names_the_figures_of_the_nearest_depth(layers, percent, opened, monkeypatch):
    source, _ = opened
    monkeypatch.setattr(forecast, "_measured", lambda _: RATES)
    deeper = replace(source.architecture, num_layers=layers)
    monkeypatch.setattr(forecast, "planned", lambda _, recipe: (source, plan_for(recipe)))

    def plan_for(recipe):
        return make_plan(preparation.inventory(source), recipe)

    checkpoint = replace(source.checkpoint, architecture=deeper)
    line = forecast.advice(replace(source, checkpoint=checkpoint), make_recipe(bits=4))
    assert line is not None
    assert line.startswith("gptq: about ")
    assert f"it left {percent} of the divergence of mse at 4 bit" in line
    assert "small test model" in line
    for recipe in (make_recipe(bits=4, method="gptq"), make_recipe(bits=8), make_recipe(quantize=False)):
        assert forecast.advice(source, recipe) is None


def test_programs_show_it(program, pico, tmp_path):
    tokens = ("--tokens", pico / "calibration_tokens.safetensors")
    done = program("ppx-convert", pico, "--method", "gptq", *tokens, "--dry-run", cwd=tmp_path)
    assert re.fullmatch(r"layer-wise GPTQ: about \d+ (s|min) on this machine", done.stdout.splitlines()[-1])
    found = json.loads(program("ppx-convert", pico, "--method", "gptq", "--dry-run", "--json", cwd=tmp_path).stdout)
    assert found["forecast_seconds"].keys() == {"generating_tokens", "gptq"}
    assert "forecast_seconds" not in program("ppx-convert", pico, "--dry-run", "--json", cwd=tmp_path).stdout
    done = program("ppx-convert", pico, "--no-verify", "-o", "out", cwd=tmp_path)
    assert done.stdout.splitlines()[-1].startswith("--method gptq: about ")
    assert "--method" not in program("ppx-convert", pico, "--no-verify", "--json", "-o", "j", cwd=tmp_path).stdout
