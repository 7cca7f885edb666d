"""Quantizing a matrix by its weights alone; what cannot be quantized is named."""

import numpy as np
from numpy.typing import NDArray

from ..convert.errors import UserError
from ..quant.affine import QuantizationConfig, Quantized, quantize


def quantized(
    name: str, matrix: NDArray[np.float32], quantization: QuantizationConfig, storage: np.dtype[np.generic]
) -> Quantized:
    """Quantize a matrix ``[rows, columns]``; raises UserError, which names it, for weights that are too far apart."""
    try:
        return quantize(matrix, quantization, storage)
    except ValueError as error:
        raise UserError(f"{name} at {quantization.label}: {error}: give a recipe that keeps it float") from None
