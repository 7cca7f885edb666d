"""Figures against their definitions, worked out in another way."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from ppx.verify.figures import ActivationRow, Difference, Divergence, PredictionFigures, Top1
from ppx.verify.limits import gaussian_rmse, start
from ppx.verify.metrics import Predictions, difference, mean_of

FLOATS = hnp.arrays(np.float32, (7, 5), elements=st.floats(-30, 30, width=32))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.longdouble]:
    powers = np.exp(logits.astype(np.longdouble) - logits.max(-1, keepdims=True))
    shares: NDArray[np.longdouble] = powers / powers.sum(-1, keepdims=True)
    return shares


@settings(max_examples=50, deadline=None)
@given(FLOATS, FLOATS)
def test_divergence_is_the_sum_over_the_vocabulary(first, second):
    seen = Predictions()
    seen.add(first, second, None, np.arange(7))  # actual, expected
    q, p = softmax(first), softmax(second)
    by_hand = (p * (np.log(p) - np.log(q))).sum(-1)
    np.testing.assert_allclose(np.concatenate(seen.kl), by_hand.astype(float), atol=1e-9)
    assert min(np.concatenate(seen.kl)) >= 0


@settings(max_examples=50, deadline=None)
@given(FLOATS, FLOATS)
def test_cosine_of_logits_position_by_position(first, second):
    seen = Predictions()
    seen.add(first, second, None, np.arange(7))
    by_hand = []
    for a, b in zip(first.astype(np.longdouble), second.astype(np.longdouble), strict=True):
        lengths = np.sqrt(sum(a * a)) * np.sqrt(sum(b * b))
        by_hand.append(float(sum(a * b) / lengths) if lengths else float(not (a.any() or b.any())))
    np.testing.assert_allclose(np.concatenate(seen.logits), by_hand, atol=1e-9)
    found = seen.summary().logits
    assert found
    assert (found.mean, found.min) == pytest.approx((np.mean(by_hand), min(by_hand)), abs=1e-9)


def test_a_prediction_compared_with_itself():
    logits = np.random.default_rng(0).standard_normal((40, 9), np.float32)
    seen = Predictions()
    seen.add(logits, logits, np.arange(40, dtype=np.int32) % 9, np.arange(40) // 20)
    found = seen.summary()
    assert found.kl
    assert found.loss
    assert found.kl.mean == found.kl.max == 0
    assert found.top1 == Top1(agreement=1.0, standard_error=0.0, by_sequence=(1.0, 1.0))
    assert found.loss.change == 0
    assert found.loss.perplexity_ratio == 1
    expected = -np.log(softmax(logits)[np.arange(40), np.arange(40) % 9]).mean()
    assert found.loss.reference == pytest.approx(float(expected))


def test_spread_and_standard_error():
    first = np.zeros((1000, 2), np.float32)
    second = np.stack([np.linspace(0, 5, 1000, dtype=np.float32), np.zeros(1000, np.float32)], 1)
    seen = Predictions()
    targets = np.where(np.arange(1000) < 10, 0, -1).astype(np.int32)  # most tokens are not known
    seen.add(second, first, targets, np.arange(1000) // 250)
    found = seen.summary()
    kl = np.log(0.5) - 0.5 * (np.log(softmax(second)).sum(-1)).astype(float)
    assert found.positions == 1000
    assert found.kl
    assert found.loss
    assert found.loss.positions == 10
    assert found.kl.mean == pytest.approx(kl.mean())
    assert found.kl.p99_9 == pytest.approx(np.percentile(kl, 99.9))
    means = kl.reshape(4, 250).mean(1)  # sequences are independent, their positions are not
    assert found.kl.standard_error == pytest.approx(means.std(ddof=1) / 2)
    assert found.loss.standard_error is None  # all known tokens are in one sequence
    spread = [value for value in (found.kl.median, found.kl.p90, found.kl.p99, found.kl.max) if value is not None]
    assert sorted(set(spread)) == spread
    assert len(spread) == 4


def test_long_inputs_in_pieces():
    random = np.random.default_rng(1)
    first, second = (random.standard_normal((9000, 600), np.float32) for _ in range(2))
    whole, pieces = Predictions(), Predictions()
    numbers = np.arange(9000) // 1000
    whole.add(first, second, None, numbers)
    for begin in range(0, 9000, 700):
        rows = slice(begin, begin + 700)
        pieces.add(first[rows], second[rows], None, numbers[rows])
    assert len(whole.kl) > 1
    assert whole.summary() == pieces.summary()


def test_the_mean_of_streams():
    streams = [PredictionFigures(0, None, None, None)]
    assert mean_of(streams).kl is None
    for means in ([0.1, 0.3], [0.4, 0.4]):
        kl = Divergence(mean=sum(means) / 2, standard_error=9, by_sequence=tuple(means))
        top1 = Top1(agreement=0.5, standard_error=9, by_sequence=(0.5, 0.5))
        streams.append(PredictionFigures(10, kl, top1, None))
    found = mean_of(streams)  # the sequences' means are .25 and .35
    assert found.kl
    assert found.kl.mean == pytest.approx(0.3)
    assert found.kl.standard_error == pytest.approx(0.05)
    assert found.kl.median is None
    assert found.top1 == Top1(agreement=0.5, standard_error=0)
    assert found.positions == 20


@settings(max_examples=50, deadline=None)
@given(FLOATS, FLOATS)
def test_difference_of_arrays(first, second):
    found = difference(first, second)  # actual, expected
    norm = float(np.linalg.norm(second.astype(np.longdouble)))
    apart = float(np.linalg.norm(second.astype(np.longdouble) - first))
    if norm:
        assert found.relative_l2 == pytest.approx(apart / norm, rel=1e-5)
    else:
        assert found.relative_l2 == (math.inf if apart else 0)
    assert found.max_abs == np.abs(first - second).max()
    assert found.cosine is not None
    assert -1.0001 <= found.cosine <= 1.0001
    same = difference(first, first)
    assert (same.relative_l2, same.max_abs) == (0, 0)
    assert same.cosine == pytest.approx(1)


def test_what_is_not_finite_stays_visible():
    broken = np.array([1.0, np.nan], np.float32)
    assert np.isnan(difference(broken, np.ones(2, np.float32)).relative_l2 or 0.0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_expected_error_of_gaussian_weights(bits, size):
    weights = mx.array(np.random.default_rng(2).standard_normal((256, 1024), np.float32))
    packed = mx.quantize(weights, group_size=size, bits=bits, stream=mx.cpu)
    back = np.array(mx.dequantize(*packed, group_size=size, bits=bits, stream=mx.cpu))
    found = difference(back, np.array(weights)).relative_l2
    assert found == pytest.approx(gaussian_rmse(bits, size), rel=0.2 if bits == 2 else 0.06)


def rows(
    errors: Sequence[float], component: str = "temporal", part: str = "mlp", step: int | None = None
) -> list[ActivationRow]:
    drift = Difference(0.0, 1.0, 0.0)
    return [
        ActivationRow(component, layer, part, step, Difference(error, 1.0, 0.0), drift, drift)
        for layer, error in enumerate(errors)
    ]


def test_where_an_error_starts():
    sound, one = rows([0.1, 0.11, 0.09, 0.1]), rows([0.1, 0.11, 0.5, 0.9])
    assert "it starts at temporal layer 2 mlp" in start(one, -1)
    assert "no block stands out: it starts at temporal layer 0 mlp" in start(sound, -1)
    late = rows([0.1, 0.9], "depformer", "attention", step=9) + rows([0.1, 0.1, 0.1], "depformer", "attention", step=3)
    assert "layer 1 attention of step 9" in start(sound + late, 15)
    assert "no block stands out" in start(sound + late, 7)  # step 9 does not reach the agent's codebooks
    assert "it starts at temporal layer 1 mlp" in start(rows([0.1, math.nan, 0.1]), -1)
