"""A test of MLX's own kernels on a bundle's shapes, before the bundle is blamed: broken ones look like bad weights."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..convert import typed_json
from ..convert.bundle.reader import Layout
from ..convert.errors import Problem
from ..convert.hints import Hint
from ..convert.schema import Leaf, number, whole
from ..quant.affine import QuantizationConfig, Quantized, dequantize
from . import matmul as products
from .matmul import FLOAT_DTYPES, QuantizedMatmul, Shape, shares
from .mlx_device import device_name, on_gpu
from .mlx_weights import Matrix, Packing

_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_TF32 = 2.0**-11  # what GPUs make of float32 before they multiply, where they may
_PERIOD = 251  # different rows of a weight; below them the same again, out of step with any kernel's tiles
_BLOCK = 64  # rows of a weight whose error is looked at apart, so that a wrong edge does not vanish in the mean


_Size = Annotated[int, whole(1)]
_Amount = Annotated[float, number(0)]
_Dtype = Annotated[
    str, Leaf(f"one of {', '.join(FLOAT_DTYPES)}", lambda value: isinstance(value, str) and value in FLOAT_DTYPES)
]


@dataclass(frozen=True)
class KernelRow:
    """The test of one kernel, as a report and the cache of the speaking programs hold it.

    rows, columns, bits, group_size, scales, activations: the shape. positions: rows of input. relative_l2: error of the
    packed product; bound: what rounding explains. instead: error of the work-around, None if it was not tried.
    replaced: whether it is used. Errors are None where JSON has no number for them: infinity.
    """

    rows: _Size
    columns: _Size
    bits: _Size
    group_size: _Size
    scales: _Dtype
    activations: _Dtype
    positions: _Size
    relative_l2: _Amount | None
    bound: _Amount
    replaced: bool
    instead: _Amount | None

    @property
    def shape(self) -> Shape:
        """What was multiplied."""
        return Shape(self.rows, self.columns, self.bits, self.group_size, self.scales, self.activations)

    @property
    def passed(self) -> bool:
        """Whether the packed kernel is within the bound."""
        return self.relative_l2 is not None and self.relative_l2 <= self.bound

    @classmethod
    def from_json(cls, data: Any) -> "KernelRow":
        """Return a row of parsed JSON; raises ValueError for anything else."""
        return typed_json.from_json(cls, data)


def bound(shape: Shape, gpu: bool) -> float:
    """Return the largest relative L2 error that rounding explains.

    Inputs, decoded weights and results are rounded a few times (to TF32 in a float32 product of GPUs). A sum of n terms
    in one order, rounded at each step, adds sqrt(n / 6) roundings of its final size, other orders less. GPUs sum in
    float32, MLX on processors in the dtype of the product. A broken kernel is off by about 1.
    """
    wide = shape.activations if shape.activations == shape.scales else "float32"  # MLX promotes before it multiplies
    inputs = max(_ROUNDING[shape.activations], _ROUNDING[wide], _TF32 if gpu and wide == "float32" else 0.0)
    return 4 * inputs + _ROUNDING["float32" if gpu else wide] * math.sqrt(shape.columns)


def shapes_of(layout: Layout, scales: str, activations: str, streams: int) -> list[Shape]:
    """Return the distinct shapes that are multiplied where each matrix is shared out over so many streams.

    scales, activations: dtypes.
    """
    found = set()
    for output in layout.every():
        if output.quantization and output.role.kind == "linear":
            height = (output.rows[1] - output.rows[0]) // output.parts
            sizes = {part.stop - part.start for part in shares(height, streams)} - {0}
            setting = (output.shape[-1], output.quantization.bits, output.quantization.group_size, scales, activations)
            found |= {Shape(size, *setting) for size in sizes}
    return sorted(found)


def check(
    shapes: Iterable[Shape], matmul: QuantizedMatmul | None = None, advance: Callable[[], object] = lambda: None
) -> tuple[list[KernelRow], QuantizedMatmul]:
    """Multiply random weights of these shapes on the present device, for one row of input, a few and many.

    matmul: what multiplies, MLX's own on this device for None. advance: called after each shape. Returns a row for each
    test, and products in which wrong kernels are replaced by dequantizing and multiplying. Whether that was wrong as
    well is in the rows: ``failures``.
    """
    matmul = matmul or default_matmul()
    rows = []
    for shape in shapes:
        rows += _try(shape, matmul)
        advance()
    return rows, replace(matmul, replaced=replaced_in(rows))


def default_matmul() -> QuantizedMatmul:
    """Return MLX's own products on the present device."""
    return QuantizedMatmul(padded=on_gpu())


