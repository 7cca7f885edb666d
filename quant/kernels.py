"""The inner loops of the quantizers, fused with numba.

A group is read once, and its codes, scale, bias and error are made while it is in the cache; whole-array operations
would pass over main memory for each step. Loops over a group are element by element, which LLVM turns into vector
instructions, and no `fastmath` reorders them: sums halve their array until little is left. The same weights therefore
give the same bytes on every machine.
"""

import numpy as np
from numba import njit

from .group import EPSILON, FLOAT16, FLOAT32, MAGIC, encode, halving_sum, load, mlx_grid, pack, squared_norm, stored

SQUARED_ERROR, SQUARED_NORM, OVERFLOW, FLUSHED, NON_FINITE, STATISTICS = 0, 1, 2, 3, 4, 5

STEPS = 8  # how many symmetric clips of a group's range the search tries before it moves each end alone
HALVINGS = 2  # how often it then halves the distance by which it moves an end
PASSES = 3  # least squares and new codes in turn, at most

FIT, IMPORTANCE, OUTLINES = 0, 1, 2  # rows of what a weighted search needs of a group's columns
# Ranges that it begins with: one of the outlines, and by how many steps each of its ends is clipped.
# Found by a scan on Gaussian and on trained weights, with equal gains and with gains over five decades.
RANGES = ((0, 0), (0, 2), (0, 4), (1, 1), (2, 2), (3, 1), (4, 1))


def clip_step(bits: int) -> float:
    """Return by what share of a group's range each end moves in one step of the clip search.

    Found by a scan on Gaussian and on trained weights: few codes gain from clipping much, many codes from little.
    """
    return {2: 0.03, 3: 0.02, 4: 0.02, 5: 0.015}.get(bits, 0.005)


@njit(nogil=True, cache=True, error_model="numpy")
def _count_losses(exact, stored, storage, statistics):
    """Count a scale or bias that did not fit its storage dtype."""
    limit = np.float32(65520) if storage == FLOAT16 else np.float32(3.3961775e38)
    if storage != FLOAT32 and abs(exact) >= limit:
        statistics[OVERFLOW] += 1
    if stored == 0 and exact != 0:
        statistics[FLUSHED] += 1


@njit(nogil=True, cache=True, error_model="numpy")
def _squared_error(values, codes, scale, bias, importance, terms):
    """Return the sum of importance * (value - (scale * code + bias))^2, in float64; importance None is 1 for all."""
    for j in range(values.shape[0]):
        error = np.float64(values[j]) - (np.float64(scale) * np.float64(codes[j]) + np.float64(bias))
        terms[j] = error * error if importance is None else np.float64(importance[j]) * (error * error)
    return halving_sum(terms)


@njit(nogil=True, cache=True, error_model="numpy")
def _moments(centered, codes, products):
    """Return what least squares needs of centered values and their codes.

    (covariance, variance of the codes, mean code), the first two times the group's size: the best scale for these
    codes is covariance / variance, and it lowers the squared error by covariance^2 / variance.
    """
    total, squares = np.int32(0), np.int32(0)
    for j in range(centered.shape[0]):
        products[j] = centered[j] * codes[j]
        code = np.int32(codes[j])
        total = np.int32(total + code)
        squares = np.int32(squares + np.int32(code * code))
    mean = np.float32(total) / np.float32(centered.shape[0])
    return halving_sum(products), np.float32(squares) - np.float32(total) * mean, mean


@njit(nogil=True, cache=True, error_model="numpy")
def _weighted_moments(centered, codes, anchor, importance, sums):
    """Return the same, weighted by an importance whose mean is 1.

    anchor: near the weighted mean code. Codes are counted from there: where one column outweighs all others, the
    difference of the sums would otherwise lose the variance.
    """
    half = centered.shape[0] // 2  # halved once while they are computed: most of the time is spent here
    for j in range(half):
        sums[j] = importance[j] * (codes[j] - anchor) + importance[half + j] * (codes[half + j] - anchor)
    mean = np.float32(halving_sum(sums) / np.float32(2 * half))
    for j in range(half):
        left, right = codes[j] - anchor, codes[half + j] - anchor
        sums[j] = importance[j] * (left * left) + importance[half + j] * (right * right)
    squares = halving_sum(sums)
    for j in range(half):
        left, right = codes[j] - anchor, codes[half + j] - anchor
        sums[j] = importance[j] * (centered[j] * left) + importance[half + j] * (centered[half + j] * right)
    return halving_sum(sums), squares - np.float32(2 * half) * mean * mean, np.float32(anchor + mean)


