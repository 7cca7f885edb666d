"""The recipe that loses least within a budget of bytes, by what was measured of the model's parts."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..convert.bundle.describe import size as described
from ..convert.bundle.output_tensor import Output
from ..convert.bundle.plan import Inventory, Plan, make_plan
from ..convert.bundle.ranges import ranges_of
from ..convert.bundle.recipe import Recipe, Rule
from ..convert.bundle.targets import TARGETS
from ..convert.errors import UserError
from ..convert.source.tensors import COMPONENTS
from ..quant.affine import BITS, DATA_DRIVEN, DEFAULT_METHOD, GROUP_SIZES, QuantizationConfig, stored_method
from ..quant.allocation import Option, allocate_bits
from .sensitivity import STREAMS, Sensitivities, TensorGroup, group_of

DEFAULT_TARGET = "mlx"  # which takes any setting for any module
# Divergence of models quantized by other methods, over that by lsq: measured at 4 bit on small models.
_METHODS = {"lsq": 1.0, "rtn": 1.25, "gptq": 0.4}
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TRIES, _MARGIN = 8, 1 << 12  # at a budget that headers and settings do not overrun; bytes
_COMPONENTS = (COMPONENTS[:1], COMPONENTS[:2], COMPONENTS)  # that one setting may be for


@dataclass(frozen=True)
class Budget:
    """What a bundle may take: bytes of all its files but manifest and report, or bits of its model a weight."""

    nbytes: int | None = None
    bits_per_weight: float | None = None

    @property
    def name(self) -> str:
        """What a recipe of it is called."""
        return f"{self.bits_per_weight:g}bpw" if self.nbytes is None else described(self.nbytes).replace(" ", "")

    def left(self, plan: Plan) -> int:
        """Return how many bytes of the budget a plan leaves, negative if it takes more."""
        if self.nbytes is not None:
            return self.nbytes - plan.nbytes
        return int((self.bits_per_weight or 0) * plan.parameters / 8) - sum(output.nbytes for output in plan.outputs)


@dataclass(frozen=True)
class Allocation:
    """A recipe and what it is expected to cost each stream, in nats/token; bound: no recipe could cost less in sum.

    settings: what each part gets, None to keep it. left: bytes of the budget that it leaves. measured_on: how much
    tokens the sensitivities were measured on.
    """

    recipe: Recipe
    nbytes: int
    expected: dict[str, float]
    bound: float | None
    settings: dict[TensorGroup, QuantizationConfig | None]
    left: int
    measured_on: str = ""

    @property
    def forecast(self) -> str:
        """What is expected, in words."""
        return f"expected divergence in nats/token: {self.streams}"

    @property
    def streams(self) -> str:
        """The expected divergence of each stream, in words."""
        return ", ".join(f"{stream} {value:.2g}" for stream, value in self.expected.items())


@dataclass(frozen=True)
class AllocationRequest:
    """What a recipe is looked for: everything but its rules. keep: components that stay float."""

    budget: Budget
    target: str
    dtype: str
    method: str
    depformer_steps: int | None = None
    keep: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """The recipe before its rules are chosen."""
        return Recipe(self.budget.name, self.target, self.dtype, depformer_steps=self.depformer_steps)


def request_of(
    budget: Budget,
    target: str | None = None,
    dtype: str | None = None,
    method: str | None = None,
    depformer_steps: int | None = None,
    keep: Sequence[str] = (),
) -> AllocationRequest:
    """Return a request with the usual values for what is None; raises UserError for components that do not exist."""
    consumer = TARGETS[target or DEFAULT_TARGET]
    for name in keep:
        if name not in COMPONENTS:
            raise UserError(f"component {name}: cannot be kept float: use {', '.join(COMPONENTS)}")
    chosen = stored_method(method or DEFAULT_METHOD)
    return AllocationRequest(budget, consumer.name, str(dtype or consumer.dtype), chosen, depformer_steps, tuple(keep))


def size_of(text: str) -> int:
    """Return the bytes that ``5.3GB`` or ``800 MiB`` means; raises UserError for what is no size."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*([KMG]?i?B)?", text.strip(), re.IGNORECASE)
    factor = _UNITS.get((found[2] or "B").upper()) if found else None
    if not found or not factor:
        raise UserError(f"{text}: not a size: write it like 5.3GB or 800MB")
    return int(float(found[1]) * factor)


