"""A test of MLX's own kernels, before a bundle is blamed: broken ones have looked like bad quantization."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from ..quant.affine import Affine
from .bundle import Matrix, Packing
from .figures import difference
from .limits import KERNEL_BOUNDS
from .mlx_model import DTYPES, product, streams

_ROWS = 192
_COLUMNS = (512, 640)  # on a GPU whole multiples of 512 take a kernel of their own
_POSITIONS = (1, 5, 64)  # a single frame and many take different kernels on a GPU


def self_test(forms: Iterable[Affine], arithmetic: str = "float32") -> list[dict[str, Any]]:
    """Compare ``quantized_matmul`` with dequantizing and multiplying in numpy's float64.

    arithmetic: dtype of the activations, and of scales and biases. Returns a row for each setting, width and number of
    positions, with its relative L2 error and the bound for that dtype.
    """
    random = np.random.Generator(np.random.PCG64(7))
    dtype, stream = DTYPES[arithmetic], streams()[0]
    found = []
    for bits, size in sorted({(form.bits, form.group_size) for form in forms}):
        for columns in _COLUMNS:
            weight = mx.array(random.standard_normal((_ROWS, columns)).astype(np.float32)).astype(dtype)
            codes, scales, biases = mx.quantize(weight, group_size=size, bits=bits)
            packed = Matrix(codes, Packing(scales, biases, Affine(bits, size)))
            plain = np.array(packed.float32(mx.cpu)).astype(np.float64)
            for positions in _POSITIONS:
                x = mx.array(random.standard_normal((positions, columns)).astype(np.float32)).astype(dtype)
                expected = (np.array(x.astype(mx.float32)).astype(np.float64) @ plain.T).astype(np.float32)
                got = np.array(product(x, packed, stream).astype(mx.float32))
                row = {"bits": bits, "group_size": size, "columns": columns, "positions": positions}
                error = difference(expected, got)["relative_l2"]
                found.append(row | {"relative_l2": error, "bound": KERNEL_BOUNDS[arithmetic]})
    return found
