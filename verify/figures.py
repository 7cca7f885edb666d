"""The rows of a report: weights, activations and predictions of a bundle against those of its checkpoint.

Where a field is None although something was measured, JSON has no number for the figure: it is not finite.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from ..convert.schema import number, whole
from ..convert.typed_json import MAY_BE_MISSING, NOT_STORED, Key

Amount = Annotated[float, number(0)]
Share = Annotated[float, number(0, 1)]
Index = Annotated[int, whole(0, 1 << 20)]
T = TypeVar("T")
BUNDLE, NOISE, CONTROL = "bundle", "noise", "control"
_BySequence = Annotated[tuple[float, ...], NOT_STORED]  # the mean of each sequence, from which standard errors come
_Means = tuple[Amount | None, ...] | None  # the same, stored: two reports are compared by them


def finite_or_infinite(value: float | None) -> float:
    """Return a figure for comparing: infinity where a report has None."""
    return math.inf if value is None else value


def standard_error(means: Sequence[float]) -> float | None:
    """Return the standard error of the mean of some sequences; None for a single one, which has no spread."""
    count = len(means)
    if count < 2:
        return None
    middle = sum(means) / count
    return math.sqrt(sum((mean - middle) * (mean - middle) for mean in means) / (count - 1) / count)


@dataclass(frozen=True)
class Difference:
    """How far an array is from the expected one; ``relative_l2`` is over the norm of the expected one."""

    relative_l2: Amount | None
    cosine: float | None
    max_abs: Amount | None


@dataclass(frozen=True)
class WeightRow:
    """A stored tensor, or a depformer step's or projection's rows of it, against the checkpoint's.

    tensor: its name in ``file``; source: in the checkpoint. projection: ``q``, ``k`` or ``v`` of a packed matrix.
    parameters: how many were compared. clipped: share of weights beyond the range of their group's codes; unequal:
    values that are not the checkpoint's in the bundle's dtype; one of them is None. squared_error, squared_norm: sums
    that the verdict needs.
    """

    tensor: str
    source: str
    file: str
    component: str
    module: str
    layer: Index | None
    step: Index | None
    projection: Annotated[str | None, Key("part")]
    bits: Index | None
    group_size: Index | None
    bits_per_weight: Amount
    parameters: int
    relative_rmse: Amount | None
    sqnr_db: float | None
    cosine: float | None
    max_abs: Amount | None
    max_abs_at: tuple[int, ...]
    clipped: Share | None
    unequal: int | None
    squared_error: Annotated[float, NOT_STORED] = 0.0
    squared_norm: Annotated[float, NOT_STORED] = 0.0

    @property
    def name(self) -> str:
        """The tensor with its step and projection."""
        step = "" if self.step is None else f" step {self.step}"
        return f"{self.tensor}{step}" + (f" {self.projection}" if self.projection else "")


@dataclass(frozen=True)
class ActivationRow:
    """The output of a block, or of what stands between blocks, at one depformer step.

    local: of a block whose input is the reference's, over what it adds; accumulated: of a block whose input is the
    bundle's own, over the whole stream. noise_accumulated: of the checkpoint itself in 16 bit, the noise floor.
    """

    component: str
    layer: Index | None
    sublayer: Annotated[str, Key("part")]
    step: Index | None
    local: Difference | None
    accumulated: Difference
    noise_accumulated: Difference

    @property
    def name(self) -> str:
        """The block, in words."""
        layer = "" if self.layer is None else f" layer {self.layer}"
        step = "" if self.step is None else f" of step {self.step}"
        return f"{self.component}{layer} {self.sublayer}{step}"


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(reference || bundle) in nats/token. The mean of several streams has no percentiles.

    by_sequence: the mean of each sequence; reports of earlier versions have none.
    """

    mean: Amount | None
    standard_error: Amount | None
    by_sequence: _Means = None
    median: Amount | None = None
    p90: Amount | None = None
    p99: Amount | None = None
    p99_9: Amount | None = None
    max: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class Top1:
    """How often the top-1 tokens of both are equal."""

    agreement: Share | None
    standard_error: Amount | None
    by_sequence: _BySequence = ()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Negative log-likelihood of the next token in nats/token, and by how much the bundle's is larger."""

    positions: int | None = None
    reference: float | None
    bundle: float | None
    change: float | None
    standard_error: Amount | None
    by_sequence: _BySequence = ()
    perplexity_ratio: Amount | None


@dataclass(frozen=True)
class Cosine:
    """Cosine of two vectors, at each position: mean and smallest."""

    mean: float | None
    min: float | None


@dataclass(frozen=True)
class PredictionFigures:
    """Predictions of one stream, or the mean of several, against the reference's; None where no position counts.

    logits: their cosine; a mean of several streams has none.
    """

    positions: int
    kl: Divergence | None
    top1: Top1 | None
    loss: Loss | None
    logits: Cosine | None = None


@dataclass(frozen=True)
class StreamFigures:
    """One stream's predictions by each model.

    noise: the checkpoint in 16 bit, the noise floor. control: the checkpoint, rounded to nearest at the bundle's own
    bits; reports of earlier versions have none. controls: the same at other bits, by their number.
    """

    bundle: PredictionFigures
    noise: PredictionFigures
    control: PredictionFigures | None = None
    controls: dict[str, PredictionFigures] = field(default_factory=dict)

    def by_model(self) -> dict[str, PredictionFigures]:
        """Return the figures under the names of their models."""
        known = {BUNDLE: self.bundle, NOISE: self.noise} | ({CONTROL: self.control} if self.control else {})
        return known | self.controls

    @classmethod
    def of(cls, figures: Mapping[str, PredictionFigures]) -> "StreamFigures":
        """Return figures that stand under the names of their models."""
        return cls(figures[BUNDLE], figures[NOISE], figures[CONTROL], _at_other_bits(figures))


@dataclass(frozen=True)
class HiddenFigures:
    """Cosines of the temporal transformer's output, frame by frame; see ``StreamFigures`` for the models."""

    bundle: Cosine
    noise: Cosine
    control: Cosine
    controls: dict[str, Cosine]

    @classmethod
    def of(cls, figures: Mapping[str, Cosine]) -> "HiddenFigures":
        """Return cosines that stand under the names of their models."""
        return cls(figures[BUNDLE], figures[NOISE], figures[CONTROL], _at_other_bits(figures))


def _at_other_bits(figures: Mapping[str, T]) -> dict[str, T]:
    """Return the figures of controls at other bits than the bundle's."""
    return {name: one for name, one in figures.items() if name not in (BUNDLE, NOISE, CONTROL)}


@dataclass(frozen=True)
class FirstDifference:
    """Where two greedy sessions first differ."""

    frame: int
    stream: str


@dataclass(frozen=True)
class Rollout:
    """A greedy session on the checkpoint and on the bundle; agreement: share of equal tokens, frame by frame."""

    voice: Annotated[str | None, MAY_BE_MISSING]
    frames: int
    first_difference: FirstDifference | None
    agreement: tuple[Share, ...]
    agreement_text: Annotated[Share | None, MAY_BE_MISSING]
    agreement_agent: Share
