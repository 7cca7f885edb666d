"""Rounding of a matrix on a GPU, as a wavefront over strips of rows and groups of columns.

A row of a block waits for the rows before it, and a group of columns for the groups before it. So each block is cut
into strips: in wave n, strip s rounds group n - s, while the strip before it is one group further. What strips lose is
added to the groups behind: to the nearest ones in the same wave, to those behind them every few waves. All strips do
that side by side, as one batched matrix product.
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
_MOST_STRIPS = 16  # of a block
_PROGRAMS_PER_SM = 8  # which a multiprocessor has the registers for


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

    trials: the grids that each group tries, ``[trials, 2]``. The result is on the device of the goal.
    """
    (rows, columns), size, device = goal.shape, quantization.group_size, goal.device
    groups, blocks = columns // size, -(-rows // ROWS)
    strips = strips_of(blocks, device)
    near, far = (passing := Passing(factor, size)).near_and_far()
    inverses = passing.inverses.transpose(1, 2).contiguous()
    width = far.shape[1]
    # [strips, lines, width], the last strip of each block first: goal - rounded in the groups that are rounded, the
    # goal in the others, which ``far`` multiplies by zero.
    lost = pad(goal, (0, width - columns, 0, blocks * ROWS - rows)).reshape(blocks, strips, -1, width)
    lost = lost.transpose(0, 1).flip(0).flatten(1, 2)
    adjusted, codes = lost.clone(), torch.empty(lost.shape, dtype=torch.uint8, device=device)
    lines = lost.shape[1]
    grids = lost.new_empty((2, groups, strips * lines))
    counts = lost.new_zeros((blocks, ROWS, ROWS)) if feedback is None else feedback.to(lost).contiguous()
    errors = lost.new_empty((strips, blocks, ROWS, size))
    strides = (lines * width + size, width, 1)  # of a batch of strips, each one group behind the one before it
    for wave in range(groups + strips - 1):
        first_group = wave - strips + 1  # of the first strip
        begin, end = max(0, -first_group), min(strips, groups - first_group)  # strips that have a group
        count, offset = end - begin, begin * lines * width + (first_group + begin) * size
        far_columns = (first_group + end - 2) * size  # whose losses have not reached all of the next groups
        if wave % NEAR == 0 and far_columns > 0:
            batch = far.as_strided((count, far_columns, NEAR * size), (size, width, 1), (first_group + begin) * size)
            next_groups = adjusted.as_strided((count, lines, NEAR * size), strides, offset)
            next_groups.baddbmm_(lost[begin:end, :, :far_columns], batch)
        round_wave(
            adjusted, lost, first_group, inverses, trials, storage, quantization.bits, counts, errors, grids, codes
        )
        losses = lost.as_strided((count, lines, size), strides, offset)
        next_groups = adjusted.as_strided((count, lines, NEAR * size), strides, offset + size)
        next_groups.baddbmm_(losses, near[first_group + begin : first_group + end])
    of_groups = adjusted[..., :columns].reshape(strips, lines, groups, size)  # as they were when they were rounded
    if not bool(torch.isfinite(of_groups.amax(-1) - of_groups.amin(-1)).all()):
        raise ValueError(f"groups {NOT_QUANTIZABLE}")
    scales, biases = (_in_order(side.T, strips, blocks)[:rows] for side in grids)
    ordered = _in_order(codes.flatten(0, 1)[:, :columns], strips, blocks)[:rows]
    return PackedMatrix(packed(ordered, quantization.bits), scales, biases)


def strips_of(blocks: int, device: torch.device) -> int:
    """Return into how many strips each of so many blocks is cut: as many as are at work at once."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    strips = 2
    while strips < _MOST_STRIPS and 2 * strips * blocks <= _PROGRAMS_PER_SM * processors:
        strips *= 2
    return strips


def _in_order(lines: Tensor, strips: int, blocks: int) -> Tensor:
    """Return the rows of blocks ``[rows, ...]``, of the lines of all strips."""
    return lines.reshape(strips, blocks, ROWS // strips, -1).flip(0).transpose(0, 1).reshape(blocks * ROWS, -1)
