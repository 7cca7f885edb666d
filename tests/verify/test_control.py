"""The control: plain rounding of the same checkpoint, carried beside a bundle."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from ppx.convert.bundle.reader import Bundle, layout_of
from ppx.convert.bundle.records import RecipeRecord
from ppx.convert.errors import UserError
from ppx.convert.source.source import Source, locate, open_source
from ppx.model.mlx_weights import read_by_name
from ppx.model.reference import reference_of
from ppx.model.tokens import TokenDescription
from ppx.model.walk import forward_blocks
from ppx.verify import headline
from ppx.verify import report as reports
from ppx.verify.figures import Divergence, PredictionFigures, StreamFigures, Top1
from ppx.verify.limits import MANY, NARROW, WIDE, bounds_of, factors_for, prediction_failures
from ppx.verify.options import VerifyOptions
from ppx.verify.records import Report
from ppx.verify.verification import token_set_of, verify

UNEVEN = str(Path(__file__).parent.parent / "data" / "uneven.toml")
QUICK = VerifyOptions(sequences=1, frames=40, device="cpu")
NO_LIMITS = RecipeRecord("", "")


@pytest.fixture(scope="module")
def source(pico: Path) -> Iterator[Source]:
    with open_source(locate(str(pico))) as opened:
        yield opened


@pytest.mark.parametrize("recipe", ["4bit", "moshi-q4", UNEVEN])
def test_a_bundle_of_plain_rounding_is_its_own_control(recipe, source, bundle):
    """Every quantized tensor, embeddings and heads too, at the bits and group size that it has in the bundle."""
    found = verify(source, bundle("--recipe", recipe, "--method", "rtn"), QUICK, "", quiet=True)
    for name, stream in found.predictions.items():
        assert stream.control
        assert stream.control.kl
        assert stream.bundle.kl
        assert stream.control.kl.mean == pytest.approx(stream.bundle.kl.mean, rel=0.02), name
    assert found.hidden
    assert found.hidden.control.mean == pytest.approx(found.hidden.bundle.mean, abs=1e-4)
    assert headline.headline(found).endswith("%")
    assert "loses 1.0 times what plain rounding loses" in headline.headline(found)


def test_more_controls(source, bundle):
    options = dataclasses.replace(QUICK, controls=(8, 2))
    found = verify(source, bundle("--recipe", "4bit"), options, "", quiet=True)
    agent = found.predictions["agent"]
    assert list(agent.controls) == ["8", "2"]
    mean = {name: figures.kl.mean or 0.0 for name, figures in agent.by_model().items() if figures.kl}
    assert mean["8"] < mean["bundle"] < mean["2"]
    assert found.hidden
    eight, own, two = (
        figures.min for figures in (found.hidden.controls["8"], found.hidden.control, found.hidden.controls["2"])
    )
    assert eight
    assert own
    assert two
    assert eight > own > two
    assert "| figure | bundle | plain rounding | 8 bit | 2 bit | limit | noise floor |" in reports.markdown(found)
    table = [line for line in reports.markdown(found).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table[:6]} == {8}
    assert {line.count("|") for line in table[6:]} == {7}
    assert reports.html(found).count("<th>8 bit</th><th>2 bit</th>") == 2
    line = headline.headline(found)
    assert " times what 8 bit loses" in line
    assert "% of what 2 bit loses" in line
    assert Report.from_json(found.to_json()).predictions["agent"].controls["8"].positions == agent.bundle.positions


def test_a_float_bundle_has_a_control_that_only_casts(source, bundle):
    found = verify(source, bundle("--no-quantize", "--dtype", "float16"), QUICK, "", quiet=True)
    assert found.verdict.passed
    control = found.predictions["agent"].control
    assert control
    assert control.kl
    assert control.kl.mean is not None
    assert control.kl.mean < 1e-5
    assert headline.headline(found).startswith("float16, not quantized, ")


def test_cosines_are_those_of_the_dequantized_weights_in_the_reference(source, bundle):
    """The bundle's weights, put back into the PyTorch model as floats, give the hidden states that MLX computes."""
    folder = bundle("--recipe", "4bit")
    found = verify(source, folder, QUICK, "", quiet=True)
    token_set, a = token_set_of(source, QUICK), source.architecture
    vectors = token_set.vectors(source.voices, a.dim)
    with closing(Bundle(folder, *layout_of(folder))) as stored:
        original = reference_of(source.checkpoint)

        def weights(name, step):
            return torch.from_numpy(np.array(read_by_name(stored, name, step).float32(mx.cpu)))

        hidden, logits = [], []
        for model in (dataclasses.replace(original, weights=weights), original):
            x = forward_blocks(model, a, "temporal", model.embed(token_set.tokens, vectors))
            rows = model.out_norm(x).reshape(-1, a.dim)
            hidden.append(torch.from_numpy(rows).double())
            logits.append(torch.from_numpy(model.text_logits(rows)).double())
    assert found.hidden
    text = found.predictions["text"].bundle
    for measured, pair in ((found.hidden.bundle, hidden), (text.logits, logits)):
        expected = torch.nn.functional.cosine_similarity(pair[0], pair[1])
        assert measured
        assert measured.mean == pytest.approx(float(expected.mean()), abs=1e-5)
        assert measured.min == pytest.approx(float(expected.min()), abs=1e-5)
    assert text.top1
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()
    assert text.top1.agreement == pytest.approx(float(same))