@njit(nogil=True, cache=True, error_model="numpy")
def _outline(centered, factors, scaled):
    """Return the smallest and the largest of centered values times factors, or 0 where all are on one side of it.

    Both are taken on integers, as in ``load``: those of positive floats sort like them, and others are below 0.
    scaled: overwritten.
    """
    keys = scaled.view(np.int32)
    for j in range(centered.shape[0]):
        scaled[j] = centered[j] * factors[j]
    low, high = np.int32(0), np.int32(0)
    for j in range(centered.shape[0]):
        high = np.int32(max(high, keys[j]))
        low = np.int32(max(low, np.int32(keys[j] ^ np.int32(-0x80000000))))
    return -np.int32(low).view(np.float32), np.int32(high).view(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
def _weighted_search(centered, top, step, columns, codes, sums):
    """Find the range of a grid by weighted errors; return (scale, mean code) of the best grid.

    Columns of little importance must not decide the range: it begins with those of values that are scaled down, or left
    out, by their importance, each end from the same or from another of these; then it moves each end alone.
    """
    importance, count = columns[FIT], len(RANGES)
    lows, highs = np.empty(count, np.float32), np.empty(count, np.float32)
    low, high = np.float32(0), np.float32(0)
    for k in range(count):
        kind, steps = RANGES[k]
        if k == 0 or kind != RANGES[k - 1][0]:
            low, high = _outline(centered, columns[OUTLINES + kind], codes)
        margin = np.float32(np.float32(steps) * step * (high - low))
        lows[k], highs[k] = low + margin, high - margin
    best, scale, mean = np.float32(-1), np.float32(0), np.float32(0)
    left, right, from_left, from_right = lows[0], highs[0], lows[0], highs[0]
    for trial in range(3 * count + 4 * HALVINGS):
        if trial < count:  # both ends of one range
            low, high = lows[trial], highs[trial]
        elif trial < 3 * count:  # one end of another
            if trial % count == 0:
                from_left, from_right = left, right
            low = lows[trial - count] if trial < 2 * count else from_left
            high = from_right if trial < 2 * count else highs[trial - 2 * count]
            if low == left and high == right:
                continue
        else:  # one end alone, from the best pair so far
            turn = trial - 3 * count
            if turn % 4 == 0:
                from_left, from_right = left, right
            move = np.float32(step * (from_right - from_left) / np.float32(2 << (turn // 4)))
            move = move if turn % 2 == 0 else -move
            low = from_left + (move if turn % 4 < 2 else np.float32(0))
            high = from_right - (move if turn % 4 >= 2 else np.float32(0))
        if not high > low:
            continue
        inverse = np.float32(top / (high - low))
        for j in range(centered.shape[0]):  # as ``encode``, but for ties: these codes are not stored
            code = ((centered[j] - low) * inverse + MAGIC) - MAGIC
            code = code if code > np.float32(0) else np.float32(0)
            codes[j] = code if code < top else top
        covariance, variance, center = _weighted_moments(centered, codes, np.float32(-low * inverse), importance, sums)
        if variance > 0 and covariance * covariance / variance > best:
            best = covariance * covariance / variance
            left, right, scale, mean = low, high, covariance / variance, center
    return scale, mean


@njit(nogil=True, cache=True, error_model="numpy")
def _search(centered, low, extent, top, step, codes, products):
    """Find how far to clip each end of a centered group's range; return (scale, mean code) of the best grid."""
    best, scale, mean = np.float32(-1), np.float32(extent / top), np.float32(0)
    left, right = np.float32(0), np.float32(0)
    for trial in range(STEPS + 4 * HALVINGS):
        if trial < STEPS:  # both ends alike
            a = np.float32(np.float32(trial) * step * extent)
            b = a
        else:  # one end alone, from the best pair so far
            turn = trial - STEPS
            if turn % 4 == 0:
                from_left, from_right = left, right
            move = np.float32(step * extent / np.float32(2 << (turn // 4)))
            move = move if turn % 2 == 0 else -move
            a = from_left + (move if turn % 4 < 2 else np.float32(0))
            b = from_right + (move if turn % 4 >= 2 else np.float32(0))
        encode(centered, np.float32((extent - a - b) / top), np.float32(low + a), top, codes)
        covariance, variance, center = _moments(centered, codes, products)
        if variance > 0 and covariance * covariance / variance > best:
            best = covariance * covariance / variance
            left, right, scale, mean = a, b, covariance / variance, center
    return scale, mean


@njit(nogil=True, cache=True, error_model="numpy")
def _improve(values, low, high, top, storage, step, start, columns, codes, centered, others, products, sums, terms):
    """Look for a grid with less squared error than ``start``, an (error, scale, bias, exact scale, exact bias).

    Returns the same five of the best grid and leaves its codes in ``codes``: least squares for the codes, then codes
    for the grid as it is stored, as long as that helps. columns: None, or what weighs the errors; the one weighted by
    the importance does not grow, either.
    """
    importance = None if columns is None else columns[FIT]
    most = 0.0 if columns is None else _squared_error(values, codes, start[1], start[2], columns[IMPORTANCE], terms)
    size = values.shape[0]
    for j in range(size):
        products[j] = values[j] if importance is None else importance[j] * values[j]
    middle = np.float32(halving_sum(products) / np.float32(size))
    for j in range(size):
        centered[j] = values[j] - middle
    if importance is None:
        extent = max(high - low, EPSILON * top)
        fitted, mean = _search(centered, low - middle, extent, top, step, others, products)
    else:
        fitted, mean = _weighted_search(centered, top, step, columns, others, sums)
    best = start
    for _ in range(PASSES):
        scale = stored(fitted, storage)
        if scale == 0:
            break
        exact_bias = np.float32(middle - scale * mean)
        bias = stored(exact_bias, storage)
        encode(values, scale, bias, top, others)
        error = _squared_error(values, others, scale, bias, importance, terms)
        if not error < best[0]:
            break
        if columns is not None and _squared_error(values, others, scale, bias, columns[IMPORTANCE], terms) > most:
            break
        best = (error, scale, bias, fitted, exact_bias)
        for j in range(size):
            codes[j] = others[j]
        if importance is None:
            covariance, variance, mean = _moments(centered, codes, products)
        else:
            covariance, variance, mean = _weighted_moments(centered, codes, mean, importance, sums)
        if not variance > 0:
            break
        fitted = np.float32(covariance / variance)
    return best


@njit(nogil=True, cache=True, error_model="numpy")
def quantize_groups(words, shift, bits, storage, search, step, columns, packed, scales, biases, statistics):
    """Quantize groups of weights.

    words: uint16 or uint32 ``[groups, group_size]``: bfloat16 bits with shift 16, or float32 bits with shift 0.
    search: false for the grid of ``mx.quantize``, true to look for a better one from there.
    columns: None, or float32 ``[groups of a row, 7, group_size]``: what the search weighs squared errors by, of mean 1;
    what also weighs those that must not grow; factors of values for the five outlines of ranges that it begins with.
    packed: uint8 ``[groups, group_size * bits // 8]``; scales, biases: float32 ``[groups]``, already rounded to
    storage. statistics: float64 ``[STATISTICS]``, added to: squared error, squared norm, scales and biases that
    overflowed or became zero in storage, groups that are not finite or span too much.
    """
    groups, size = words.shape
    top = np.float32((1 << bits) - 1)
    shift = np.uint32(shift)
    bits_of = np.empty(size, np.int32)
    values = bits_of.view(np.float32)
    codes, whole = np.empty(size, np.float32), np.empty(size, np.uint8)
    centered, others, products = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    sums, terms = np.empty(size // 2, np.float32), np.empty(size, np.float64)
    for g in range(groups):
        low, high = load(words[g], shift, bits_of)
        if not np.isfinite(high - low):  # NaN and infinities sort to the ends
            statistics[NON_FINITE] += 1
            continue
        exact_scale, exact_bias = mlx_grid(low, high, top)
        encode(values, exact_scale, exact_bias, top, codes)
        scale, bias = stored(exact_scale, storage), stored(exact_bias, storage)
        of_group = None if columns is None else columns[g % columns.shape[0]]
        error = _squared_error(values, codes, scale, bias, None if of_group is None else of_group[FIT], terms)
        if search and error > 0:
            start = (error, scale, bias, exact_scale, exact_bias)
            error, scale, bias, exact_scale, exact_bias = _improve(
                values,
                low,
                high,
                top,
                storage,
                step,
                start,
                of_group,
                codes,
                centered,
                others,
                products,
                sums,
                terms,
            )
        if columns is not None:
            error = _squared_error(values, codes, scale, bias, None, terms)
        _count_losses(exact_scale, scale, storage, statistics)
        _count_losses(exact_bias, bias, storage, statistics)
        statistics[SQUARED_ERROR] += error
        statistics[SQUARED_NORM] += squared_norm(values, terms)
        scales[g], biases[g] = scale, bias
        pack(codes, whole, bits, packed[g])


@njit(nogil=True, cache=True, error_model="numpy")
def round_groups(words, shift, bits, storage, values):
    """Round groups of weights to the grid of ``mx.quantize`` and back; return how many are not finite or span too much.

    words, shift, storage: as for ``quantize_groups``. values: float32 ``[groups, group_size]``, what is written.
    """
    groups, size = words.shape
    top = np.float32((1 << bits) - 1)
    shift = np.uint32(shift)
    bits_of = np.empty(size, np.int32)
    group = bits_of.view(np.float32)
    broken = 0
    for g in range(groups):
        low, high = load(words[g], shift, bits_of)
        if not np.isfinite(high - low):
            broken += 1
            continue
        exact_scale, exact_bias = mlx_grid(low, high, top)
        encode(group, exact_scale, exact_bias, top, values[g])
        scale, bias = stored(exact_scale, storage), stored(exact_bias, storage)
        for j in range(size):
            values[g, j] = values[g, j] * scale + bias
    return broken
