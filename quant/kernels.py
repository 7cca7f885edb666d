"""The inner loops of the quantizers, fused with numba.

A group is read once, and its codes, scale, bias and error are made while it is in the cache; whole-array operations
would pass over main memory for each step. Loops over a group are element by element, which LLVM turns into vector
instructions, and no `fastmath` reorders them: sums halve their array until little is left. The same weights therefore
give the same bytes on every machine.
"""

import numpy as np
from numba import njit

MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to nearest even below 2^22
EPSILON = np.float32(1e-7)  # the smallest step that mx.quantize allows

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2  # how scales and biases are stored
SQUARED_ERROR, SQUARED_NORM, OVERFLOW, FLUSHED, NON_FINITE, STATISTICS = 0, 1, 2, 3, 4, 5

STEPS = 8  # how many symmetric clips of a group's range the search tries before it moves each end alone
HALVINGS = 2  # how often it then halves the distance by which it moves an end
PASSES = 3  # least squares and new codes in turn, at most


def clip_step(bits: int) -> float:
    """Return by what share of a group's range each end moves in one step of the clip search.

    Found by a scan on Gaussian and on trained weights: few codes gain from clipping much, many codes from little.
    """
    return {2: 0.03, 3: 0.02, 4: 0.02, 5: 0.015}.get(bits, 0.005)


@njit(nogil=True, cache=True)
def largest_masked(words, mask):
    """Return the largest ``word & mask`` of uint16 words: with a mask of exponents, whether any is not finite."""
    top = np.uint16(0)
    for j in range(words.shape[0]):
        top = np.uint16(max(top, np.uint16(words[j] & mask)))
    return top


