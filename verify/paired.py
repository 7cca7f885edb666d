"""The divergence of two bundles from one checkpoint, sequence by sequence, and whether the difference is clear."""

import math
from dataclasses import dataclass
from typing import Literal

from .figures import Divergence, standard_error

Nearer = Literal["a", "b", "unclear"]
# Student's t: 95 % of values lie within this many standard errors, by degrees of freedom (the nearest smaller row)
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 10: 2.23, 15: 2.13, 20: 2.09, 40: 2.02, 120: 1.98}


@dataclass(frozen=True)
class PairedDifference:
    """How much farther A is from the original than B: mean KL divergences in nats/token, and A's minus B's.

    standard_error: of the difference, from the sequences' own differences; None for a single sequence. Where a report
    is of an earlier version and has no values by sequence, it is the root of both errors' squares, which is too large:
    paired is False. sequences: how many were paired. nearer: ``unclear`` where the difference is within the 95 %
    interval, or has no standard error.
    """

    a: float
    b: float
    difference: float
    standard_error: float | None
    paired: bool
    sequences: int | None
    nearer: Nearer

    @property
    def ratio(self) -> float | None:
        """The larger divergence over the smaller one; None if that is 0."""
        return max(self.a, self.b) / min(self.a, self.b) if min(self.a, self.b) > 0 else None


def paired_difference(first: Divergence, second: Divergence) -> PairedDifference | None:
    """Compare two divergences on the same sequences; None where a mean is not finite."""
    if first.mean is None or second.mean is None:
        return None
    apart = _apart(first, second)
    error, sequences = (None, None) if apart is None else (standard_error(apart), len(apart))
    if apart is None and first.standard_error is not None and second.standard_error is not None:
        error = math.hypot(first.standard_error, second.standard_error)
    difference = first.mean - second.mean
    return PairedDifference(
        first.mean, second.mean, difference, error, apart is not None, sequences, _nearer(difference, error, sequences)
    )


def _apart(first: Divergence, second: Divergence) -> list[float] | None:
    """Return the difference in each sequence; None where they are not known."""
    one, other = first.by_sequence or (), second.by_sequence or ()
    known = [(a, b) for a, b in zip(one, other, strict=False) if a is not None and b is not None]
    if not known or len({len(one), len(other), len(known)}) > 1:
        return None
    return [a - b for a, b in known]


def _nearer(difference: float, error: float | None, sequences: int | None) -> Nearer:
    if error is None or difference == 0:
        return "unclear"
    freedom = max(_T) if sequences is None else sequences - 1
    width = _T[max(known for known in _T if known <= freedom)] * error
    if abs(difference) <= width:
        return "unclear"
    return "b" if difference > 0 else "a"
