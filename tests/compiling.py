"""Compiling the quantizer's loops, which numba keeps in the checkout: before workers start, which would each do it."""

import numpy as np
from ppx.quant.affine import BFLOAT16, FLOAT32, STORAGE, QuantizationConfig, pack, quantize, unpack
from ppx.quant.casting import count_non_finite
from ppx.quant.column_rounding import round_group


def compile_kernels() -> None:
    """Compile the loops for both kinds of words, weighted and not, if they are not there yet."""
    for dtype in (FLOAT32, BFLOAT16):
        weights = np.ones((1, 64), dtype)
        for importance in (None, np.ones(64)):
            quantize(weights, QuantizationConfig(4, 64), FLOAT32, importance)
        count_non_finite(weights)
    codes = unpack(pack(np.zeros((1, 64), np.uint8), 4), 4)
    square, row, one = np.eye(64, dtype=np.float32), np.ones((1, 64), np.float32), np.ones(1, np.float32)
    grids, storage = np.array(32 * [[1, 0]], np.float32), STORAGE[FLOAT32]
    for feedback in (None, square[None]):
        round_group(
            row,
            row.copy(),
            0,
            square,
            grids,
            storage,
            15,
            feedback,
            one.copy(),
            one.copy(),
            codes,
        )


if __name__ == "__main__":
    compile_kernels()
