"""Codes as a little-endian bit stream: eight codes of ``bits`` bits take ``bits`` bytes."""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def pack_row(codes, bits, packed):
    """Write one row of ``pack_rows``."""
    if bits == 4:
        for i in range(packed.shape[0]):
            packed[i] = codes[2 * i] | np.uint8(codes[2 * i + 1] << np.uint8(4))
        return
    for i in range(codes.shape[0] // 8):
        stream = np.uint64(0)
        for j in range(8):
            stream |= np.uint64(codes[8 * i + j]) << np.uint64(bits * j)
        for j in range(bits):
            packed[bits * i + j] = np.uint8(stream >> np.uint64(8 * j))


@njit(nogil=True, cache=True)
def pack_rows(codes, bits, packed):
    """Write codes, uint8 ``[rows, columns]``, as uint8 ``[rows, columns * bits / 8]``; columns: a multiple of 8."""
    for row in range(codes.shape[0]):
        pack_row(codes[row], bits, packed[row])


@njit(nogil=True, cache=True)
def unpack_rows(packed, bits, codes):
    """Read what ``pack_rows`` writes."""
    mask = np.uint64((1 << bits) - 1)
    for row in range(codes.shape[0]):
        if bits == 4:
            for i in range(packed.shape[1]):
                codes[row, 2 * i] = packed[row, i] & np.uint8(15)
                codes[row, 2 * i + 1] = packed[row, i] >> np.uint8(4)
            continue
        for i in range(codes.shape[1] // 8):
            stream = np.uint64(0)
            for j in range(bits):
                stream |= np.uint64(packed[row, bits * i + j]) << np.uint64(8 * j)
            for j in range(8):
                codes[row, 8 * i + j] = np.uint8((stream >> np.uint64(bits * j)) & mask)