def _try(shape: Shape, matmul: QuantizedMatmul) -> list[KernelRow]:
    """Return the rows of one shape."""
    random = np.random.Generator(np.random.PCG64(7))
    matrix, plain = _weight(shape, random)
    dtype = FLOAT_DTYPES[shape.activations]
    inputs = mx.array(random.standard_normal((max(matmul.tried), shape.columns), np.float32)).astype(dtype)
    few = np.array(inputs.astype(mx.float32)).astype(np.float64) @ plain.T.astype(np.float64)
    tested = []
    for rows in matmul.tried:
        x, expected = inputs[:rows], few[:rows]
        row = judged(shape, rows, _error(matmul(x, matrix), expected), None)
        if not row.passed:
            row = judged(shape, rows, row.relative_l2, _error(matmul.dequantized(x, matrix), expected))
        tested.append(row)
    return tested


def judged(shape: Shape, positions: int, error: float | None, instead: float | None) -> KernelRow:
    """Return the row of a test: the error of the packed product, that of the work-around if it was tried, the bound.

    An error of None is infinite.
    """
    allowed = bound(shape, on_gpu())
    measured = math.inf if error is None else error
    replaced = not measured <= allowed and instead is not None and instead <= allowed
    return KernelRow(
        shape.rows,
        shape.columns,
        shape.bits,
        shape.group_size,
        shape.scales,
        shape.activations,
        positions=positions,
        relative_l2=measured,
        bound=allowed,
        replaced=replaced,
        instead=instead,
    )


def replaced_in(rows: Iterable[KernelRow]) -> frozenset[tuple[Shape, int]]:
    """Return the shapes, and rows of input, whose kernel a test replaces."""
    return frozenset((row.shape, row.positions) for row in rows if row.replaced)


def workarounds(rows: Iterable[KernelRow]) -> list[str]:
    """Return the kernels that a test replaces, a line for each shape, in the order of the test."""
    return products.workarounds((row.shape, row.positions) for row in rows if row.replaced)


def _weight(shape: Shape, random: np.random.Generator) -> tuple[Matrix, NDArray[np.float32]]:
    """Return a packed weight of a shape, and what the first rows of it, which come again and again, stand for."""
    quantization, height = QuantizationConfig(shape.bits, shape.group_size), min(shape.rows, _PERIOD)
    codes = random.integers(0, 1 << 32, (height, shape.columns * shape.bits // 32), np.uint32)
    scales = random.uniform(0.5, 1.5, (height, shape.columns // shape.group_size)).astype(np.float32)
    biases = scales * random.uniform(-1.1, -0.9, scales.shape).astype(np.float32) * ((1 << shape.bits) - 1) / 2
    sides = [mx.array(side.astype(np.float32)).astype(FLOAT_DTYPES[shape.scales]) for side in (scales, biases)]
    exact = [np.array(side.astype(mx.float32)) for side in sides]
    plain = dequantize(Quantized(codes, exact[0], exact[1], 0.0, 0.0, 0, 0), quantization)
    again = mx.array(np.arange(shape.rows) % height)
    return Matrix(mx.array(codes), Packing(sides[0], sides[1], quantization)).take(again), plain


def _error(product: mx.array, expected: NDArray[np.float64]) -> float:
    """Return the relative L2 error of the worst block of a weight's rows; infinite for what is not finite.

    expected: ``[positions, rows]`` of the rows that come again and again.
    """
    with np.errstate(invalid="ignore"):  # what is no number is the error that is looked for
        found = np.array(product.astype(mx.float32)).astype(np.float64)
    away = found - expected[:, np.arange(found.shape[1]) % expected.shape[1]]
    by_block = [float(np.square(away[:, first : first + _BLOCK]).mean()) for first in range(0, away.shape[1], _BLOCK)]
    error = max(by_block) ** 0.5 / float(np.square(expected).mean()) ** 0.5
    return error if np.isfinite(error) else float("inf")


def failures(rows: Iterable[KernelRow]) -> list[KernelRow]:
    """Return the rows of a test that nothing works around."""
    return [row for row in rows if not row.passed and not row.replaced]


def complaint(row: KernelRow) -> Problem:
    """Return who is at fault for a kernel that nothing works around."""
    error = math.inf if row.relative_l2 is None else row.relative_l2
    instead = "not finite" if row.instead is None else f"off by {row.instead:.2g}"
    message = (
        f"MLX {version('mlx')} computes wrongly on this device ({device_name()}), the bundle may be sound: "
        f"quantized_matmul of {row.shape} with {row.positions} rows of input is off by {error:.2g} "
        f"(at most {row.bound:.2g}), and dequantizing and multiplying, which would work around it, is {instead}"
    )
    return Problem("", message, Hint.COMPUTE_ON_CPU)
