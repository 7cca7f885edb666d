"""A test of MLX's own kernels on a bundle's shapes, before the bundle is blamed: broken ones look like bad weights."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..convert.bundle.reader import Layout
from ..quant.affine import QuantizationConfig, Quantized, dequantize
from .matmul import QuantizedMatmul, Shape, shares
from .mlx_device import device_name, on_gpu
from .mlx_weights import Matrix, Packing

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_TF32 = 2.0**-11  # what GPUs make of float32 before they multiply, where they may
_PERIOD = 251  # different rows of a weight; below them the same again, out of step with any kernel's tiles
_BLOCK = 64  # rows of a weight whose error is looked at apart, so that a wrong edge does not vanish in the mean


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
) -> tuple[list[dict[str, Any]], QuantizedMatmul]:
    """Multiply random weights of these shapes on the present device, for one row of input, a few and many.

    products: what multiplies, MLX's own on this device for None. advance: called after each shape. Returns a row for
    each test (docs/verification.md), and products in which what was wrong is replaced by dequantizing and multiplying.
    The rows tell whether that was wrong as well: ``failures``.
    """
    matmul = matmul or default_matmul()
    found = []
    for shape in shapes:
        found += _try(shape, matmul)
        advance()
    return found, replace(matmul, replaced=replacing(found))


def default_matmul() -> QuantizedMatmul:
    """Return MLX's own products on the present device."""
    return QuantizedMatmul(padded=on_gpu())


def _try(shape: Shape, matmul: QuantizedMatmul) -> list[dict[str, Any]]:
    """Return the rows of one shape."""
    random = np.random.Generator(np.random.PCG64(7))
    matrix, plain = _weight(shape, random)
    dtype = DTYPES[shape.activations]
    inputs = mx.array(random.standard_normal((max(matmul.tried), shape.columns), np.float32)).astype(dtype)
    few = np.array(inputs.astype(mx.float32)).astype(np.float64) @ plain.T.astype(np.float64)
    found = []
    for rows in matmul.tried:
        x, expected = inputs[:rows], few[:rows]
        row = judged(shape, rows, _error(matmul(x, matrix), expected), None)
        if not row["relative_l2"] <= row["bound"]:
            row = judged(shape, rows, row["relative_l2"], _error(matmul.dequantized(x, matrix), expected))
        found.append(row)
    return found


def judged(shape: Shape, positions: int, error: float | None, instead: float | None) -> dict[str, Any]:
    """Return the row of a test: the error of the packed product, that of the work-around if it was tried, the bound.

    An error of None is infinite. Raises ValueError or TypeError for what is no such thing.
    """
    allowed = bound(shape, on_gpu())
    measured = float("inf") if error is None else float(error)
    replaced = not measured <= allowed and instead is not None and float(instead) <= allowed
    if type(positions) is not int or positions < 1 or measured < 0:
        raise ValueError("not the row of a test")
    row = asdict(shape) | {"positions": positions, "relative_l2": measured, "bound": allowed}
    return row | {"replaced": replaced, "instead": instead}


def shape_in(row: Mapping[str, Any]) -> Shape:
    """Return the shape that a row of a test is about; raises LookupError, TypeError or ValueError if it has none."""
    shape = Shape(**{field.name: row[field.name] for field in fields(Shape)})
    numbers = (shape.rows, shape.columns, shape.bits, shape.group_size)
    if any(type(number) is not int or number < 1 for number in numbers) or not {shape.scales, shape.activations} <= set(
        DTYPES
    ):
        raise ValueError("not a shape")
    return shape


def replacing(rows: Iterable[Mapping[str, Any]]) -> frozenset[tuple[Shape, int]]:
    """Return what a test says is to be replaced."""
    return frozenset((shape_in(row), row["positions"]) for row in rows if row["replaced"])


def _weight(shape: Shape, random: np.random.Generator) -> tuple[Matrix, NDArray[np.float32]]:
    """Return a packed weight of a shape, and what the first rows of it, which come again and again, stand for."""
    quantization, height = QuantizationConfig(shape.bits, shape.group_size), min(shape.rows, _PERIOD)
    codes = random.integers(0, 1 << 32, (height, shape.columns * shape.bits // 32), np.uint32)
    scales = random.uniform(0.5, 1.5, (height, shape.columns // shape.group_size)).astype(np.float32)
    biases = scales * random.uniform(-1.1, -0.9, scales.shape).astype(np.float32) * ((1 << shape.bits) - 1) / 2
    sides = [mx.array(side.astype(np.float32)).astype(DTYPES[shape.scales]) for side in (scales, biases)]
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


def failures(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of a test that nothing works around."""
    return [row for row in rows if not row["relative_l2"] <= row["bound"] and not row["replaced"]]


def complaint(row: Mapping[str, Any]) -> str:
    """Return who is at fault for a kernel that nothing works around."""
    instead = "not finite" if row["instead"] is None else f"off by {row['instead']:.2g}"
    return (
        f"MLX {version('mlx')} computes wrongly on this device ({device_name()}), the bundle may be sound: "
        f"quantized_matmul of {shape_in(row)} with {row['positions']} rows of input is off by {row['relative_l2']:.2g} "
        f"(at most {row['bound']:.2g}), and dequantizing and multiplying, which would work around it, is {instead}: "
        "try --device cpu or another version of MLX"
    )
