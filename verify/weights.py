"""Stored weights against those of the checkpoint, tensor by tensor and step by step."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.reader import Bundle
from ..convert.parallel import in_order_on
from ..convert.source.checkpoint import Checkpoint
from ..convert.tensorfile import CODES, DTYPES
from ..model.forward import Floats
from ..model.matmul import name_of
from ..model.mlx_weights import Matrix, Packing, read_matrix
from ..quant.affine import BFLOAT16
from ..quant.casting import cast
from .figures import WeightRow
from .metrics import root_ratio

_BLOCK = 1 << 21  # weights compared at a time
_PACKED = ("q", "k", "v")


@dataclass(frozen=True)
class Region:
    """Rows of an output that are measured for themselves: a depformer step's, or the q, k or v of a packed matrix."""

    output: Output
    first: int
    last: int
    step: int | None
    part: str | None


@dataclass
class Sums:
    """What adds up over a piece. at: row and column of the largest difference in the stored tensor."""

    error: float = 0.0
    norm: float = 0.0
    length: float = 0.0
    along: float = 0.0
    clipped: int = 0
    unequal: int = 0
    max_abs: float = 0.0
    at: tuple[int, int] = (0, 0)

    def add(self, other: "Sums") -> None:
        """Add what was seen of other rows."""
        for name in ("error", "norm", "length", "along", "clipped", "unequal"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if not (math.isnan(self.max_abs) or other.max_abs <= self.max_abs):  # NaN is the largest of all, and stays
            self.max_abs, self.at = other.max_abs, other.at


def pieces(output: Output) -> Iterator[Region]:
    """Cut an output into what is measured for itself."""
    height = (output.rows[1] - output.rows[0]) // output.parts
    names: tuple[str | None, ...] = _PACKED if output.role.module == "self_attn.in_proj" else (None,)
    for index in range(output.parts):
        step = index if output.parts > 1 else output.step
        for third, name in enumerate(names):
            first = index * height + third * height // len(names)
            yield Region(output, first, first + height // len(names), step, name)


def compare(
    bundle: Bundle, checkpoint: Checkpoint, output: Output, pool: ThreadPoolExecutor, kept: Floats | None = None
) -> list[WeightRow]:
    """Compare an output with the rows of the checkpoint that it was made from; return a row for each piece.

    pool: threads to work on, the same for all outputs: MLX gives each thread that it meets a stream for good. kept:
    ``[rows, columns]``, filled with the stored values in float32. Packed codes are decoded by ``mx.dequantize``.
    """
    step = max(1, _BLOCK // output.shape[-1])
    blocks = [
        (number, first, min(first + step, piece.last))
        for number, piece in enumerate(pieces(output))
        for first in range(piece.first, piece.last, step)
    ]
    sums = [Sums() for _ in pieces(output)]

    def look(block: tuple[int, int, int]) -> tuple[int, Sums]:
        number, first, last = block
        start = output.rows[0]
        stored = read_matrix(bundle, output, first, last)
        values = np.array(stored.float32(mx.cpu)).reshape(last - first, -1)
        if kept is not None:
            kept[first:last] = values
        return number, _look(values, stored, checkpoint.read(output.role.name, start + first, start + last), first)

    for number, more in in_order_on(pool, look, blocks):
        sums[number].add(more)
    return [_row(region, total, bundle) for region, total in zip(pieces(output), sums, strict=True)]


def _look(values: Floats, stored: Matrix, source: NDArray[Any], first: int) -> Sums:
    """Measure rows of stored values against the checkpoint's."""
    wide = _float32(source)
    apart = values - wide
    row, column = divmod(int(np.abs(apart).argmax()), source.shape[1])
    flat = [array.reshape(-1) for array in (apart, wide, values)]
    error, norm, length = (float(np.dot(array, array)) for array in flat)
    sums = Sums(error, norm, length, along=float(np.dot(flat[1], flat[2])))
    sums.max_abs, sums.at = float(abs(apart[row, column])), (first + row, column)
    if stored.packing is None:
        expected = cast(source, DTYPES[CODES[name_of(stored.weight.dtype)]]).array
        sums.unequal = int(np.count_nonzero(_float32(expected) != values))
    else:
        sums.clipped = _clipped(wide, stored.packing)
    return sums


def _float32(array: NDArray[Any]) -> Floats:
    if array.dtype == BFLOAT16:  # the upper half of a float32
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _clipped(weights: Floats, packing: Packing) -> int:
    """Count weights that lie more than half a step outside of the range that the codes of their group represent."""
    quantization = packing.quantization
    step, start = (np.array(side.astype(mx.float32, stream=mx.cpu)) for side in (packing.scales, packing.biases))
    end = start + step * ((1 << quantization.bits) - 1)
    slack = np.abs(step) / 2
    low, high = np.minimum(start, end) - slack, np.maximum(start, end) + slack
    groups = weights.reshape(len(weights), -1, quantization.group_size)
    wide = (groups.min(-1) < low) | (groups.max(-1) > high)  # few groups clip: weights are counted in those alone
    beyond = (groups[wide] < low[wide][:, None]) | (groups[wide] > high[wide][:, None])
    return int(np.count_nonzero(beyond))


def _row(region: Region, sums: Sums, bundle: Bundle) -> WeightRow:
    output, role = region.output, region.output.role
    count = (region.last - region.first) * output.shape[-1]
    quantization = output.quantization
    both = sums.norm * sums.length
    return WeightRow(
        tensor=output.name,
        source=role.name,
        file=bundle.layout.files[output],
        component=role.component,
        module=role.module,
        layer=role.layer,
        step=region.step,
        projection=region.part,
        bits=quantization.bits if quantization else None,
        group_size=quantization.group_size if quantization else None,
        bits_per_weight=8 * output.nbytes / math.prod(output.shape),
        parameters=count,
        relative_rmse=root_ratio(sums.error, sums.norm),
        sqnr_db=10 * math.log10(sums.norm / sums.error) if sums.error > 0 and sums.norm > 0 else None,
        cosine=sums.along / math.sqrt(both) if both > 0 else None,
        max_abs=sums.max_abs,
        max_abs_at=sums.at,
        clipped=sums.clipped / count if quantization else None,
        unequal=None if quantization else sums.unequal,
        squared_error=sums.error,
        squared_norm=sums.norm,
    )
