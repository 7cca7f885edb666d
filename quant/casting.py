"""Casting weights between float dtypes, with a count of what does not fit."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .group import largest_masked


@dataclass(frozen=True)
class Cast:
    """An array in its new dtype, and how many of its values overflowed or became zero on the way there."""

    array: NDArray[np.generic]
    overflowed: int
    flushed: int


def cast(array: NDArray[np.generic], dtype: np.dtype[np.generic]) -> Cast:
    """Cast to a float dtype, rounding to nearest even.

    A finite value too large for the dtype becomes its largest of that sign (an infinity would turn every output of a
    model into NaN); one too small becomes zero. Both are counted.
    """
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return Cast(array, 0, 0)
    wide = array.astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(dtype)
    overflow = np.isinf(narrow) & np.isfinite(wide)
    overflowed = int(np.count_nonzero(overflow))
    if overflowed:
        largest = -np.nextafter(dtype.type(-np.inf), dtype.type(0))
        narrow[overflow] = np.copysign(np.float32(largest), wide[overflow]).astype(dtype)
    flushed = int(np.count_nonzero(wide)) - int(np.count_nonzero(narrow))
    return Cast(narrow, overflowed, flushed)


def count_non_finite(array: NDArray[np.generic]) -> int:
    """Return how many values of a float array are NaN or infinite."""
    if array.dtype == ml_dtypes.bfloat16:
        mask = np.uint16(0x7F80)
        words = np.ascontiguousarray(array).reshape(-1).view(np.uint16)
        if largest_masked(words, mask) < mask:
            return 0
    return array.size - int(np.count_nonzero(np.isfinite(array)))
