"""Quantizing a matrix by its weights alone; an error names the matrix that cannot be quantized."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..convert.errors import UserError
from ..quant.affine import WEIGHTED, QuantizationConfig, Quantized, dequantize, quantize


def quantized(
    name: str,
    matrix: NDArray[np.float32],
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
    importance: NDArray[np.float64] | None = None,
) -> Quantized:
    """Quantize a matrix ``[rows, columns]``, as a conversion does; raises UserError for weights that are too far apart.

    name: what the error calls it. importance: of its columns, for methods that weigh errors.
    """
    try:
        return quantize(matrix, quantization, storage, importance if quantization.method in WEIGHTED else None)
    except ValueError as error:
        raise UserError(f"{name} at {quantization.label}: {error}: give a recipe that keeps it float") from None


def dequantized(
    name: str,
    values: Tensor,
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
    importance: NDArray[np.float64] | None = None,
) -> Tensor:
    """Return values ``[..., columns]`` in float32 on the CPU, quantized and dequantized; raises as ``quantized``."""
    rows = np.ascontiguousarray(values.float().cpu().numpy().reshape(-1, values.shape[-1]))
    matrix = quantized(name, rows, quantization, storage, importance)
    return torch.from_numpy(dequantize(matrix, quantization)).reshape(values.shape)
