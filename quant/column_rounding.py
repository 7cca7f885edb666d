"""The inner loop of GPTQ: one group of columns, rounded one after another, with the grid that leaves the least error.

Some rows are taken at a time. The grids that a row tries stand side by side, so that the loops over them become vector
instructions; no `fastmath`, as in ``kernels``.
"""

import numpy as np
from numba import njit

from .group import stored

ROWS = 64  # of a block: they may make up for each other's errors


@njit(nogil=True, cache=True, error_model="numpy")
def round_group(adjusted, goal, first, inverse, grids, storage, top, feedback, scales, biases, codes):
    """Round one group of columns; the columns that follow in the group make up for the error of each.

    Every row takes the one of some grids that leaves the least squared error of its output.

    adjusted: ``[rows, group_size]``, the goal as the groups before have changed it. goal: ``[rows, columns]``, of which
    the group from column ``first`` on becomes its difference from the rounded values. inverse: ``[group_size,
    group_size]``, the group's part of the upper Cholesky factor of the inverse moments. grids: float32 ``[trials, 2]``:
    factors of the scale, and shifts of the bias in scales, beside a change that keeps the middle of the range. storage:
    of scales and biases, as in ``group``. feedback: None, or ``[blocks, 64, 64]`` of the goal's dtype, each upper
    triangular: by how much the error of one row of a block counts for a later one. scales, biases: ``[rows]``, the grid
    to begin with, and in the end the one taken. codes: uint8 ``[rows, columns]``, written.
    """
    for number in range(-(-len(adjusted) // ROWS)):
        start, end = number * ROWS, min(len(adjusted), (number + 1) * ROWS)
        _round_block(
            adjusted[start:end],
            goal[start:end],
            first,
            inverse,
            grids,
            storage,
            top,
            None if feedback is None else feedback[number],
            scales[start:end],
            biases[start:end],
            codes[start:end],
        )


@njit(nogil=True, cache=True, error_model="numpy")
def _round_block(adjusted, goal, first, inverse, grids, storage, top, feedback, scales, biases, codes):
    """Round one block of rows; all as in ``round_group``."""
    rows, size = adjusted.shape
    trials = grids.shape[0]
    values = np.empty((size, trials), adjusted.dtype)  # of one row, as each grid leaves them
    losses, chosen = np.empty_like(values), np.empty_like(values)
    scale, bias, sums = np.empty_like(values[0]), np.empty_like(values[0]), np.empty_like(values[0])
    lost = np.empty((rows, size), adjusted.dtype)  # by the grid that is taken
    passed = np.empty(size, adjusted.dtype)
    bounds = np.zeros(2, adjusted.dtype)  # of codes, in the dtype of the values, so that nothing is widened
    bounds[1] = top
    least, most = bounds
    for row in range(rows):
        for trial in range(trials):
            whole, share = np.float32(scales[row]), grids[trial, 0]
            middle = np.float32(top) / np.float32(2) * (np.float32(1) - share) + grids[trial, 1]
            scale[trial] = stored(whole * share, storage)
            bias[trial] = stored(np.float32(biases[row]) + whole * middle, storage)
            sums[trial] = least
        for column in range(size):
            passed[column] = least
        if feedback is not None:
            for other in range(row):
                share = feedback[other, row]
                for column in range(size):
                    passed[column] += share * lost[other, column]
        for column in range(size):
            for trial in range(trials):
                values[column, trial] = adjusted[row, column]
        for column in range(size):
            diagonal, of_rows = inverse[column, column], passed[column]
            now, code, loss = values[column], chosen[column], losses[column]
            moved = diagonal * of_rows
            for trial in range(trials):
                nearest = np.rint((now[trial] + moved - bias[trial]) / scale[trial])
                nearest = nearest if nearest > least else least
                nearest = nearest if nearest < most else most
                code[trial] = nearest if scale[trial] != least else least
                loss[trial] = (now[trial] - (code[trial] * scale[trial] + bias[trial])) / diagonal
                total = loss[trial] + of_rows
                sums[trial] += total * total
            for later in range(column + 1, size):
                share, others = inverse[column, later], values[later]
                for trial in range(trials):
                    others[trial] -= share * loss[trial]
        best = 0
        for trial in range(trials):
            if sums[trial] < sums[best]:
                best = trial
        scales[row], biases[row] = scale[best], bias[best]
        for column in range(size):
            index = first + column
            rounded = chosen[column, best] * scale[best] + bias[best]
            lost[row, column] = losses[column, best]
            goal[row, index] -= rounded
            codes[row, index] = np.uint8(chosen[column, best])
