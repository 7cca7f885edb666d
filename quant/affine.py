"""The affine group format of MLX: ``w ≈ scale * code + bias`` for each group of weights along the last axis.

Codes are a little-endian bit stream along the row, seen as uint32, as ``mx.quantize`` (mode "affine") packs them.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import group, kernels, packing
from .importance import problems_of, weighing

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
METHODS = ("lsq", "rtn", "gptq", "lsq_unweighted")  # as recipes, manifests and reports store them
METHOD_NAMES = ("mse", "rtn", "gptq", "mse-unweighted")  # as people call them; lsq is another method in papers
_STORED = {"mse": "lsq", "mse-unweighted": "lsq_unweighted"}
WEIGHTED = ("lsq",)  # those that weigh errors by the gains of the norm that a matrix reads
_SEARCHED = ("lsq", "lsq_unweighted")
DATA_DRIVEN = ("gptq",)  # those that need more than the weights
DEFAULT_METHOD = "lsq"
DEFAULT_METHOD_NAME = "mse"  # of the same

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
NOT_QUANTIZABLE = "hold values that are NaN, infinite, or too far apart"  # of groups
STORAGE = {BFLOAT16: group.BFLOAT16, FLOAT16: group.FLOAT16, FLOAT32: group.FLOAT32}


def stored_method(name: str) -> str:
    """Return a method as recipes and manifests store it: ``lsq`` for ``mse``, other names likewise."""
    return _STORED.get(name, str(name)) if isinstance(name, str) else name  # untrusted recipes may hold anything


def method_name(stored: str) -> str:
    """Return what people call a method, such as ``mse`` for ``lsq``."""
    return next((name for name, method in _STORED.items() if method == stored), stored)


@dataclass(frozen=True)
class QuantizationConfig:
    """How a tensor is quantized.

    bits: width of a code. group_size: weights that share one scale and bias. method: ``rtn`` (the grid and rounding
    of ``mx.quantize``), ``lsq`` (least squares and clip search from there; also called ``mse``), ``lsq_unweighted``
    (which never weighs the errors of columns) or ``gptq`` (by the layer's inputs, see ``gptq.gptq``).
    """

    bits: int
    group_size: int
    method: str = DEFAULT_METHOD

    def __post_init__(self) -> None:
        """Take both names of a method."""
        object.__setattr__(self, "method", stored_method(self.method))

    def problems(self) -> dict[str, str]:
        """Return the settings that are not allowed, by name, each with what it is and what is allowed."""
        problems = {}
        for what, value, allowed in (
            ("bits", self.bits, BITS),
            ("group_size", self.group_size, GROUP_SIZES),
            ("method", self.method, METHODS),
        ):
            right_type = isinstance(value, type(allowed[0])) and not isinstance(value, bool)  # 4.0 == 4, and True == 1
            if not right_type or value not in allowed:
                names = METHOD_NAMES if what == "method" else allowed
                problems[what] = f"is {value!r}: use one of {', '.join(map(str, names))}"
        return problems

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight (bpw), with its share of a 16-bit scale and bias."""
        return self.bits + 32 / self.group_size

    @property
    def label(self) -> str:
        """Short name for tables, such as ``4 bit g64 mse``."""
        return f"{self.bits} bit g{self.group_size} {method_name(self.method)}"


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix and its quantization error.

    weight: uint32 ``[rows, columns * bits / 32]``. scales, biases: ``[rows, columns / group_size]`` in their storage
    dtype. squared_error, squared_norm: sums over the matrix. overflowed, flushed: scales and biases above the
    largest value of the storage dtype (stored as that), or below its smallest (stored as zero).
    """

    weight: NDArray[np.uint32]
    scales: NDArray[np.generic]
    biases: NDArray[np.generic]
    squared_error: float
    squared_norm: float
    overflowed: int
    flushed: int

    @property
    def relative_rmse(self) -> float:
        """Root of squared error over squared norm; 0 for a matrix of zeros that is kept exactly."""
        return relative_rmse(self.squared_error, self.squared_norm)


def relative_rmse(squared_error: float, squared_norm: float) -> float:
    """Return the root-mean-square error over the root-mean-square weight."""
    return float(np.sqrt(squared_error / squared_norm)) if squared_norm else float(squared_error > 0)


def quantize(
    weight: NDArray[np.generic],
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic] | None = None,
    importance: NDArray[np.generic] | None = None,
) -> Quantized:
    """Quantize a matrix ``[rows, columns]`` of bfloat16, float16 or float32.

    Scales and biases are stored as ``storage``, by default the dtype of the weights. With method ``rtn`` every word,
    scale and bias equals that of ``mx.quantize`` on the CPU; with ``lsq`` no group has a larger squared error.
    importance: ``[columns]``, for ``lsq``: by how much the squared errors of each column count, such as the squared
    gains of the norm that the matrix reads; then no group's weighted error is larger than with ``rtn``, up to rounding
    in float32. Proportions within a group count, and zeros alone are ones. Errors in the result are unweighted.

    Raises ValueError for unknown settings or dtypes, columns that are not a multiple of the group size, weights that
    are not finite, groups whose range overflows float32, and an importance of another shape or method, or which is
    negative or not finite.
    """
    storage = weight.dtype if storage is None else np.dtype(storage)
    problems = [f"{name} {problem}" for name, problem in quantization.problems().items()]
    if quantization.method in DATA_DRIVEN:
        problems.append(f"{quantization.method} needs more than the weights")
    if weight.ndim != 2:
        problems.append(f"the weights have shape {list(weight.shape)}: give a matrix")
    elif weight.shape[1] % quantization.group_size:
        problems.append(f"rows of {weight.shape[1]} weights are not divided by groups of {quantization.group_size}")
    if weight.dtype not in STORAGE or storage not in STORAGE:
        problems.append(f"dtypes are {weight.dtype} and {storage}: use bfloat16, float16 or float32")
    if importance is not None and weight.ndim == 2:
        problems += problems_of(importance, weight.shape[1], quantization.method in WEIGHTED)
    if problems:
        raise ValueError("; ".join(problems))
    rows, columns = weight.shape
    groups = rows * columns // quantization.group_size
    words, shift = _words(weight)
    packed = np.empty((groups, quantization.group_size * quantization.bits // 8), np.uint8)
    scales, biases = np.empty(groups, np.float32), np.empty(groups, np.float32)
    statistics = np.zeros(kernels.STATISTICS, np.float64)
    kernels.quantize_groups(
        words.reshape(groups, quantization.group_size),
        shift,
        quantization.bits,
        STORAGE[storage],
        quantization.method in _SEARCHED,
        np.float32(kernels.clip_step(quantization.bits)),
        None if importance is None else weighing(importance, quantization.group_size),
        packed,
        scales,
        biases,
        statistics,
    )
    if statistics[kernels.NON_FINITE]:
        raise ValueError(f"{int(statistics[kernels.NON_FINITE])} groups {NOT_QUANTIZABLE}")
    return Quantized(
        weight=packed.reshape(rows, -1).view("<u4"),
        scales=scales.astype(storage).reshape(rows, -1),
        biases=biases.astype(storage).reshape(rows, -1),
        squared_error=float(statistics[kernels.SQUARED_ERROR]),
        squared_norm=float(statistics[kernels.SQUARED_NORM]),
        overflowed=int(statistics[kernels.OVERFLOW]),
        flushed=int(statistics[kernels.FLUSHED]),
    )


def round_into(
    values: NDArray[np.float32],
    weight: NDArray[np.generic],
    bits: int,
    group_size: int,
    storage: np.dtype[np.generic],
) -> None:
    """Quantize a matrix ``[rows, columns]`` by ``rtn`` and dequantize it into ``values`` of the same shape.

    It takes one pass. The values are those of ``dequantize(quantize(...))``, without packing codes. Raises ValueError
    for what it cannot quantize.
    """
    rows, columns = weight.shape
    if weight.dtype not in STORAGE or columns % group_size:
        raise ValueError(f"{weight.dtype} weights with {columns} columns cannot be rounded in groups of {group_size}")
    words, shift = _words(weight)
    shape = rows * columns // group_size, group_size
    how = shift, bits, STORAGE[np.dtype(storage)]
    if broken := kernels.round_groups(words.reshape(shape), *how, values.reshape(shape)):
        raise ValueError(f"{broken} groups {NOT_QUANTIZABLE}")


def _words(weight: NDArray[np.generic]) -> tuple[NDArray[np.generic], int]:
    """Return the bits of weights, and by how many places they are shifted to be those of a float32."""
    if weight.dtype == BFLOAT16:
        return np.ascontiguousarray(weight).view(np.uint16), 16
    return np.ascontiguousarray(weight, dtype=np.float32).view(np.uint32), 0


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Return codes ``[rows, columns]`` as packed words ``[rows, columns * bits / 32]``."""
    rows, columns = codes.shape
    packed = np.empty((rows, columns * bits // 8), np.uint8)
    packing.pack_rows(codes, bits, packed)
    return packed.view("<u4")


def unpack(weight: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Return the codes ``[rows, columns]`` of packed words ``[rows, columns * bits / 32]``."""
    codes = np.empty((len(weight), weight.shape[1] * 32 // bits), np.uint8)
    packing.unpack_rows(np.ascontiguousarray(weight).view(np.uint8), bits, codes)
    return codes


def dequantize(quantized: Quantized, quantization: QuantizationConfig) -> NDArray[np.float32]:
    """Return the float32 weights ``[rows, columns]`` of a quantized matrix."""
    wide = (
        unpack(quantized.weight, quantization.bits)
        .astype(np.float32)
        .reshape(*quantized.scales.shape, quantization.group_size)
    )
    wide *= quantized.scales.astype(np.float32)[..., None]
    wide += quantized.biases.astype(np.float32)[..., None]
    return np.asarray(wide.reshape(len(quantized.weight), -1))
