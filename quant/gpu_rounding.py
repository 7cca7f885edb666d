"""Rounding of one group of columns on a GPU, in the steps of ``kernels`` and ``column_rounding``. Needs Triton."""

import numpy as np
import torch
from torch import Tensor

from .affine import STORAGE
from .column_rounding import ROWS
from .gpu_kernels import fit_groups, round_blocks
from .kernels import clip_step

_FITTED = 16  # rows of a program that fits grids
_PANEL = 8  # columns that a program which rounds takes at once; their codes are the bytes of one integer


def round_group(
    adjusted: Tensor,
    goal: Tensor,
    first: int,
    inverse: Tensor,
    grids: Tensor,
    storage: np.dtype[np.generic],
    bits: int,
    feedback: Tensor | None,
    scales: Tensor,
    biases: Tensor,
    codes: Tensor,
) -> None:
    """Round one group of columns on the GPU; as ``column_rounding.round_group``, all tensors float32 and there.

    adjusted: ``[rows, group_size]``. goal: ``[rows, columns]``, of which the group becomes its difference from the
    rounded values. scales, biases: ``[rows]``, where the grid that is taken is written: the least-squares one, or one
    of those around it. codes: uint8 ``[rows, columns]``, written.
    """
    rows, size = adjusted.shape
    top, kind = float((1 << bits) - 1), STORAGE[storage]
    fit_groups[(-(-rows // _FITTED),)](
        adjusted, scales, biases, rows, clip_step(bits), top=top, storage=kind, size=size, height=_FITTED
    )
    lost = torch.empty_like(adjusted)
    round_blocks[(-(-rows // ROWS),)](
        adjusted, goal, goal.shape[1], first, inverse.T.contiguous(), grids,
        adjusted if feedback is None else feedback, lost, scales, biases, codes, rows,
        top=top, storage=kind, has_feedback=feedback is not None,
        size=size, trials=len(grids), height=ROWS, panel=_PANEL, num_warps=1,
    )  # fmt: skip
