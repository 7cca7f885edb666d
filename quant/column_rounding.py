"""The inner loop of GPTQ: one group of columns, rounded one after another, each row by itself.

Some rows are taken at a time and transposed, so that a column of them is contiguous and the loops over it become vector
instructions; no `fastmath`, as in ``kernels``.
"""

import numpy as np
from numba import njit

_ROWS = 64  # taken at a time: with a group of 64 columns they fit into the cache nearest to the processor


@njit(nogil=True, cache=True, error_model="numpy")
def round_group(adjusted, goal, weight, first, inverse, scales, biases, top, codes, statistics):
    """Round one group of columns; the columns that follow in the group make up for the error of each.

    adjusted: ``[rows, group_size]``, the goal as the groups before have changed it. goal: ``[rows, columns]``, of which
    the group from column ``first`` on becomes its difference from the rounded values. weight: ``[rows, columns]``, from
    which errors are computed. inverse: ``[group_size, group_size]``, the group's part of the upper Cholesky factor of
    the inverse moments. scales, biases: ``[rows]``. codes: uint8 ``[rows, columns]``, written. statistics: float64
    ``[2]``: squared error and squared norm are added to it.
    """
    rows, size = adjusted.shape
    values = np.empty((size, _ROWS), adjusted.dtype)
    losses = np.empty(_ROWS, adjusted.dtype)
    rounded = np.empty((size, _ROWS), adjusted.dtype)
    chosen = np.empty((size, _ROWS), adjusted.dtype)
    bounds = np.zeros(2, adjusted.dtype)  # of codes, in the dtype of the values, so that nothing is widened
    bounds[1] = top
    least, most = bounds
    for start in range(0, rows, _ROWS):
        count = min(_ROWS, rows - start)
        scale, bias = scales[start : start + count], biases[start : start + count]
        for row in range(count):
            for column in range(size):
                values[column, row] = adjusted[start + row, column]
        for column in range(size):
            diagonal = inverse[column, column]
            now, back, code = values[column], rounded[column], chosen[column]
            for row in range(count):
                nearest = np.rint((now[row] - bias[row]) / scale[row])
                nearest = nearest if nearest > least else least
                nearest = nearest if nearest < most else most
                code[row] = nearest if scale[row] != least else least
                back[row] = code[row] * scale[row] + bias[row]
                losses[row] = (now[row] - back[row]) / diagonal
            for later in range(column + 1, size):
                share, others = inverse[column, later], values[later]
                for row in range(count):
                    others[row] -= share * losses[row]
        for row in range(count):
            error, norm = 0.0, 0.0
            for column in range(size):
                index = first + column
                exact = np.float64(weight[start + row, index])
                difference = exact - np.float64(rounded[column, row])
                error += difference * difference
                norm += exact * exact
                goal[start + row, index] -= rounded[column, row]
                codes[start + row, index] = np.uint8(chosen[column, row])
            statistics[0] += error
            statistics[1] += norm