def best_recipe(inventory: Inventory, wanted: AllocationRequest, found: Sensitivities) -> Allocation:
    """Return the recipe that is expected to diverge least within a budget; raises UserError if nothing fits into it.

    Where the target takes any setting for any module, the choice is the best of all combinations, or ``bound`` says how
    near it is; else the best of those that the target takes.
    """
    recipe = wanted.recipe
    plain = make_plan(inventory, recipe)
    missing = [str(part) for part in _parts(_outputs(plain)) if part not in found.costs and _is_heard(part, inventory)]
    if missing:
        raise UserError(f"the sensitivities are of another model (they lack {missing[0]}): measure them again")
    allocation = (_mixed if TARGETS[wanted.target].mixes else _uniform)(inventory, wanted, recipe, plain, found)
    expected = f"expected divergence in nats a token: {allocation.streams}"  # stored in recipes: its words stay
    text = f"within {wanted.budget.name} by {wanted.method}; {expected}, measured on {found.measured_on}"
    return replace(allocation, recipe=replace(allocation.recipe, description=text), measured_on=found.measured_on)


def _outputs(plan: Plan) -> list[Output]:
    """Return the outputs of a plan that can be quantized."""
    return [output for output in plan.outputs if output.role.kind != "norm"]


def _is_heard(part: TensorGroup, inventory: Inventory) -> bool:
    return part.step is None or part.step < inventory.architecture.n_q // 2


def _parts(outputs: Sequence[Output]) -> dict[TensorGroup, list[Output]]:
    """Return the outputs of each part; one that stacks all depformer steps is in the parts of all of them."""
    found: dict[TensorGroup, list[Output]] = {}
    for output in outputs:
        stacked = range(output.parts) if output.parts > 1 else [output.step]
        for step in stacked:
            found.setdefault(group_of(output.role, step), []).append(output)
    return found


def _cost(
    found: Sensitivities, part: TensorGroup, quantization: QuantizationConfig | None, method: str
) -> dict[str, float] | None:
    """Return the expected cost of a group's setting; embedding tables never use GPTQ."""
    cost = found.cost(part, quantization)
    factor = _METHODS["lsq" if part.component == "embeddings" and method in DATA_DRIVEN else method]
    return cost and {stream: factor * value for stream, value in cost.items()}


def _mixed(
    inventory: Inventory, wanted: AllocationRequest, recipe: Recipe, plain: Plan, found: Sensitivities
) -> Allocation:
    """Choose for each part for itself."""
    parts = _parts(_outputs(plain))
    quantizations: dict[TensorGroup, list[QuantizationConfig | None]] = {}
    choices: dict[TensorGroup, list[Option]] = {}
    for part, outputs in parts.items():
        quantizations[part], choices[part] = [], []
        settings = [QuantizationConfig(bits, size, wanted.method) for bits, size in product(BITS, GROUP_SIZES)]
        for quantization in (None, *([] if part.component in wanted.keep else settings)):
            cost = _cost(found, part, quantization, wanted.method)
            if cost is not None and not (
                quantization and any(output.shape[-1] % quantization.group_size for output in outputs)
            ):
                nbytes = sum(replace(output, quantization=quantization).nbytes for output in outputs)
                quantizations[part].append(quantization)
                choices[part].append(Option(nbytes, sum(cost.values())))
    free = wanted.budget.left(plain) + sum(output.nbytes for output in _outputs(plain))
    least = sum(min(choice.nbytes for choice in part) for part in choices.values())

    def within(nbytes: int) -> Allocation:
        made = allocate_bits(list(choices.values()), nbytes)
        chosen = {part: quantizations[part][index] for part, index in zip(parts, made.chosen, strict=True)}
        plan = make_plan(inventory, replace(recipe, rules=tuple(_rules(chosen))))
        expected = _sum(found, chosen, wanted.method)
        return Allocation(plan.recipe, plan.nbytes, expected, made.bound, chosen, wanted.budget.left(plan))

    best = within(least)
    if best.left < 0:
        raise _too_small(wanted.budget, make_plan(inventory, best.recipe))
    for attempt in range(_TRIES):
        tried = within(max(free, least))
        if tried.left >= 0:
            return tried
        # Headers and the config say more of some settings than of others; a little more each time.
        free += tried.left - attempt * _MARGIN
    for _ in range(_TRIES):  # between what fits and what does not
        middle = (least + max(free, least)) // 2
        tried = within(middle)
        best, least, free = (tried, middle, free) if tried.left >= 0 else (best, least, middle)
    return best


