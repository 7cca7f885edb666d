"""A bundle's weights as MLX arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.reader import Bundle
from ..quant.affine import BFLOAT16, QuantizationConfig


@dataclass(frozen=True)
class Packing:
    """What turns codes into values: ``scales`` and ``biases`` of each group, as they are stored."""

    scales: mx.array
    biases: mx.array
    quantization: QuantizationConfig


@dataclass(frozen=True)
class Matrix:
    """Values as they are stored: floats, or packed codes with their packing."""

    weight: mx.array
    packing: Packing | None = None

    def float32(self, stream: mx.Stream | mx.Device | mx.DeviceType | None = None) -> mx.array:
        """Return the values in float32; packed ones come from ``mx.dequantize``, with scales and biases as float32."""
        where: Any = stream
        if self.packing is None:
            return self.weight.astype(mx.float32, stream=where)
        quantization = self.packing.quantization
        scales, biases = (side.astype(mx.float32, stream=where) for side in (self.packing.scales, self.packing.biases))
        return mx.dequantize(
            self.weight, scales, biases, group_size=quantization.group_size, bits=quantization.bits, stream=where
        )

    def take(self, rows: slice | mx.array) -> "Matrix":
        """Return some of its rows."""
        packing = self.packing
        if packing is None:
            return Matrix(self.weight[rows])
        return Matrix(self.weight[rows], Packing(packing.scales[rows], packing.biases[rows], packing.quantization))


def joined(parts: Sequence[Matrix]) -> Matrix:
    """Return matrices of one kind below each other."""
    weight = mx.concatenate([part.weight for part in parts])
    packings = [part.packing for part in parts if part.packing]
    if not packings:
        return Matrix(weight)
    scales, biases = (mx.concatenate([getattr(packing, side) for packing in packings]) for side in ("scales", "biases"))
    return Matrix(weight, Packing(scales, biases, packings[0].quantization))


def to_mlx(array: NDArray[Any]) -> mx.array:
    """Return a numpy array as an MLX one of the same dtype."""
    if array.dtype == BFLOAT16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16, stream=mx.cpu)
    return mx.array(array)


def read_by_name(bundle: Bundle, name: str, step: int | None = None) -> Matrix:
    """Read a tensor of the model, by its name in the checkpoint; of a stacked one the rows of a depformer step."""
    return read_matrix(bundle, *bundle.rows_of(name, step))


def read_matrix(bundle: Bundle, output: Output, first: int, last: int) -> Matrix:
    """Read rows of an output."""
    weight, *sides = map(to_mlx, bundle.read(output, first, last))
    if output.quantization is None:
        return Matrix(weight)
    scales, biases = sides
    return Matrix(weight, Packing(scales, biases, output.quantization))
