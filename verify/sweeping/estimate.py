"""What a dry run says of a cell: its size from the plan, and how long it takes on this machine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ...calibrate.forecast import forecast
from ...convert.bundle.plan import Plan
from ...convert.errors import Problem, UserError
from ...convert.preparation import plan as plan_of
from ...convert.source.architecture import Architecture
from ...model.tokens import DEFAULT_FRAMES, DEFAULT_SEQUENCES, read_token_file
from ...quant.affine import QuantizationConfig, quantize
from .cells import Cell
from .settings import Evaluation

_START = 4.0  # seconds of opening a source, testing kernels and drawing a report
_MODELS = 4  # whose predictions are computed: reference, bundle, plain rounding, the reference in 16 bit
_WEIGHTS = 1 << 20  # that a method is timed with


@dataclass(frozen=True)
class Estimate:
    """A cell's bundle before it is made. nbytes, seconds: None where the source has to be fetched first.

    at_most: whether the size is a budget that the bundle stays below.
    """

    cell: Cell
    nbytes: int | None
    seconds: float | None
    at_most: bool = False


def estimates(cells: Sequence[Cell], evaluation: Evaluation, gpus: int = 1) -> list[Estimate]:
    """Return an estimate for each cell, from plans and a few seconds of measurement.

    gpus: that a cell's conversion computes on. Nothing is written or downloaded. Raises UserError that lists all
    recipes that do not fit their sources.
    """
    problems: list[str | Problem] = []
    made = []
    for cell in cells:
        try:
            made.append(_estimate(cell, evaluation, gpus))
        except UserError as error:
            problems += [problem.within(cell.name) for problem in error.problems]
    if problems:
        raise UserError(problems)
    return made


def _estimate(cell: Cell, evaluation: Evaluation, gpus: int) -> Estimate:
    source = cell.source
    if source.is_url:
        return Estimate(cell, None, None)
    which = (source.revision, source.adapter, source.fill_depformer_steps)
    plan = plan_of(
        source.where, cell.quantized, revision=which[0], adapter=which[1], fill_depformer_steps=which[2], quiet=True
    )
    seconds = _START + _converting(plan) + _verifying(plan, evaluation)
    budget = cell.request.budget if cell.request else None
    if budget is None:
        tokens = cell.calibration.tokens[0] if cell.calibration and len(cell.calibration.tokens) == 1 else None
        by_data = forecast(plan, tokens, gpus=gpus)
        return Estimate(cell, plan.nbytes, seconds + (by_data.gptq if by_data else 0.0))
    left = budget.left(plan)
    return Estimate(cell, plan.nbytes + left if left < 0 else plan.nbytes, seconds, at_most=True)


def _converting(plan: Plan) -> float:
    """Return the seconds of quantizing a plan's weights by one core; GPTQ's own are not in it."""
    seconds = 0.0
    for output in plan.outputs:
        if output.quantization and output.quantization.method != "gptq":
            seconds += _per_weight(output.quantization.method) * float(np.prod(output.shape))
    return seconds


@cache
def _per_weight(method: str) -> float:
    """Return the seconds that quantizing a weight takes here, at 4 bit; what compiling takes does not count."""
    weights = np.random.default_rng(7).standard_normal((_WEIGHTS // 1024, 1024)).astype(np.float32)
    quantization = QuantizationConfig(4, 64, method)
    quantize(weights[:8], quantization)
    start = time.perf_counter()
    quantize(weights, quantization)
    return (time.perf_counter() - start) / weights.size


def _verifying(plan: Plan, evaluation: Evaluation) -> float:
    """Return the seconds of computing all predictions: products at the rate of this machine, weights made float."""
    architecture = plan.inventory.architecture
    sequences, frames = DEFAULT_SEQUENCES, DEFAULT_FRAMES
    if evaluation.tokens:
        sequences, _, frames = read_token_file(evaluation.tokens, architecture).shape
    positions = min(sequences, evaluation.sequences or sequences) * min(frames, evaluation.frames or frames)
    rates = _rates(architecture)
    models = _MODELS + len(evaluation.controls)
    return models * plan.parameters * (2 * positions * rates[0] + rates[1])


@cache
def _rates(architecture: Architecture) -> tuple[float, float]:
    """Return the seconds of a floating-point operation, and of making a weight float."""
    from ...calibrate.rates import measure  # imports torch: seconds that a mistake in the file does not need

    rates = measure(architecture)
    return rates.products, rates.read
