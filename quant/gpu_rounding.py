"""Rounding of groups of columns on a GPU, in the steps of ``kernels`` and ``column_rounding``. Needs Triton."""

import numpy as np
from torch import Tensor

from .affine import STORAGE
from .column_rounding import ROWS
from .gpu_kernels import fit_groups, round_strips
from .kernels import clip_step

_FITTED = 16  # rows of a program that fits grids
_PANEL = 8  # columns that a program which rounds takes at once; their codes are the bytes of one integer


def round_wave(
    adjusted: Tensor,
    lost: Tensor,
    first_group: int,
    inverses: Tensor,
    trials: Tensor,
    storage: np.dtype[np.generic],
    bits: int,
    feedback: Tensor,
    errors: Tensor,
    grids: Tensor,
    codes: Tensor,
) -> None:
    """Round one group of columns of each strip: strip n in group ``first_group + n``, if there is such a group.

    As ``column_rounding.round_group``, all tensors float32 and on the GPU. adjusted: ``[strips, lines, width]``, the
    goal as what is lost so far has changed it; lines of a strip are of one block after another. lost: the same shape,
    of which the groups become their difference from the rounded values. inverses: ``[groups, group_size, group_size]``,
    transposed, so that what a column gets from those before it is one row. feedback: ``[blocks, 64, 64]``. errors:
    ``[strips, blocks, 64, group_size]``, of each block in the groups that its strips are in: what later strips make up
    for. grids: ``[2, groups, strips * lines]``, where the scales and biases that are taken are written. codes: uint8,
    as ``lost``, written. The last strip of each block is the first.
    """
    (strips, lines, width), (groups, size, _) = adjusted.shape, inverses.shape
    top, kind = float((1 << bits) - 1), STORAGE[storage]
    fitted = adjusted.new_empty((2, strips * lines))
    fit_groups[-(-lines // _FITTED), strips](
        adjusted, width, first_group, groups, fitted, strips, lines, clip_step(bits),
        top=top, storage=kind, size=size, height=_FITTED,
    )  # fmt: skip
    round_strips[errors.shape[1], strips](
        adjusted, lost, width, first_group, inverses, groups, trials, feedback, errors, fitted, grids, codes,
        errors.shape[1], strips,
        top=top, storage=kind, size=size, trials=len(trials), rows=ROWS, panel=_PANEL, num_warps=1,
    )  # fmt: skip
