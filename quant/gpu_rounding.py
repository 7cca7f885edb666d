"""Rounding of groups of columns on a GPU, in the steps of ``kernels`` and ``column_rounding``. Needs Triton."""

import numpy as np
from torch import Tensor

from .affine import STORAGE
from .gpu_kernels import fit_groups, round_strips
from .kernels import clip_step

_FITTED = 16  # rows of a program that fits grids
_PANEL = 8  # columns that a program which rounds takes at once; their codes are the bytes of one integer


def round_wave(
    values: Tensor,
    goal: Tensor,
    wave: int,
    inverses: Tensor,
    trials: Tensor,
    storage: np.dtype[np.generic],
    bits: int,
    feedback: Tensor | None,
    lost: Tensor,
    grids: Tensor,
    codes: Tensor,
) -> None:
    """Round one group of columns of each strip, the group ``wave`` of the first, one before it for each later strip.

    As ``column_rounding.round_group``, all tensors float32 and on the GPU. values: ``[strips, lines, group_size]``, of
    each strip and its group: the goal as the groups before have changed it; line n of a strip is of block ``n //
    height``, where strips have ``height`` rows of a block. goal: ``[strips, lines, columns]``, of which the groups
    become their difference from the rounded values. inverses: ``[groups, group_size, group_size]``, transposed, so that
    what a column gets from those before it is one row. lost: ``[strips, blocks, block's rows, group_size]``, what
    earlier waves lost and later ones make up for. grids: ``[2, groups, strips * lines]``, where the scales and biases
    that are taken are written. codes: uint8, as ``goal``, written.
    """
    strips, lines, size = values.shape
    blocks = lost.shape[1]
    top, kind = float((1 << bits) - 1), STORAGE[storage]
    fitted = values.new_empty((2, strips * lines))
    fit_groups[(-(-strips * lines // _FITTED),)](
        values, *fitted, strips * lines, clip_step(bits), top=top, storage=kind, size=size, height=_FITTED
    )
    round_strips[blocks, strips](
        values, goal, goal.shape[2], wave, inverses, len(inverses), trials,
        values if feedback is None else feedback, lost, fitted, grids, codes, blocks,
        top=top, storage=kind, has_feedback=feedback is not None,
        size=size, trials=len(trials), strips=strips, height=lines // blocks, panel=_PANEL, num_warps=1,
    )  # fmt: skip
