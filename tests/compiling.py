"""Compiling the quantizer's loops, which numba keeps in the checkout: before workers start, which would each do it."""

import numpy as np
from ppx.quant.affine import BFLOAT16, FLOAT32, QuantizationConfig, quantize
from ppx.quant.casting import count_non_finite


def compile_kernels() -> None:
    """Compile the loops for both kinds of words, if they are not there yet."""
    for dtype in (FLOAT32, BFLOAT16):
        weights = np.ones((1, 64), dtype)
        quantize(weights, QuantizationConfig(4, 64), FLOAT32)
        count_non_finite(weights)


if __name__ == "__main__":
    compile_kernels()
