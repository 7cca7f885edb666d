"""Products with packed weights: ``quantized_matmul``, or dequantizing and multiplying where MLX computes it wrongly."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx

from ..convert.tensorfile import DTYPES, FLOATS
from .mlx_weights import Matrix

TRIED = (1, 4, 8)  # rows of input that kernels are tested with; on processors the same loop takes every row
TILE = 64  # GPUs have kernels of their own for some numbers of rows: more than one are filled up to multiples of this
TRIED_TILES = (1, TILE, 17 * TILE)  # a row, one tile, and many, in a number that no larger tile divides
FLOAT_DTYPES: dict[str, mx.Dtype] = {DTYPES[code].name: getattr(mx, DTYPES[code].name) for code in FLOATS}
Packed = Callable[..., mx.array]  # of the signature of mx.quantized_matmul
Plain = Callable[[mx.array, Matrix, mx.Stream | mx.Device | None], mx.array]


@dataclass(frozen=True, order=True)
class Shape:
    """What decides which kernel multiplies: a packed weight's size, its setting, and the dtypes of both sides."""

    rows: int
    columns: int
    bits: int
    group_size: int
    scales: str
    activations: str

    def __str__(self) -> str:
        """Return it for people."""
        return f"{self.rows}x{self.columns}, {self.bits} bit group {self.group_size}, {self.activations}"


@dataclass(frozen=True)
class QuantizedMatmul:
    """How weights are multiplied.

    replaced: shapes that ``packed`` computes wrongly, each with the rows of input (one of ``tried``) for which it does.
    padded: whether the rows of input are filled up to whole tiles, as on GPUs. packed, plain: what multiplies with
    packed weights, and what stands in for it.
    """

    replaced: frozenset[tuple[Shape, int]] = frozenset()
    padded: bool = False
    packed: Packed = mx.quantized_matmul
    plain: Plain | None = None

    @property
    def tried(self) -> tuple[int, int, int]:
        """Rows of input that stand for one, a few and many."""
        return TRIED_TILES if self.padded else TRIED

    def tried_as(self, rows: int) -> int:
        """Return which of them stands for so many rows of input: the next larger one, or the last."""
        return next((number for number in self.tried if rows <= number), self.tried[-1])

    def __call__(self, x: mx.array, matrix: Matrix, stream: mx.Stream | mx.Device | None = None) -> mx.array:
        """Return ``x @ matrix.T`` for ``x [rows, columns]``, in the dtype of ``x``."""
        packing = matrix.packing
        if packing is None:
            return _multiplied(x, matrix.weight, stream)
        rows = len(x)
        if self.replaced and (shape_of(matrix, x.dtype), self.tried_as(rows)) in self.replaced:
            return self.dequantized(x, matrix, stream)
        more = -rows % TILE if self.padded and rows > 1 else 0
        found = self.packed(
            mx.pad(x, [(0, more), (0, 0)], stream=stream) if more else x,
            matrix.weight,
            packing.scales,
            packing.biases,
            transpose=True,
            group_size=packing.quantization.group_size,
            bits=packing.quantization.bits,
            stream=stream,
        ).astype(x.dtype, stream=stream)
        return found[:rows] if more else found

    def dequantized(self, x: mx.array, matrix: Matrix, stream: mx.Stream | mx.Device | None = None) -> mx.array:
        """Return the same product without a packed kernel: the weight is dequantized, in float32, and multiplied."""
        return (self.plain or _dequantized)(x, matrix, stream)

    def workarounds(self) -> list[str]:
        """Return what is replaced, a line for each shape."""
        return workarounds(sorted(self.replaced))


def _dequantized(x: mx.array, matrix: Matrix, stream: mx.Stream | mx.Device | None) -> mx.array:
    return _multiplied(x, matrix.float32(stream), stream)


def _multiplied(x: mx.array, weight: mx.array, stream: mx.Stream | mx.Device | None) -> mx.array:
    weight = weight.astype(x.dtype, stream=stream)
    return mx.matmul(weight, x.T, stream=stream).T  # several times faster on a CPU than x @ weight.T


def shape_of(matrix: Matrix, activations: mx.Dtype) -> Shape:
    """Return the shape of a packed matrix."""
    packing = matrix.packing
    if packing is None:
        raise ValueError("the matrix is not packed")
    quantization, (rows, groups) = packing.quantization, packing.scales.shape
    dtypes = name_of(packing.scales.dtype), name_of(activations)
    return Shape(rows, groups * quantization.group_size, quantization.bits, quantization.group_size, *dtypes)


def name_of(dtype: mx.Dtype) -> str:
    """Return a dtype's name, such as ``bfloat16``."""
    return str(dtype).removeprefix("mlx.core.")


def shares(height: int, parts: int) -> Iterator[slice]:
    """Share rows out over streams, as evenly as they go."""
    return (slice(first, last) for first, last in pairwise(height * part // parts for part in range(parts + 1)))


def workarounds(replaced: Iterable[tuple[Shape, int]]) -> list[str]:
    """Return kernels that were replaced, a line for each shape; each is given with its rows of input."""
    positions: dict[str, list[int]] = {}
    for shape, rows in replaced:
        positions.setdefault(str(shape), []).append(rows)
    return [f"{shape}, {_positions(rows)} of input" for shape, rows in positions.items()]


def _positions(tried: list[int]) -> str:
    return ", ".join(map(str, tried)) + (" row" if tried == [1] else " rows")
