"""A test of MLX's own kernels, before a bundle is blamed: broken ones have looked like bad quantization."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from ..quant.affine import Affine
from .bundle import Matrix, Packing
from .figures import difference
from .mlx_model import product, streams

_ROWS, _COLUMNS = 192, 512
_POSITIONS = (1, 5, 64)  # a single frame and many take different kernels on a GPU


def self_test(forms: Iterable[Affine]) -> list[dict[str, Any]]:
    """Compare ``quantized_matmul`` with dequantizing and multiplying in numpy's float64, in float32.

    Returns a row for each setting and number of positions, with its relative L2 error.
    """
    random = np.random.Generator(np.random.PCG64(7))
    weight = random.standard_normal((_ROWS, _COLUMNS)).astype(np.float32)
    found = []
    for bits, size in sorted({(form.bits, form.group_size) for form in forms}):
        codes, scales, biases = mx.quantize(mx.array(weight), group_size=size, bits=bits)
        packed = Matrix(codes, Packing(scales, biases, Affine(bits, size)))
        plain = np.array(packed.float32(mx.cpu)).astype(np.float64)
        for positions in _POSITIONS:
            x = random.standard_normal((positions, _COLUMNS)).astype(np.float32)
            expected = (x.astype(np.float64) @ plain.T).astype(np.float32)
            got = np.array(product(mx.array(x), packed, streams()[0]))
            row = {"bits": bits, "group_size": size, "positions": positions}
            found.append(row | {"relative_l2": difference(expected, got)["relative_l2"]})
    return found
