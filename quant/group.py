"""Steps of the quantizer on one group of weights, compiled with numba: rounding to a dtype, sums, codes, packing.

numba keeps what it compiled of ``kernels``, which these are part of, until that file changes: after a change here,
delete ``quant/__pycache__``.
"""

import numpy as np
from numba import njit

from .packing import pack_row

MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to nearest even below 2^22
EPSILON = np.float32(1e-7)  # the smallest step that mx.quantize allows
BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2  # how scales and biases are stored


@njit(nogil=True, cache=True)
def largest_masked(words, mask):
    """Return the largest ``word & mask`` of uint16 words: with a mask of exponents, whether any is not finite."""
    top = np.uint16(0)
    for j in range(words.shape[0]):
        top = np.uint16(max(top, np.uint16(words[j] & mask)))
    return top


@njit(nogil=True, cache=True, error_model="numpy")
def stored(value, storage):
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
def load(words, shift, bits_of):
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
def halving_sum(terms):
    """Return the sum of a power-of-two number of terms, at least 8; overwrites them."""
    half = terms.shape[0]
    while half > 8:
        half //= 2
        for j in range(half):
            terms[j] += terms[half + j]
    return ((terms[0] + terms[4]) + (terms[2] + terms[6])) + ((terms[1] + terms[5]) + (terms[3] + terms[7]))


@njit(nogil=True, cache=True, error_model="numpy")
def mlx_grid(low, high, top):
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
def encode(values, scale, bias, top, codes):
    """Give each value the nearest code of a grid, kept as float32."""
    for j in range(values.shape[0]):
        code = ((values[j] - bias) / scale + MAGIC) - MAGIC
        code = code if code > np.float32(0) else np.float32(0)
        codes[j] = code if code < top else top


@njit(nogil=True, cache=True, error_model="numpy")
def squared_norm(values, terms):
    """Return the sum of squared values, in float64."""
    for j in range(values.shape[0]):
        terms[j] = np.float64(values[j]) * np.float64(values[j])
    return halving_sum(terms)


@njit(nogil=True, cache=True, error_model="numpy")
def pack(codes, whole, bits, packed):
    """Write codes as a little-endian bit stream: eight codes take ``bits`` bytes."""
    if bits == 4:  # the common case, without the detour; sums of two codes are exact as floats
        for i in range(packed.shape[0]):
            packed[i] = np.uint8(np.int32(codes[2 * i] + np.float32(16) * codes[2 * i + 1]))
        return
    for j in range(codes.shape[0]):
        whole[j] = np.uint8(np.int32(codes[j]))
    pack_row(whole, bits, packed)