def figures(kl: float, agreement: float) -> PredictionFigures:
    return PredictionFigures(
        100, Divergence(mean=kl, standard_error=None), Top1(agreement=agreement, standard_error=None), None
    )


def streams(bundle: float, control: float, noise: float = 0.0) -> dict[str, StreamFigures]:
    """Streams with these divergences, and as large a share of tokens that differ."""
    one = StreamFigures.of(
        {name: figures(kl, 1 - kl) for name, kl in (("bundle", bundle), ("control", control), ("noise", noise))}
    )
    return dict.fromkeys(("text", "codebook_0", "agent"), one)


def test_a_bound_is_a_factor_of_the_control_and_the_noise_floor():
    bounds = bounds_of(streams(0.5, 0.1, 0.01), NARROW, "float32", NO_LIMITS)
    assert bounds["agent_kl"] == pytest.approx(NARROW["agent_kl"].times * 0.1 + 0.01)
    spread = 3 * math.sqrt(0.1 * 0.9 / 100)
    assert bounds["agent_top1"] == pytest.approx(1 - NARROW["agent_top1"].times * 0.1 - 0.01 - spread)
    wide = bounds_of(streams(0.5, 0.1, 0.01), WIDE, "bfloat16", NO_LIMITS)
    text = WIDE["text_kl"]
    assert wide["text_kl"] == pytest.approx(text.times * (0.1 + text.share * 0.1) + 3 * 0.01)
    failures = prediction_failures(streams(0.9, 0.1, 0.01), bounds, [], 8)
    assert [failure.limit for failure in failures] == list(bounds)
    assert "(plain rounding: 0.1), at most 0." in failures[0].message


def test_many_recorded_sequences_are_judged_by_narrow_factors():
    def of(kind, sequences):
        return factors_for(TokenDescription(kind=kind, sequences=sequences, frames=100))

    assert of("tokens", MANY) is NARROW
    assert of("tokens", MANY - 1) is WIDE
    assert of("system prompt", 18) is WIDE
    assert all(NARROW[limit].times < WIDE[limit].times for limit in NARROW)


def test_bits_that_nothing_is_rounded_to():
    with pytest.raises(UserError, match="controls of 7 bit: use 2, 3, 4, 5, 6, 8"):
        VerifyOptions(controls=(8, 7))


@pytest.mark.parametrize("control", [math.nan, math.inf])
def test_a_bad_control_lets_nothing_pass(control):
    bounds = bounds_of(streams(0.1, control), WIDE, "float32", NO_LIMITS)
    assert set(bounds.values()) == {None}
    failures = prediction_failures(streams(0.1, control), bounds, [], 8)
    assert len(failures) == len(bounds)
    assert "cannot be judged" in failures[0].message


def test_a_bundle_that_is_not_finite_fails():
    bounds = bounds_of(streams(0.1, 0.1), WIDE, "float32", NO_LIMITS)
    assert len(prediction_failures(streams(math.nan, 0.1), bounds, [], 8)) == len(bounds)


def test_the_first_line(source, bundle):
    report = verify(source, bundle("--recipe", "4bit"), QUICK, "", quiet=True)

    def line(kl: float, control: float, other: float) -> str:
        agent = StreamFigures(figures(kl, 0.916), figures(0.0, 1.0), figures(control, 0.5), {"8": figures(other, 0.99)})
        return headline.headline(dataclasses.replace(report, predictions={"agent": agent}))

    size = f"4 bit, {report.bundle.bits_per_weight:.2f} bpw"
    assert line(0.0011, 0.01, 0.0006) == (
        f"{size}: loses 11 % of what plain rounding loses and 1.8 times what 8 bit loses; agent top-1 agreement 92 %"
    )
    assert "loses 1.2 % of what plain rounding loses and 22 times what" in line(0.012, 1.0, 0.00055)
    assert "loses 2.0 times what plain" in line(0.2, 0.1, 0.1)
    assert "loses 200 times what 8 bit loses" in line(0.2, 0.0, 0.001)  # nothing to divide by
    assert headline.headline(dataclasses.replace(report, predictions={})).endswith("nothing was computed")
