"""Two reports beside each other: which is nearer to the original, with what standard error, and what differs most."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ppx.verify import compare_reports
from ppx.verify import report as reports
from ppx.verify.figures import Divergence
from ppx.verify.paired import paired_difference
from ppx.verify.records import Report

EARLIER = Path(__file__).parents[1] / "data" / "earlier"
NAMES = ("four", "eight")


def divergence(means: list[float], stored: bool = True) -> Divergence:
    """A stream's divergence with these sequences, of equal length."""
    error = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    mean = sum(means) / len(means)
    return Divergence(mean=mean, standard_error=error, by_sequence=tuple(means) if stored else None)


def with_divergence(report: Report, stream: str, kl: Divergence) -> Report:
    figures = report.predictions[stream]
    bundle = replace(figures.bundle, kl=kl)
    return replace(report, predictions=report.predictions | {stream: replace(figures, bundle=bundle)})


@pytest.fixture
def earlier() -> Report:
    return reports.read(EARLIER / "report.json")


def test_a_paired_difference_is_judged_by_its_own_spread():
    """Sequences that are hard for both do not blur what differs between them."""
    hard = [0.1, 0.4, 0.9, 1.6]
    a, b = divergence([x + 0.05 + 0.001 * n for n, x in enumerate(hard)]), divergence(hard)
    found = paired_difference(a, b)
    assert found
    apart = np.array([0.05, 0.051, 0.052, 0.053])
    assert found.difference == pytest.approx(apart.mean())
    assert found.standard_error == pytest.approx(apart.std(ddof=1) / 2)
    assert (found.paired, found.sequences, found.nearer) == (True, 4, "b")
    swapped = paired_difference(b, a)
    assert swapped
    assert swapped.nearer == "a"
    assert swapped.difference == pytest.approx(-apart.mean())
    blurred = paired_difference(replace(a, by_sequence=None), b)
    assert blurred
    assert a.standard_error is not None
    assert b.standard_error is not None
    assert blurred.standard_error == pytest.approx(math.hypot(a.standard_error, b.standard_error))
    assert (blurred.paired, blurred.sequences, blurred.nearer) == (False, None, "unclear")


@pytest.mark.parametrize(("apart", "nearer"), [
    ([0.01, 0.03], "unclear"),  # 2 standard errors, of two sequences: 12.7 are needed
    ([0.010, 0.011], "b"),
    ([0.01, 0.02, 0.03], "unclear"),  # 3.5: 4.3 are needed
    ([0.01, 0.02, 0.03, 0.02], "b"),  # 4.9: 3.2 are needed
    ([-0.01, -0.02, -0.03, -0.02], "a"),
    ([0.01, -0.01] * 8, "unclear"),
    ([0.0, 0.0, 0.0], "unclear"),
])  # fmt: skip
def test_few_sequences_need_a_clearer_difference(apart, nearer):
    found = paired_difference(divergence([1 + x for x in apart]), divergence([1.0] * len(apart)))
    assert found
    assert found.nearer == nearer


def test_what_has_no_difference_or_no_error():
    one = paired_difference(divergence([0.2]), divergence([0.1]))
    assert one
    assert (one.standard_error, one.sequences, one.nearer) == (None, 1, "unclear")
    assert paired_difference(replace(divergence([0.1, 0.2]), mean=None), divergence([0.1, 0.2])) is None
    other = paired_difference(divergence([0.1, 0.2, 0.3]), divergence([0.1, 0.2]))  # not the same sequences
    assert other
    assert not other.paired
    zero = paired_difference(divergence([0.1, 0.2]), divergence([0.0, 0.0]))
    assert zero
    assert zero.ratio is None


