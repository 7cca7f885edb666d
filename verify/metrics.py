"""Figures of how far two arrays, or two predictions, are apart. Always (actual, expected), as in torch.testing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.divergence import kl_divergence
from ..model.forward import Floats, Tokens
from .figures import (
    Cosine,
    Difference,
    Divergence,
    Loss,
    PredictionFigures,
    StreamFigures,
    Top1,
    finite_or_infinite,
    standard_error,
)

PERCENTILES = {"median": 50.0, "p90": 90.0, "p99": 99.0, "p99_9": 99.9}
_BLOCK = 1 << 22  # logits in float64 at a time


def difference(actual: Floats, expected: Floats) -> Difference:
    """Return relative L2 error, cosine and the largest absolute difference of two arrays of one shape.

    The relative error is the norm of the difference over the norm of ``expected``.
    """
    actual, expected = actual.reshape(-1), expected.reshape(-1)
    apart = actual - expected
    error, norm, length = (float(np.einsum("i,i->", x, x, dtype=np.float64)) for x in (apart, expected, actual))
    along = float(np.einsum("i,i->", actual, expected, dtype=np.float64))
    return Difference(
        relative_l2=root_ratio(error, norm),
        cosine=along / math.sqrt(norm * length) if norm * length > 0 else float(norm == length),
        max_abs=float(np.abs(apart).max(initial=0.0)),
    )


def cosines(actual: Floats, expected: Floats) -> NDArray[np.float64]:
    """Return the cosine of each row ``[rows, columns]`` with the expected one; 1 for two rows of zeros."""
    pairs = ((actual, expected), (actual, actual), (expected, expected))
    along, length, norm = (np.einsum("ij,ij->i", a, b, dtype=np.float64) for a, b in pairs)
    both = np.sqrt(length * norm)
    values: NDArray[np.float64] = np.where(both > 0, along / np.where(both > 0, both, 1), length == norm)
    return values


def cosine(values: NDArray[np.float64]) -> Cosine:
    """Return mean and smallest of some cosines."""
    return Cosine(float(values.mean()), float(values.min()))


def root_ratio(squared: float, squared_expected: float) -> float:
    """Return the root of a ratio of sums of squares; of nothing to nothing 0, of something to nothing infinity."""
    if squared_expected > 0:
        return math.sqrt(squared / squared_expected)
    return math.inf if squared > 0 else squared  # NaN stays NaN


@dataclass
class Predictions:
    """Figures of one stream's predictions, position by position.

    kl: Kullback-Leibler divergence from the expected to the actual distribution, in nats. same: whether the top-1
    tokens are equal. logits: cosine of both. loss_actual, loss_expected: negative log-likelihood of the next token, in
    nats. sequences, scored: the sequence that each position of the former three, and of the latter two, belongs to.
    """

    kl: list[NDArray[np.float64]] = field(default_factory=list)
    same: list[NDArray[np.bool_]] = field(default_factory=list)
    loss_actual: list[NDArray[np.float64]] = field(default_factory=list)
    loss_expected: list[NDArray[np.float64]] = field(default_factory=list)
    sequences: list[NDArray[np.int64]] = field(default_factory=list)
    scored: list[NDArray[np.int64]] = field(default_factory=list)
    logits: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, actual: Floats, expected: Floats, targets: Tokens | None, sequences: NDArray[np.int64]) -> None:
        """Compare logits ``[positions, vocabulary]``; targets: the next tokens, -1 where none is known."""
        self.sequences.append(sequences)
        height = max(1, _BLOCK // expected.shape[1])
        for first in range(0, len(expected), height):
            rows = slice(first, first + height)
            self.logits.append(cosines(actual[rows], expected[rows]))
            q, p = (torch.from_numpy(x[rows]).double().log_softmax(-1) for x in (actual, expected))
            self.kl.append(kl_divergence(q, p).clamp(min=0).numpy())
            self.same.append((q.argmax(-1) == p.argmax(-1)).numpy())
            if targets is not None:
                known = targets[rows] >= 0
                self.scored.append(sequences[rows][known])
                tokens = torch.from_numpy(targets[rows][known].astype(np.int64))[:, None]
                for x, losses in ((q, self.loss_actual), (p, self.loss_expected)):
                    losses.append(-x[torch.from_numpy(known)].gather(1, tokens)[:, 0].numpy())

    def summary(self) -> PredictionFigures:
        """Return the figures of the stream."""
        columns = (self.kl, self.same, self.loss_actual, self.loss_expected, self.sequences, self.scored)
        figures = summarize(*(_joined(parts) for parts in columns))
        return replace(figures, logits=cosine(_joined(self.logits))) if figures.positions else figures


def _joined(parts: list[NDArray[Any]]) -> NDArray[np.float64]:
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)


def summarize(
    kl: NDArray[np.float64],
    same: NDArray[np.float64],
    loss_actual: NDArray[np.float64],
    loss_expected: NDArray[np.float64],
    sequences: NDArray[np.float64],
    scored: NDArray[np.float64],
) -> PredictionFigures:
    """Return mean and spread of a stream's figures; None for those that no position counts for."""
    if not len(kl):
        return PredictionFigures(0, None, None, None)
    means = _by_sequence(kl, sequences)
    divergence = Divergence(
        mean=float(kl.mean()),
        standard_error=standard_error(means),
        by_sequence=means,
        **{name: float(np.percentile(kl, share)) for name, share in PERCENTILES.items()},
        max=float(kl.max()),
    )
    means = _by_sequence(same, sequences)
    top1 = Top1(agreement=float(same.mean()), standard_error=standard_error(means), by_sequence=means)
    return PredictionFigures(len(kl), divergence, top1, _loss(loss_actual, loss_expected, scored))


