"""By how much the errors of a matrix's columns count, as the quantizer's loops need it.

Only sums of two, quotients and square roots are taken, which give the same bits on every machine.
"""

import numpy as np
from numpy.typing import NDArray


def problems_of(importance: NDArray[np.generic], columns: int, is_weighted: bool) -> list[str]:
    """Return why a matrix of so many columns cannot be quantized with an importance.

    is_weighted: whether the method weighs errors.
    """
    problems = [] if is_weighted else ["the method weighs no errors: give no importance"]
    if importance.shape != (columns,):
        problems.append(f"the importance has shape {list(importance.shape)}: {columns} columns need one number each")
    wide = importance.astype(np.float64)
    if not np.isfinite(wide).all() or (wide < 0).any():
        problems.append("the importance is not finite, or negative")
    return problems


def _normalized(importance: NDArray[np.generic], group_size: int) -> NDArray[np.float32]:
    """Return an importance ``[columns]`` as ``[groups, group_size]`` with a mean of 1 in each group, ones for zeros."""
    wide = importance.astype(np.float64).reshape(-1, group_size)
    largest = wide.max(-1, keepdims=True)
    wide = np.where(largest > 0, wide / np.where(largest > 0, largest, 1), 1.0)
    sums = wide
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return (wide * (group_size / sums)).astype(np.float32)


def weighing(importance: NDArray[np.generic], group_size: int) -> NDArray[np.float32]:
    """Return what ``kernels.quantize_groups`` needs of an importance ``[columns]``: ``[groups, 7, group_size]``.

    Errors are weighted by its square root, which left less divergence than all of it at 3, 4 and 5 bit
    (docs/fidelity.md): where gains are small, inputs are often large, and clipping errs in one direction. The outlines
    are made of those weights over the group's largest: ones; their 16th and their 8th root; one where they are at least
    0.01, or at least 0.1, else zero.
    """
    weights = _normalized(np.sqrt(importance.astype(np.float64)), group_size)
    share = weights / weights.max(-1, keepdims=True)
    eighth = np.sqrt(np.sqrt(np.sqrt(share)))
    outlines = (np.ones_like(share), np.sqrt(eighth), eighth, share >= 0.01, share >= 0.1)
    return np.ascontiguousarray(np.stack([weights, _normalized(importance, group_size), *outlines], 1), np.float32)