@njit(nogil=True, cache=True, error_model="numpy")
def _stored(value, storage):
    """Round a float32 to the nearest value of the storage dtype, ties to even, saturated at its largest."""
    size = abs(value)
    if storage == BFLOAT16:
        word = np.float32(value).view(np.uint32)
        word = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        rounded = np.uint32(word).view(np.float32)
        return rounded if np.isfinite(rounded) else np.float32(np.copysign(np.float32(3.3895314e38), value))
    if storage == FLOAT16:
        if size >= np.float32(65504):
            return np.float32(np.copysign(np.float32(65504), value))
        if size < np.float32(2.0**-14):  # subnormal: the spacing of float32 above 0.5 is that of these, 2^-24
            return np.float32(np.copysign((size + np.float32(0.5)) - np.float32(0.5), value))
        word = np.float32(value).view(np.uint32)
        word = (word + np.uint32(0xFFF) + ((word >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
        return np.uint32(word).view(np.float32)
    return np.float32(value)


@njit(nogil=True, cache=True, error_model="numpy")
def _count_losses(exact, stored, storage, statistics):
    """Count a scale or bias that did not fit its storage dtype."""
    limit = np.float32(65520) if storage == FLOAT16 else np.float32(3.3961775e38)
    if storage != FLOAT32 and abs(exact) >= limit:
        statistics[OVERFLOW] += 1
    if stored == 0 and exact != 0:
        statistics[FLUSHED] += 1


@njit(nogil=True, cache=True, error_model="numpy")
def _load(words, shift, bits_of):
    """Widen one group to float32 bits and return its smallest and largest value (NaN or infinite if any is).

    Both are taken on integers that sort like the floats; the casts keep numba from widening them to 64 bit.
    """
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for j in range(words.shape[0]):
        word = np.int32(np.uint32(words[j]) << shift)
        bits_of[j] = word
        key = np.int32(word ^ np.int32(np.int32(word >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low = np.int32(min(low, key))
        high = np.int32(max(high, key))
    low ^= (low >> np.int32(31)) & np.int32(0x7FFFFFFF)
    high ^= (high >> np.int32(31)) & np.int32(0x7FFFFFFF)
    return np.int32(low).view(np.float32), np.int32(high).view(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
def _sum(terms):
    """Return the sum of a power-of-two number of terms, at least 8; overwrites them."""
    half = terms.shape[0]
    while half > 8:
        half //= 2
        for j in range(half):
            terms[j] += terms[half + j]
    return ((terms[0] + terms[4]) + (terms[2] + terms[6])) + ((terms[1] + terms[5]) + (terms[3] + terms[7]))


@njit(nogil=True, cache=True, error_model="numpy")
def _mlx_grid(low, high, top):
    """Return (scale, bias) as ``mx.quantize`` chooses them: zero and the end farther from it are exact."""
    negative = abs(low) > abs(high)
    scale = max((high - low) / top, EPSILON)
    edge = low if negative else high
    scale = scale if negative else -scale
    steps = np.rint(edge / scale)
    if steps != 0:
        return np.float32(edge / steps), np.float32(edge)
    return np.float32(scale), np.float32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def _encode(values, scale, bias, top, codes):
    """Give each value the nearest code of a grid, kept as float32."""
    for j in range(values.shape[0]):
        code = ((values[j] - bias) / scale + MAGIC) - MAGIC
        code = code if code > np.float32(0) else np.float32(0)
        codes[j] = code if code < top else top


@njit(nogil=True, cache=True, error_model="numpy")
def _squared_error(values, codes, scale, bias, terms):
    """Return the sum of (value - (scale * code + bias))^2, in float64."""
    for j in range(values.shape[0]):
        error = np.float64(values[j]) - (np.float64(scale) * np.float64(codes[j]) + np.float64(bias))
        terms[j] = error * error
    return _sum(terms)


@njit(nogil=True, cache=True, error_model="numpy")
def _squared_norm(values, terms):
    for j in range(values.shape[0]):
        terms[j] = np.float64(values[j]) * np.float64(values[j])
    return _sum(terms)


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
    return _sum(products), np.float32(squares) - np.float32(total) * mean, mean


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
        _encode(centered, np.float32((extent - a - b) / top), np.float32(low + a), top, codes)
        covariance, variance, center = _moments(centered, codes, products)
        if variance > 0 and covariance * covariance / variance > best:
            best = covariance * covariance / variance
            left, right, scale, mean = a, b, covariance / variance, center
    return scale, mean


@njit(nogil=True, cache=True, error_model="numpy")
def _pack(codes, whole, bits, packed):
    """Write codes as a little-endian bit stream: eight codes take ``bits`` bytes."""
    if bits == 4:  # the common case, without the detour; sums of two codes are exact as floats
        for i in range(packed.shape[0]):
            packed[i] = np.uint8(np.int32(codes[2 * i] + np.float32(16) * codes[2 * i + 1]))
        return
    for j in range(codes.shape[0]):
        whole[j] = np.uint8(np.int32(codes[j]))
    for i in range(codes.shape[0] // 8):
        stream = np.uint64(0)
        for j in range(8):
            stream |= np.uint64(whole[8 * i + j]) << np.uint64(bits * j)
        for j in range(bits):
            packed[bits * i + j] = np.uint8(stream >> np.uint64(8 * j))


@njit(nogil=True, cache=True, error_model="numpy")
def _improve(values, low, high, top, storage, step, start, codes, centered, others, products, terms):
    """Look for a grid with less squared error than ``start``, an (error, scale, bias, exact scale, exact bias).

    Returns the same five of the best grid and leaves its codes in ``codes``: least squares for the codes, then codes
    for the grid as it is stored, as long as that helps.
    """
    size = values.shape[0]
    for j in range(size):
        products[j] = values[j]
    middle = np.float32(_sum(products) / np.float32(size))
    for j in range(size):
        centered[j] = values[j] - middle
    extent = max(high - low, EPSILON * top)
    fitted, mean = _search(centered, low - middle, extent, top, step, others, products)
    best = start
    for _ in range(PASSES):
        scale = _stored(fitted, storage)
        if scale == 0:
            break
        exact_bias = np.float32(middle - scale * mean)
        bias = _stored(exact_bias, storage)
        _encode(values, scale, bias, top, others)
        error = _squared_error(values, others, scale, bias, terms)
        if not error < best[0]:
            break
        best = (error, scale, bias, fitted, exact_bias)
        for j in range(size):
            codes[j] = others[j]
        covariance, variance, mean = _moments(centered, codes, products)
        if not variance > 0:
            break
        fitted = np.float32(covariance / variance)
    return best


@njit(nogil=True, cache=True, error_model="numpy")
def quantize_groups(words, shift, bits, storage, search, step, packed, scales, biases, statistics):
    """Quantize groups of weights.

    words: uint16 or uint32 ``[groups, group_size]``: bfloat16 bits with shift 16, or float32 bits with shift 0.
    search: false for the grid of ``mx.quantize``, true to look for a better one from there.
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
    terms = np.empty(size, np.float64)
    for g in range(groups):
        low, high = _load(words[g], shift, bits_of)
        if not np.isfinite(high - low):  # NaN and infinities sort to the ends
            statistics[NON_FINITE] += 1
            continue
        exact_scale, exact_bias = _mlx_grid(low, high, top)
        _encode(values, exact_scale, exact_bias, top, codes)
        scale, bias = _stored(exact_scale, storage), _stored(exact_bias, storage)
        error = _squared_error(values, codes, scale, bias, terms)
        if search and error > 0:
            start = (error, scale, bias, exact_scale, exact_bias)
            error, scale, bias, exact_scale, exact_bias = _improve(
                values, low, high, top, storage, step, start, codes, centered, others, products, terms
            )
        _count_losses(exact_scale, scale, storage, statistics)
        _count_losses(exact_bias, bias, storage, statistics)
        statistics[SQUARED_ERROR] += error
        statistics[SQUARED_NORM] += _squared_norm(values, terms)
        scales[g], biases[g] = scale, bias
        _pack(codes, whole, bits, packed[g])


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
        low, high = _load(words[g], shift, bits_of)
        if not np.isfinite(high - low):
            broken += 1
            continue
        exact_scale, exact_bias = _mlx_grid(low, high, top)
        _encode(group, exact_scale, exact_bias, top, values[g])
        scale, bias = _stored(exact_scale, storage), _stored(exact_bias, storage)
        for j in range(size):
            values[g, j] = values[g, j] * scale + bias
    return broken
