"""The inner loop of GPTQ on a GPU: what ``column_rounding`` does on a processor, as a Triton kernel.

Triton comes with PyTorch's builds for GPUs. A program of the kernel rounds one block of rows; the grids that a row
tries stand side by side in its threads. Sums are taken in another order than on a processor, so codes may differ where
two are as good.
"""

import logging
from functools import cache

import numpy as np
import torch
import triton
from torch import Tensor
from triton import language as tl

from .affine import STORAGE
from .column_rounding import ROWS
from .group import BFLOAT16, FLOAT16

_log = logging.getLogger(__name__)
_MAGIC = tl.constexpr(12582912.0)  # as in ``group``: adding and subtracting it rounds to the nearest even
_BFLOAT16, _FLOAT16 = tl.constexpr(BFLOAT16), tl.constexpr(FLOAT16)


@triton.jit
def _stored(value, storage: tl.constexpr):
    """Round to the storage dtype, saturated at its largest value."""
    if storage == _FLOAT16:
        return tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    if storage == _BFLOAT16:
        return tl.minimum(tl.maximum(value, -3.3895314e38), 3.3895314e38).to(tl.bfloat16).to(tl.float32)
    return value


@triton.jit
def _round_blocks(
    adjusted, goal, columns, first, inverse, grids, feedback, lost, scales, biases, codes, rows,
    top: tl.constexpr, storage: tl.constexpr, has_feedback: tl.constexpr,
    size: tl.constexpr, trials: tl.constexpr, height: tl.constexpr,
):  # fmt: skip
    """Round one group of columns of one block of rows; see ``round_group``.

    inverse: transposed, so that what a column gets from those before it is one row. lost: ``[rows, size]``, scratch.
    """
    block = tl.program_id(0)
    start = block * height
    index, trial, before = tl.arange(0, size), tl.arange(0, trials), tl.arange(0, height)
    share, shift = tl.load(grids + 2 * trial), tl.load(grids + 2 * trial + 1)
    middle = top / 2.0 * (1.0 - share) + shift
    for row in range(height):
        if start + row < rows:
            line = (start + row).to(tl.int64)
            whole, low = tl.load(scales + line), tl.load(biases + line)
            scale = _stored(whole * share, storage)
            bias = _stored(low + whole * middle, storage)
            losses = tl.zeros((size, trials), tl.float32)
            chosen = tl.zeros((size, trials), tl.float32)
            sums = tl.zeros((trials,), tl.float32)
            if has_feedback:
                ratios = tl.load(feedback + (block * height + before) * height + row)
                earlier = (start + before).to(tl.int64)[:, None] * size + index[None, :]
                errors = tl.load(lost + earlier, mask=(before < row)[:, None], other=0.0)
                tl.store(lost + line * size + index, tl.sum(ratios[:, None] * errors, 0))
                tl.debug_barrier()
            for column in range(size):
                reached = tl.load(inverse + column * size + index)
                diagonal = tl.load(inverse + column * size + column)
                now = tl.load(adjusted + line * size + column) - tl.sum(reached[:, None] * losses, 0)
                passed = 0.0
                if has_feedback:
                    passed = tl.load(lost + line * size + column)
                nearest = ((now + diagonal * passed - bias) / scale + _MAGIC) - _MAGIC
                nearest = tl.minimum(tl.maximum(nearest, 0.0), top)
                nearest = tl.where(scale != 0.0, nearest, 0.0)
                loss = (now - (nearest * scale + bias)) / diagonal
                total = loss + passed
                sums += total * total
                here = (index == column)[:, None]
                losses = tl.where(here, loss[None, :], losses)
                chosen = tl.where(here, nearest[None, :], chosen)
            best = tl.argmin(sums, 0)
            taken = trial == best
            scale_taken = tl.sum(tl.where(taken, scale, 0.0), 0)
            bias_taken = tl.sum(tl.where(taken, bias, 0.0), 0)
            code = tl.sum(tl.where(taken[None, :], chosen, 0.0), 1)
            tl.debug_barrier()
            tl.store(lost + line * size + index, tl.sum(tl.where(taken[None, :], losses, 0.0), 1))
            tl.store(scales + line, scale_taken)
            tl.store(biases + line, bias_taken)
            place = line * columns + first + index
            tl.store(goal + place, tl.load(goal + place) - (code * scale_taken + bias_taken))
            tl.store(codes + place, code.to(tl.uint8))
            tl.debug_barrier()


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
    """Round one group of columns on the GPU; as ``column_rounding.round_group``, all float32 tensors there.

    adjusted: ``[rows, group_size]``. goal: ``[rows, columns]``, of which the group becomes its difference from the
    rounded values. scales, biases: ``[rows]``, replaced by the grid that is taken. codes: uint8 ``[rows, columns]``.
    """
    rows, size = adjusted.shape
    lost = torch.empty_like(adjusted)
    _round_blocks[(-(-rows // ROWS),)](
        adjusted, goal, goal.shape[1], first, inverse.T.contiguous(), grids,
        adjusted if feedback is None else feedback, lost, scales, biases, codes, rows,
        top=float((1 << bits) - 1), storage=STORAGE[storage], has_feedback=feedback is not None,
        size=size, trials=len(grids), height=ROWS, num_warps=max(1, size // 64),
    )  # fmt: skip