def test_the_summary_comes_first_and_says_what_differs_most(earlier):
    first = with_divergence(earlier, "agent", divergence([0.30, 0.41, 0.52, 0.60]))
    second = with_divergence(earlier, "agent", divergence([0.10, 0.20, 0.30, 0.40]))
    for number, kl in enumerate([0.2, 0.9, 0.3]):
        first = with_divergence(first, f"codebook_{number}", divergence([kl, kl]))
        second = with_divergence(second, f"codebook_{number}", divergence([0.1, 0.1]))
    worst = next(number for number, row in enumerate(second.weights) if row.bits and row.relative_rmse)
    rows = list(second.weights)
    rows[worst] = replace(rows[worst], relative_rmse=(rows[worst].relative_rmse or 0) / 50)
    second = replace(second, weights=tuple(rows))
    compared = compare_reports.compare(first, second)
    lines = compare_reports.text(NAMES, compared).splitlines()
    assert lines[0].startswith(
        "B is nearer to the original: agent KL 0.458 (A) and 0.25 (B) nats/token, A − B = +0.208"
    )
    error = np.std([0.2, 0.21, 0.22, 0.2], ddof=1) / 2
    assert f"± {error:.3g} (standard error, 4 sequences paired)" in lines[0]
    assert lines[0].endswith("A is farther, 1.83 times as far")
    assert lines[1].startswith("  A: four: 4 bit, ")
    assert lines[2].startswith("  B: eight: 4 bit, ")
    assert lines[3] == "what differs most:"
    assert f"{first.weights[worst].source}" in lines[4]
    assert lines[4].endswith(": 50 times")
    assert lines[5] == "  agent's codebook, KL    codebook 1: 0.9 (A), 0.1 (B): 9 times"
    assert lines.index("") < next(number for number, line in enumerate(lines) if line.startswith("verdict"))
    found = json.loads(json.dumps(compared.to_json()))
    assert found["summary"]["nearer"] == "b"
    assert found["summary"]["standard_error"] == pytest.approx(error)
    assert found["codebooks"]["most_different"][0]["name"] == "codebook 1"


def test_reports_of_earlier_versions_are_compared_without_pairs(earlier):
    assert earlier.predictions["agent"].bundle.kl
    assert earlier.predictions["agent"].bundle.kl.by_sequence is None
    text = compare_reports.text(NAMES, compare_reports.compare(earlier, earlier))
    assert text.startswith("no clear difference: agent KL ")
    assert "not paired: earlier reports" in text
    assert "what differs most: nothing" in text


def test_a_single_sequence_and_other_tokens_and_nothing_have_no_summary(earlier):
    single = with_divergence(earlier, "agent", divergence([0.3]))
    text = compare_reports.text(NAMES, compare_reports.compare(single, single))
    assert text.startswith("one sequence, so no standard error: agent KL 0.3 (A) and 0.3 (B)")
    farther = with_divergence(replace(earlier, arithmetic="bfloat16"), "agent", divergence([0.9]))
    other = compare_reports.compare(earlier, farther)
    assert other.summary is None
    text = compare_reports.text(NAMES, other)
    assert "▶" not in text
    assert "times" not in text
    assert "better" not in text
    lines = text.splitlines()
    assert lines[0] == "warning: they were made with different arithmetic: float32 and bfloat16"
    assert lines[1].startswith("their figures must not be compared")
    empty = compare_reports.compare(replace(earlier, predictions={}), earlier)
    assert empty.summary is None
    assert compare_reports.text(NAMES, empty).startswith("nothing to compare")


def test_values_by_sequence_are_stored_and_read_again(earlier, tmp_path):
    report = with_divergence(
        earlier, "agent", Divergence(mean=0.2, standard_error=0.1, by_sequence=(0.1234567, math.inf))
    )
    finished = reports.finish(report)
    reports.write(finished, tmp_path)
    stored = json.loads((tmp_path / "parity" / "report.json").read_text())
    assert stored["predictions"]["agent"]["bundle"]["kl"]["by_sequence"] == [0.123457, None]
    assert "by_sequence" not in stored["predictions"]["text"]["bundle"]["kl"]
    again = Report.from_json(stored)
    assert again == finished
    assert again.predictions["agent"].bundle.kl
    found = paired_difference(again.predictions["agent"].bundle.kl, divergence([0.1, 0.1]))
    assert found
    assert not found.paired  # a sequence without a finite value
    stored["predictions"]["agent"]["bundle"]["kl"]["by_sequence"] = ["much"]
    with pytest.raises(ValueError, match="by_sequence"):
        Report.from_json(stored)
