"""The limits of a bundle, and the reasons why it fails. Why the limits are what they are: docs/verification.md."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated

from ..convert.bundle.manifest import Manifest
from ..convert.bundle.recipe_file import limits_in
from ..convert.bundle.records import RecipeRecord
from ..convert.errors import printable
from ..convert.source.tensors import roles
from ..convert.typed_json import MAY_BE_MISSING
from ..model.tokens import SYSTEM_PROMPT, TokenDescription
from .figures import ActivationRow, PredictionFigures, StreamFigures, WeightRow, finite_or_infinite

FIGURES = {
    "text_kl": "text",
    "codebook0_kl": "codebook_0",
    "agent_kl": "agent",
    "agent_top1": "agent",
}  # limit -> stream
NAMES = {
    "text_kl": "KL of text",
    "codebook0_kl": "KL of codebook 0",
    "agent_kl": "KL of the agent's codebooks",
    "agent_top1": "top-1 agreement of the agent's codebooks",
}
AT_LEAST = {"agent_top1"}
MANY = 8  # recorded sequences, from which on the narrow factors apply


@dataclass(frozen=True)
class Factor:
    """How many times the control's figure is allowed. share: of the control's agent KL, added to the figure first."""

    times: float
    share: float = 0.0


# limit -> factor of the control's divergence, or of its share of top-1 tokens that differ: 1.2 times the largest ratio
# of two intact bundles of one checkpoint (benchmarks/verdicts.py)
NARROW = {"text_kl": Factor(2.1), "codebook0_kl": Factor(1.7), "agent_kl": Factor(1.5), "agent_top1": Factor(1.4)}
# A system prompt, or a few sequences, are many positions that are nearly equal: one direction of the error decides
# their divergence, which is then small by luck in one of two intact bundles.
WIDE = {
    "text_kl": Factor(5.0, 0.1),
    "codebook0_kl": Factor(5.0, 1.0),
    "agent_kl": Factor(3.0),
    "agent_top1": Factor(2.6),
}
TIMES_GAUSSIAN = 3.0  # a tensor's error over that of Gaussian weights
TIMES_GAUSSIAN_WEIGHTED = 12.0  # the same where errors were weighted: gains over 5 decades showed 4, over 8 showed 10
_LARGEST_ERROR = 0.8  # at any setting: a tensor of zeros has 1
RECORDED_WITHIN = 1e-4  # of the manifest's figure: float32 rounding moves it by some 1e-6
_SPREADS = 3.0  # standard deviations of a share of so many positions, which is allowed beside the factor
_NOISES = 3.0  # times the noise floor is allowed for 16-bit arithmetic: MLX rounds in other places than PyTorch
_STANDS_OUT = 3.0  # times what is usual for its kind: the lower quartile, since several may be broken


@dataclass(frozen=True)
class Limited:
    """A figure that a limit applies to, and its standard error over sequences."""

    value: float | None
    standard_error: float | None


def limited(figures: PredictionFigures, limit: str) -> Limited | None:
    """Return the figure that a limit applies to, None if no position counts."""
    if limit in AT_LEAST:
        return Limited(figures.top1.agreement, figures.top1.standard_error) if figures.top1 else None
    return Limited(figures.kl.mean, figures.kl.standard_error) if figures.kl else None


@cache
def gaussian_rmse(bits: int, group_size: int) -> float:
    """Return the relative error of Gaussian weights rounded to ``2**bits`` even steps between a group's ends.

    The expected range of a group over its steps, uniform within a step.
    """
    spacing = 0.001
    normal = (0.5 * math.erfc(-spacing * index / math.sqrt(2)) for index in range(-8000, 8000))
    expected_range = spacing * sum(1 - p**group_size - (1 - p) ** group_size for p in normal)
    return expected_range / ((1 << bits) - 1) / math.sqrt(12)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A reason why a bundle does not pass. check: what was looked at. limit: which one ``value`` is beyond, if any."""

    check: str
    limit: str | None
    place: Annotated[str | None, MAY_BE_MISSING]
    message: str
    value: Annotated[float | None, MAY_BE_MISSING]
    bound: Annotated[float | None, MAY_BE_MISSING]


