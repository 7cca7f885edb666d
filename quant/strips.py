"""Rounding of a matrix on a GPU: the strips of all blocks of rows are at work at once, each in a group of its own.

A row of a block waits for those before it, and a group of columns for those before it. So while one strip of a block
is rounded in a group, the strip before it is already in the next group. What a strip lost in a group is added to the
groups behind it in two ways: to those near it at once, to those behind them some groups at a time. All strips do the
same in groups that are one apart, so that it is one product of a batch of matrices.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .affine import NOT_QUANTIZABLE, QuantizationConfig
from .column_rounding import ROWS
from .error_passing import NEAR, Passing
from .packed_matrix import PackedMatrix, packed

RoundWave = Callable[..., None]  # ``gpu_rounding.round_wave``
_MOST = 16  # strips of a block
_PROGRAMS = 8  # that a multiprocessor has the registers for


def round_in_strips(
    round_wave: RoundWave,
    goal: Tensor,
    factor: Tensor,
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
    trials: Tensor,
    feedback: Tensor | None,
) -> PackedMatrix:
    """Round column by column, as ``rounding.round_columns``; raises ValueError for groups that are not finite.

    trials: the grids that each group tries, ``[trials, 2]``.
    """
    (rows, columns), size, device = goal.shape, quantization.group_size, goal.device
    groups, blocks = columns // size, -(-rows // ROWS)
    strips = strips_of(blocks, device)
    near, far = (passing := Passing(factor, size)).near_and_far()
    inverses = passing.inverses.transpose(1, 2).contiguous()
    width = far.shape[1]
    lost = pad(goal, (0, width - columns, 0, blocks * ROWS - rows)).reshape(blocks, strips, -1, width)
    lost = lost.transpose(0, 1).flip(0).flatten(1, 2)  # ``[strips, lines, width]``, the last strip of each block first
    ahead, codes = lost.clone(), torch.empty(lost.shape, dtype=torch.uint8, device=device)
    lines = lost.shape[1]
    grids = lost.new_empty((2, groups, strips * lines))
    counts = lost.new_zeros((blocks, ROWS, ROWS)) if feedback is None else feedback.to(lost).contiguous()
    errors = lost.new_empty((strips, blocks, ROWS, size))
    strides = (lines * width + size, width, 1)  # of a batch of strips, each one group behind the one before it
    for wave in range(groups + strips - 1):
        base = wave - strips + 1  # group of the first strip
        begin, end = max(0, -base), min(strips, groups - base)
        count, place = end - begin, begin * lines * width + (base + begin) * size
        most = (base + end - 2) * size  # columns whose losses may not have reached all of the next groups
        if wave % NEAR == 0 and most > 0:
            batch = far.as_strided((count, most, NEAR * size), (size, width, 1), (base + begin) * size)
            ahead.as_strided((count, lines, NEAR * size), strides, place).baddbmm_(lost[begin:end, :, :most], batch)
        round_wave(ahead, lost, base, inverses, trials, storage, quantization.bits, counts, errors, grids, codes)
        own = lost.as_strided((count, lines, size), strides, place)
        behind = ahead.as_strided((count, lines, NEAR * size), strides, place + size)
        behind.baddbmm_(own, near[base + begin : base + end])
    scales, biases = (_in_order(side.T, strips, blocks)[:rows] for side in grids)
    if not bool(torch.isfinite(scales).all() & torch.isfinite(biases).all()):
        raise ValueError(f"groups {NOT_QUANTIZABLE}")
    ordered = _in_order(codes.flatten(0, 1)[:, :columns], strips, blocks)[:rows]
    return PackedMatrix(packed(ordered, quantization.bits), scales, biases)


def strips_of(blocks: int, device: torch.device) -> int:
    """Return into how many strips each of so many blocks is cut: as many as are at work at once."""
    room = _PROGRAMS * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)
    strips = 2
    while strips < _MOST and 2 * strips * blocks <= room:
        strips *= 2
    return strips


def _in_order(lines: Tensor, strips: int, blocks: int) -> Tensor:
    """Return the rows of blocks ``[rows, ...]``, of the lines of all strips."""
    return lines.reshape(strips, blocks, ROWS // strips, -1).flip(0).transpose(0, 1).reshape(blocks * ROWS, -1)
