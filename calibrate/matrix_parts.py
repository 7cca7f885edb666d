"""Parts of matrices that workers quantize side by side: whole ones, or some of their rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..convert.bundle.quantized_store import MatrixKey
from ..convert.bundle.records import Adjustment
from ..convert.errors import UserError
from ..convert.tensorfile import DTYPES
from ..model.weights import Weights
from ..quant.affine import QuantizationConfig
from ..quant.column_rounding import ROWS
from ..quant.gptq import FALLBACK, Inputs, Moments, Outcome, Prepared, gptq_with_retries
from ..quant.packed_matrix import PackedMatrix
from .workers import Workers


@dataclass(frozen=True)
class MatrixPart:
    """Rows of a matrix; they begin, and end or are the last, where a block of rows that make up for each other does."""

    key: MatrixKey
    first: int
    last: int

    def share(self, heights: Mapping[MatrixKey, int]) -> float:
        """Return which share of its matrix this is."""
        return (self.last - self.first) / heights[self.key]


def parts_of(heights: Mapping[MatrixKey, int], workers: Workers) -> list[MatrixPart]:
    """Return what one of the workers quantizes of matrices of so many rows.

    Whole matrices where there are enough of them, so that each worker factors the moments of its own only.
    """
    if len(heights) >= workers.size:
        return [MatrixPart(key, 0, height) for key, height in list(heights.items())[workers.rank :: workers.size]]
    parts = []
    for key, height in heights.items():
        blocks = workers.share(-(-height // ROWS))
        part = MatrixPart(key, ROWS * blocks.start, min(height, ROWS * blocks.stop))
        if part.first < part.last:
            parts.append(part)
    return parts


@dataclass(frozen=True)
class Rounding:
    """What quantizes parts of some matrices. read: their weights. gradients: at outputs, of some of them."""

    read: Weights
    quantizations: Mapping[MatrixKey, tuple[QuantizationConfig, str]]
    moments: Mapping[MatrixKey, Moments | Inputs]
    gradients: Mapping[MatrixKey, Tensor]
    _prepared: list[tuple[Moments | Inputs, dict[float, Prepared]]] = field(default_factory=list)

    def outcome(self, part: MatrixPart) -> Outcome:
        """Quantize a part; raises UserError for weights that cannot be quantized."""
        quantization, dtype = self.quantizations[part.key]
        weight, of_inputs, gradients = self.read(*part.key), self.moments[part.key], self.gradients.get(part.key)
        if part.last - part.first < len(weight):
            rows = slice(part.first, part.last)
            weight, of_inputs = weight[rows], _of_rows(of_inputs, rows)
            gradients = None if gradients is None else gradients[part.first // ROWS : -(-part.last // ROWS)]
        if not self._prepared or self._prepared[0][0] is not of_inputs:  # depformer_in: 16 matrices read the same
            self._prepared[:] = [(of_inputs, {})]
        prepared = self._prepared[0][1]
        try:
            return gptq_with_retries(weight, of_inputs, quantization, DTYPES[dtype], prepared, gradients)
        except ValueError as error:
            raise UserError(f"{part.key[0]}: {error}: give a recipe that keeps it float") from None


def _of_rows(of_inputs: Moments | Inputs, rows: slice) -> Moments | Inputs:
    """Return moments for some rows of a matrix only."""
    if of_inputs.residual is None:
        return of_inputs
    if isinstance(of_inputs, Inputs):
        return replace(of_inputs, residual=of_inputs.residual[:, rows])
    return replace(of_inputs, residual=of_inputs.residual[rows])


def joined_outcomes(
    made: Sequence[Sequence[tuple[MatrixPart, Outcome]]], rounding: Rounding
) -> dict[MatrixKey, Outcome]:
    """Return whole matrices, in order, of the parts that each worker made.

    A matrix whose parts were not quantized in the same way, as some of them could not be, is quantized whole here: as
    one worker alone would.
    """
    by_key: dict[MatrixKey, list[tuple[MatrixPart, Outcome]]] = {key: [] for key in rounding.moments}
    for of_worker in made:
        for part, outcome in of_worker:
            by_key[part.key].append((part, outcome))
    outcomes = {}
    for key, parts in by_key.items():
        first = parts[0][1]
        if all((outcome.damping, outcome.reason) == (first.damping, first.reason) for _, outcome in parts):
            outcomes[key] = replace(first, matrix=_joined([outcome.matrix for _, outcome in parts]))
        else:
            outcomes[key] = rounding.outcome(MatrixPart(key, 0, parts[-1][0].last))
    return outcomes


def _joined(parts: Sequence[PackedMatrix]) -> PackedMatrix:
    """Return a matrix of its rows."""
    if len(parts) == 1:
        return parts[0]
    return PackedMatrix(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "scales", "biases"))
    )


def adjustment_of(outcome: Outcome) -> Adjustment:
    """Return what a manifest records of a matrix for which the usual damping of GPTQ was not enough."""
    return Adjustment(outcome.reason, FALLBACK if outcome.damping is None else None, outcome.damping)


def warning_of(outcome: Outcome) -> str:
    """Return the same for people."""
    how = f"by its weights alone ({FALLBACK})" if outcome.damping is None else f"with damping {outcome.damping:g}"
    return f"{outcome.reason}: quantized {how}"