def failure(
    check: str,
    place: str,
    message: str,
    value: float | None = None,
    bound: float | None = None,
    limit: str | None = None,
) -> Failure:
    """Return a failure whose texts are safe to print: names in files from others may hold control characters."""
    return Failure(
        check=check, limit=limit, place=printable(place), message=printable(message), value=value, bound=bound
    )


def weight_failures(rows: Iterable[WeightRow], manifest: Manifest) -> list[Failure]:
    """Return tensors that are not what their quantization makes of the checkpoint, or not what the manifest records."""
    failures = []
    norms = {name: role.norm for name, role in roles(manifest.architecture).items()}
    weighted = {
        (tensor.file, tensor.outputs[0])
        for tensor in manifest.tensors
        if tensor.weighted_by and tensor.weighted_by == norms.get(tensor.source)  # a manifest may claim anything
    }
    sums: dict[tuple[str, str], dict[int | None, list[float]]] = {}
    for row in rows:
        error = finite_or_infinite(row.relative_rmse)
        if row.bits is None or row.group_size is None:
            if row.unequal:
                message = (
                    f"{row.name}: {row.unequal} of {row.parameters} values are not the source's; the largest "
                    f"difference is {finite_or_infinite(row.max_abs):.3g} at {list(row.max_abs_at)}"
                )
                failures.append(failure("weights", row.name, message, error, 0.0))
            continue
        times = TIMES_GAUSSIAN_WEIGHTED if (row.file, row.tensor) in weighted else TIMES_GAUSSIAN
        bound = min(_LARGEST_ERROR, times * gaussian_rmse(row.bits, row.group_size))
        if not error <= bound:
            message = f"{row.name}: relative error {error:.2%}, at most {bound:.2%} at {row.bits} bit"
            failures.append(failure("weights", row.name, message, error, bound))
        total = sums.setdefault((row.file, row.tensor), {}).setdefault(row.step, [0.0, 0.0])
        total[0] += row.squared_error
        total[1] += row.squared_norm
    return failures + _not_as_recorded(sums, manifest)


def _not_as_recorded(
    sums: Mapping[tuple[str, str], Mapping[int | None, list[float]]], manifest: Manifest
) -> list[Failure]:
    """Return tensors whose error is not the one that the conversion measured, whole and for each stacked step.

    sums: squared error and squared norm by file, tensor and step.
    """
    recorded = {(tensor.file, tensor.outputs[0]): tensor for tensor in manifest.tensors if tensor.bits is not None}
    failures = []
    for (file, name), of_steps in sums.items():
        tensor = recorded.get((file, name))
        whole, by_step = (tensor.relative_rmse, tensor.relative_rmse_by_step) if tensor else (None, ())
        pairs = [(name, [sum(column) for column in zip(*of_steps.values(), strict=True)], whole)]
        if len(of_steps) > 1:
            figures = [by_step[step] if step is not None and step < len(by_step) else None for step in of_steps]
            pairs += [(f"{name} step {step}", of_steps[step], f) for step, f in zip(of_steps, figures, strict=True)]
        for place, (error, norm), figure in pairs:
            now = math.sqrt(error / norm) if norm else 0.0
            if figure is None or not abs(now - figure) <= RECORDED_WITHIN * max(figure, 1e-6):
                measured = "nothing" if figure is None else f"{figure:.4%}"
                message = f"{place}: relative error {now:.4%}, where the conversion measured {measured}"
                failures.append(failure("weights", place, message, now, figure))
    return failures


def factors_for(tokens: TokenDescription) -> dict[str, Factor]:
    """Return the factors for what was read: narrow ones for many recorded sequences."""
    return NARROW if tokens.kind != SYSTEM_PROMPT and tokens.sequences >= MANY else WIDE


