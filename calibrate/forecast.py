"""What quantization by data takes on this machine, and what it may be worth, before anybody begins with it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..convert.bundle.plan import Plan
from ..convert.bundle.quantized_store import MatrixKey
from ..convert.bundle.recipe import Recipe
from ..convert.preparation import planned
from ..convert.progress import duration
from ..convert.source.architecture import Architecture
from ..convert.source.source import Source
from ..model.tokens import CALIBRATION_FRAMES, CALIBRATION_SESSIONS, read_token_file
from ..quant.affine import DATA_DRIVEN, METHOD_NAMES, METHODS
from .work import Work, generation_work, gptq_work

if TYPE_CHECKING:
    from .rates import Rates

RECORDED = 2048  # frames of recordings, of which a forecast says what they take


@dataclass(frozen=True)
class Gain:
    """What ``gptq`` left of the agent's divergence of another method, 4 bit, on a test model of so many layers."""

    layers: int
    left: Mapping[str, float]


# Of docs/fidelity.md: held-out tokens, 4 bit, group 64, as many calibration sequences as there are.
GAINS = (
    Gain(4, {"rtn": 0.26, "lsq": 0.34, "lsq_unweighted": 0.33}),
    Gain(24, {"rtn": 0.076, "lsq": 0.10, "lsq_unweighted": 0.096}),
)
WORTH_IT = 4  # bits, at most: above them there is little left to gain


@dataclass(frozen=True)
class Forecast:
    """Seconds on this machine. generating: of calibration tokens, 0 if they are given. gptq: of layer-wise GPTQ."""

    generating: float
    gptq: float

    @property
    def text(self) -> str:
        """What a person reads."""
        line = f"layer-wise GPTQ: about {duration(self.gptq)} on this machine"
        if not self.generating:
            return line
        return f"{line}, after about {duration(self.generating)} for generating calibration tokens"


def forecast(
    plan: Plan, tokens: str | Path | None = None, stored: Mapping[MatrixKey, str] | None = None
) -> Forecast | None:
    """Forecast a conversion by data, from a few seconds of measurement; None if its recipe needs no data.

    tokens: calibration tokens; None if the model generates them. stored: matrices that are quantized already.
    Fine-tuning is not in it.
    """
    if not any(output.quantization and output.quantization.method in DATA_DRIVEN for output in plan.outputs):
        return None
    if tokens is None:
        sequences, frames = CALIBRATION_SESSIONS, CALIBRATION_FRAMES
    else:
        sequences, _, frames = read_token_file(Path(tokens), plan.inventory.architecture).shape
    return _forecast(plan, sequences, frames, tokens is None, stored or {})


def line(expected: Forecast | None) -> str:
    """Return what a dry run adds to its last line: a line of its own, nothing where no data is needed."""
    return f"\n{expected.text}" if expected else ""


def to_json(expected: Forecast | None) -> dict[str, dict[str, float]]:
    """Return the same for a program: seconds by step."""
    seconds = {"generating_tokens": expected.generating, "gptq": expected.gptq} if expected else {}
    return {"forecast_seconds": {step: round(value, 1) for step, value in seconds.items()}} if expected else {}


def _forecast(plan: Plan, sequences: int, frames: int, generating: bool, stored: Mapping[MatrixKey, str]) -> Forecast:
    from ..model import torch_device as devices  # imports torch: seconds that other plans do not need

    measured = _measured(plan.inventory.architecture)
    generated = generation_work(plan, devices.memory()) if generating else Work()
    return Forecast(measured.seconds(generated), measured.seconds(gptq_work(plan, sequences, frames, stored)))


def seconds_of(architecture: Architecture) -> Callable[[Work], float]:
    """Return what tells how long a piece of work takes on this machine, from a few seconds of measurement."""
    return _measured(architecture).seconds


@cache
def _measured(architecture: Architecture) -> "Rates":
    from . import rates

    return rates.measure(architecture)


def advice(source: Source, recipe: Recipe) -> str | None:
    """Return a line on what data may buy for a recipe that quantizes by the weights alone: its cost here, and figures.

    None where a recipe uses data already, or keeps so many bits that there is little to gain.
    """
    plan = planned(source, recipe)[1]
    linear = [output.quantization for output in plan.outputs if output.quantization and output.role.kind == "linear"]
    few = [quantization for quantization in linear if quantization.bits <= WORTH_IT]
    if not few or any(quantization.method in DATA_DRIVEN for quantization in linear):
        return None
    by_data = planned(source, recipe.with_method("gptq"))[1]
    sequences = max(1, RECORDED // CALIBRATION_FRAMES)
    recorded = _forecast(by_data, sequences, RECORDED // sequences, False, {})
    generated = _forecast(by_data, CALIBRATION_SESSIONS, CALIBRATION_FRAMES, True, {})
    gain = min(GAINS, key=lambda gain: abs(math.log(gain.layers / source.architecture.num_layers)))
    method, given = METHOD_NAMES[METHODS.index(few[0].method)], duration(recorded.gptq)
    return (
        f"gptq: about {given} on this machine with {RECORDED} frames of recordings, "
        f"{duration(generated.generating + generated.gptq)} with tokens that the model generates; "
        f"on a small test model of {gain.layers} layers it left {gain.left[few[0].method]:.0%} of the divergence of "
        f"{method} at 4 bit"
    )