def _too_small(budget: Budget, smallest: Plan) -> UserError:
    """Return what is said where even the smallest bundle is larger than a budget."""
    return UserError(
        f"{budget.name}: the smallest bundle for {smallest.target.name} is larger ({described(smallest.nbytes)} or "
        f"{smallest.nbytes} bytes, {smallest.bits_per_weight:.2f} bits per weight): give at least that"
    )


def _sum(found: Sensitivities, settings: dict[TensorGroup, QuantizationConfig | None], method: str) -> dict[str, float]:
    costs = [_cost(found, part, quantization, method) or {} for part, quantization in settings.items()]
    return {stream: math.fsum(cost[stream] for cost in costs) for stream in STREAMS}


def _uniform(
    inventory: Inventory, wanted: AllocationRequest, recipe: Recipe, plain: Plan, found: Sensitivities
) -> Allocation:
    """Choose among what the target takes: one setting, for more or fewer components."""
    fitting, least = [], plain
    for rules in _candidates(wanted.method):
        try:
            plan = make_plan(inventory, replace(recipe, rules=rules))
        except UserError:  # not for this target, or not for these sizes
            continue
        settings = {part: outputs[0].quantization for part, outputs in _parts(_outputs(plan)).items()}
        kept = not any(quantization and part.component in wanted.keep for part, quantization in settings.items())
        if kept and all(
            _cost(found, part, quantization, wanted.method) is not None for part, quantization in settings.items()
        ):
            least = min(least, plan, key=lambda one: one.nbytes)
            expected = _sum(found, settings, wanted.method)
            left = wanted.budget.left(plan)
            if left >= 0:
                fitting.append(Allocation(plan.recipe, plan.nbytes, expected, None, settings, left))
    if not fitting:
        raise _too_small(wanted.budget, least)
    return min(fitting, key=lambda one: (sum(one.expected.values()), one.nbytes))


def _candidates(method: str) -> Iterator[tuple[Rule, ...]]:
    yield ()
    for components, bits, size in product(_COMPONENTS, BITS, GROUP_SIZES):
        yield (Rule(QuantizationConfig(bits, size, method), components),)


def _rules(settings: dict[TensorGroup, QuantizationConfig | None]) -> list[Rule]:
    """Return rules that give parts their settings; parts of one kind with one setting share a rule."""
    together: dict[tuple[str, str, QuantizationConfig | None], list[TensorGroup]] = {}
    for part, quantization in settings.items():
        if quantization:
            together.setdefault((part.component, part.modules, quantization), []).append(part)
    return [
        Rule(
            quantization,
            (component,),
            (modules,),
            ranges_of([part.layer for part in parts if part.layer is not None]),
            ranges_of([part.step for part in parts if part.step is not None]),
        )
        for (component, modules, quantization), parts in together.items()
    ]