def bounds_of(
    predictions: Mapping[str, StreamFigures], factors: Mapping[str, Factor], arithmetic: str, recipe: RecipeRecord
) -> dict[str, float | None]:
    """Return what each limited figure may be: a factor of the control's, and the noise floor.

    Of a share of tokens, three standard deviations are added: at 8 bit a few tokens decide. Three noise floors for a
    bundle computed in 16 bit. None where there is no bound to judge by: the control's figure is not finite, or no
    position counts. A limit of the recipe applies where it is tighter.
    """
    noises = 1.0 if arithmetic == "float32" else _NOISES
    agent = predictions["agent"].control
    shared = finite_or_infinite(agent.kl.mean) if agent and agent.kl else math.inf
    bounds: dict[str, float | None] = {}
    for limit, stream in FIGURES.items():
        of_stream, factor = predictions[stream], factors[limit]
        control = limited(of_stream.control, limit) if of_stream.control else None
        noise = limited(of_stream.noise, limit)
        bound = None
        if control and noise and control.value is not None and noise.value is not None:
            plain = apart(limit, control.value) + (factor.share * shared if factor.share else 0)
            bound = factor.times * plain + noises * apart(limit, noise.value)
            if limit in AT_LEAST and of_stream.control:
                bound += _SPREADS * math.sqrt(max(plain * (1 - plain), 0.0) / of_stream.control.positions)
            if not math.isfinite(bound):
                bound = None
            elif limit in AT_LEAST:
                bound = max(0.0, 1 - bound)
        bounds[limit] = bound
    for limit, absolute in limits_in(recipe.text).items():
        known = bounds[limit]
        if known is not None:
            bounds[limit] = max(known, absolute) if limit in AT_LEAST else min(known, absolute)
    return bounds


def apart(limit: str, value: float) -> float:
    """Return how far a figure is from that of the same predictions, which is 0: of an agreement the rest to 1."""
    return 1 - value if limit in AT_LEAST else value


def prediction_failures(
    predictions: Mapping[str, StreamFigures],
    limits: Mapping[str, float | None],
    activations: Iterable[ActivationRow],
    agent_steps: int,
) -> list[Failure]:
    """Return the limits that predictions are beyond, each with the block where that starts."""
    failures = []
    for limit, bound in limits.items():
        stream, at_least = FIGURES[limit], limit in AT_LEAST
        figure = limited(predictions[stream].bundle, limit)
        if figure is None:
            message = f"{NAMES[limit]} is not known: no position counts"
            failures.append(failure("predictions", stream, message, None, bound, limit))
            continue
        value = finite_or_infinite(figure.value)
        if bound is None:
            message = f"{NAMES[limit]} is {value:.4g}, and cannot be judged: plain rounding gives no finite figure"
            failures.append(failure("predictions", stream, message, value, None, limit))
            continue
        if (value >= bound) if at_least else (value <= bound):
            continue
        place = start(activations, {"text": -1, "codebook_0": 0}.get(stream, agent_steps - 1))
        control = predictions[stream].control
        plain = limited(control, limit) if control else None
        beside = "" if plain is None or plain.value is None else f" (plain rounding: {plain.value:.4g})"
        word = "at least" if at_least else "at most"
        message = f"{NAMES[limit]} is {value:.4g}{beside}, {word} {bound:.4g} is allowed: {place}"
        failures.append(failure("predictions", place, message, value, bound, limit))
    return failures


def start(activations: Iterable[ActivationRow], last_step: int) -> str:
    """Return where an error starts: the first block whose local error stands out among its kind.

    last_step: blocks of later depformer steps do not reach the figure in question; -1 for a figure of the text.
    """
    rows = [row for row in activations if row.local and (row.step is None or row.step <= last_step)]
    errors: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        errors.setdefault((row.component, row.sublayer), []).append(_local(row))
    for row in rows:
        local, kind = _local(row), sorted(errors[row.component, row.sublayer])
        usual = kind[len(kind) // 4]
        noise = finite_or_infinite(row.noise_accumulated.relative_l2)
        if not local <= _STANDS_OUT * max(usual, noise):
            return f"it starts at {row.name}, whose local error is {local:.3g} (usual there: {usual:.3g})"
    if not rows:
        return "it starts before the first block"
    worst = max(rows, key=_local)
    first, most = (f"{row.name} (local error {_local(row):.3g})" for row in (rows[0], worst))
    return f"no block stands out: it starts at {first} and builds up; the largest is {most}"


def _local(row: ActivationRow) -> float:
    return finite_or_infinite(row.local.relative_l2 if row.local else None)
