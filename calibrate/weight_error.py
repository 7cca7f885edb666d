"""How much quantization changes the weights of a group of tensors, at every setting: of some rows, evenly spaced."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..convert.source.source import Source
from ..model.tokens import evenly_spaced
from ..model.weights import source_weights
from ..quant.affine import QuantizationConfig, dequantize
from .sensitivity import settings_of
from .weight_only import quantized

ROWS = 128  # of a matrix
STORAGE = np.dtype(np.float32)  # of scales and biases: rounding to another dtype costs all groups the same


def relative_errors(source: Source, members: Sequence[tuple[str, int | None]]) -> dict[tuple[int, int], float]:
    """Return the relative squared error of some rows of a group's tensors, by bits and group size.

    Errors and norms are weighted where the quantizer weighs them.
    """
    read = source_weights(source.checkpoint)
    weights = [read(name, step) for name, step in members]
    some = [np.ascontiguousarray(weight[evenly_spaced(len(weight), ROWS)].float().numpy()) for weight in weights]
    importances = [source.checkpoint.importance(name) for name, _ in members]
    norms = [_weighted_sum(*pair) for pair in zip(some, importances, strict=True)]
    errors = settings_of(weight.shape[1] for weight in some)
    for bits, size in errors:
        quantization, total = QuantizationConfig(bits, size, "lsq"), 0.0
        for (name, _), weight, importance in zip(members, some, importances, strict=True):
            restored = dequantize(quantized(name, weight, quantization, STORAGE, importance), quantization)
            total += _weighted_sum(weight - restored, importance)
        errors[bits, size] = total / sum(norms) if sum(norms) else 0.0
    return errors


def _weighted_sum(values: NDArray[np.float32], importance: NDArray[np.float64] | None) -> float:
    """Return the sum of squares, each times the importance of its column if there is one."""
    squares = np.square(values, dtype=np.float64).sum(0)
    return float(squares.sum() if importance is None else squares @ importance)