def _loss(actual: NDArray[np.float64], expected: NDArray[np.float64], sequences: NDArray[np.float64]) -> Loss | None:
    if not len(expected):
        return None
    change = actual - expected
    means = _by_sequence(change, sequences)
    return Loss(
        positions=len(change),
        reference=float(expected.mean()),
        bundle=float(actual.mean()),
        change=float(change.mean()),
        standard_error=standard_error(means),
        by_sequence=means,
        perplexity_ratio=_perplexity_ratio(float(change.mean())),
    )


def _by_sequence(values: NDArray[np.float64], sequences: NDArray[np.float64]) -> tuple[float, ...]:
    """Return the mean of each sequence; standard errors come from their spread: neighbours are not independent."""
    return tuple(float(values[sequences == number].mean()) for number in np.unique(sequences))


def _perplexity_ratio(change: float) -> float:
    return math.exp(min(change, 700.0))  # above, it is infinite


def mean_of(streams: Sequence[PredictionFigures]) -> PredictionFigures:
    """Return the mean of several streams' mean figures, and its standard error over sequences."""
    counted = [stream for stream in streams if stream.positions]
    divergences = [stream.kl for stream in counted if stream.kl]
    agreements = [stream.top1 for stream in counted if stream.top1]
    losses = [stream.loss for stream in counted if stream.loss]
    if not counted:
        return PredictionFigures(0, None, None, None)
    change = _mean([loss.change for loss in losses])
    return PredictionFigures(
        sum(stream.positions for stream in counted),
        Divergence(
            mean=_mean([kl.mean for kl in divergences]),
            standard_error=_joint_error(divergences),
            by_sequence=_joint_means(divergences),
        ),
        Top1(agreement=_mean([top1.agreement for top1 in agreements]), standard_error=_joint_error(agreements)),
        Loss(
            reference=_mean([loss.reference for loss in losses]),
            bundle=_mean([loss.bundle for loss in losses]),
            change=change,
            standard_error=_joint_error(losses),
            perplexity_ratio=_perplexity_ratio(change),
        )
        if losses
        else None,
    )


def mean_of_streams(streams: Sequence[StreamFigures]) -> StreamFigures:
    """Return the mean of several streams' figures, of each model."""
    figures = [stream.by_model() for stream in streams]
    return StreamFigures.of({name: mean_of([one[name] for one in figures]) for name in figures[0]})


def _mean(values: Sequence[float | None]) -> float:
    return sum(map(finite_or_infinite, values)) / len(values) if values else math.nan


def _joint_error(figures: Sequence[Divergence | Top1 | Loss]) -> float | None:
    """Return the standard error of the mean of several streams; None where they are not of the same sequences."""
    means = _joint_means(figures)
    return None if means is None else standard_error(means)


def _joint_means(figures: Sequence[Divergence | Top1 | Loss]) -> tuple[float, ...] | None:
    """Return each sequence's mean over several streams; None where they are not of the same sequences."""
    rows = [[finite_or_infinite(mean) for mean in figure.by_sequence or ()] for figure in figures]
    alike = len({len(row) for row in rows}) == 1
    return tuple(float(mean) for mean in np.mean(rows, axis=0)) if alike else None
