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
_METHODS = {"lsq": 1.0, "lsq_unweighted": 1.05, "rtn": 1.25, "gptq": 0.4}
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
    """A recipe and its expected divergence by stream, in nats/token. bound: a lower bound on their sum for any recipe.

    settings: of each group, None to keep it float. left: unused bytes of the budget. measured_on: the tokens that the
    sensitivities were measured on.
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
        """The expected divergence as a sentence."""
        return f"expected divergence in nats/token: {self.streams}"

    @property
    def streams(self) -> str:
        """The expected divergence of each stream, in words."""
        return ", ".join(f"{stream} {value:.2g}" for stream, value in self.expected.items())


@dataclass(frozen=True)
class AllocationRequest:
    """A request for a recipe: everything but its rules. keep: components that stay float."""

    budget: Budget
    target: str
    dtype: str
    method: str
    depformer_steps: int | None = None
    keep: tuple[str, ...] = ()

    @property
    def needs_data(self) -> bool:
        """Tell whether its rules will quantize by more than the weights."""
        return self.method in DATA_DRIVEN

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
    """Return a request with defaults for None; raises UserError for unknown components."""
    consumer = TARGETS[target or DEFAULT_TARGET]
    for name in keep:
        if name not in COMPONENTS:
            raise UserError(f"component {name}: cannot be kept float: use {', '.join(COMPONENTS)}")
    chosen = stored_method(method or DEFAULT_METHOD)
    return AllocationRequest(budget, consumer.name, str(dtype or consumer.dtype), chosen, depformer_steps, tuple(keep))


def size_of(text: str) -> int:
    """Return the bytes that ``5.3GB`` or ``800 MiB`` means; raises UserError for anything else."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*([KMG]?i?B)?", text.strip(), re.IGNORECASE)
    factor = _UNITS.get((match[2] or "B").upper()) if match else None
    if not match or not factor:
        raise UserError(f"{text}: not a size: write it like 5.3GB or 800MB")
    return int(float(match[1]) * factor)


def best_recipe(inventory: Inventory, request: AllocationRequest, sensitivities: Sensitivities) -> Allocation:
    """Return the recipe with the least expected divergence within a budget; raises UserError if nothing fits.

    If the target loads any setting for any module, the result is optimal, or ``bound`` says how near it is to that.
    Otherwise it is the best of the uniform settings that the target loads.
    """
    plain = make_plan(inventory, request.recipe)
    missing = [
        str(group)
        for group in _groups(_outputs(plain))
        if group not in sensitivities.costs and _reaches_the_agent(group, inventory)
    ]
    if missing:
        raise UserError(f"the sensitivities are of another model (they lack {missing[0]}): measure them again")
    allocation = (_mixed if TARGETS[request.target].mixes else _uniform)(inventory, request, plain, sensitivities)
    expected = f"expected divergence in nats a token: {allocation.streams}"  # stored in recipes: its words stay
    text = f"within {request.budget.name} by {request.method}; {expected}, measured on {sensitivities.measured_on}"
    return replace(
        allocation, recipe=replace(allocation.recipe, description=text), measured_on=sensitivities.measured_on
    )


def _outputs(plan: Plan) -> list[Output]:
    """Return the outputs of a plan that can be quantized."""
    return [output for output in plan.outputs if output.role.kind != "norm"]


def _reaches_the_agent(group: TensorGroup, inventory: Inventory) -> bool:
    return group.step is None or group.step < inventory.architecture.n_q // 2


def _groups(outputs: Sequence[Output]) -> dict[TensorGroup, list[Output]]:
    """Return the outputs of each group; one that stacks all depformer steps is in the groups of all steps."""
    by_group: dict[TensorGroup, list[Output]] = {}
    for output in outputs:
        stacked = range(output.parts) if output.parts > 1 else [output.step]
        for step in stacked:
            by_group.setdefault(group_of(output.role, step), []).append(output)
    return by_group


def _cost(
    sensitivities: Sensitivities, group: TensorGroup, quantization: QuantizationConfig | None, method: str
) -> dict[str, float] | None:
    """Return the expected cost of a group's setting; embedding tables never use GPTQ."""
    cost = sensitivities.cost(group, quantization)
    factor = _METHODS["lsq" if group.component == "embeddings" and method in DATA_DRIVEN else method]
    return cost and {stream: factor * value for stream, value in cost.items()}


def _mixed(inventory: Inventory, request: AllocationRequest, plain: Plan, sensitivities: Sensitivities) -> Allocation:
    """Choose a setting for each group."""
    groups = _groups(_outputs(plain))
    quantizations: dict[TensorGroup, list[QuantizationConfig | None]] = {}
    options: dict[TensorGroup, list[Option]] = {}
    for group, outputs in groups.items():
        quantizations[group], options[group] = [], []
        for quantization, nbytes in _options(request, group, outputs):
            cost = _cost(sensitivities, group, quantization, request.method)
            if cost is not None:
                quantizations[group].append(quantization)
                options[group].append(Option(nbytes, sum(cost.values())))
    free = request.budget.left(plain) + sum(output.nbytes for output in _outputs(plain))
    least = sum(min(option.nbytes for option in group) for group in options.values())

    def within(nbytes: int) -> Allocation:
        selection = allocate_bits(list(options.values()), nbytes)
        chosen = {group: quantizations[group][index] for group, index in zip(groups, selection.chosen, strict=True)}
        plan = make_plan(inventory, replace(request.recipe, rules=tuple(_rules(chosen))))
        expected = _sum(sensitivities, chosen, request.method)
        return Allocation(plan.recipe, plan.nbytes, expected, selection.bound, chosen, request.budget.left(plan))

    best = within(least)
    if best.left < 0:
        raise _too_small(request.budget, make_plan(inventory, best.recipe))
    for attempt in range(_TRIES):
        tried = within(max(free, least))
        if tried.left >= 0:
            return tried
        # The sizes of headers and config depend on the settings; a larger margin each time.
        free += tried.left - attempt * _MARGIN
    for _ in range(_TRIES):  # bisect between a size that fits and one that does not
        middle = (least + max(free, least)) // 2
        tried = within(middle)
        best, least, free = (tried, middle, free) if tried.left >= 0 else (best, least, middle)
    return best


def check_budget(inventory: Inventory, request: AllocationRequest) -> None:
    """Raise UserError if the smallest bundle that a target loads is larger than the budget, before any measurement."""
    smallest = smallest_plan(inventory, request)
    if request.budget.left(smallest) < 0:
        raise _too_small(request.budget, smallest)


def smallest_plan(inventory: Inventory, request: AllocationRequest) -> Plan:
    """Return the plan with the fewest bytes that a target loads, whatever it costs in divergence."""
    plain = make_plan(inventory, request.recipe)
    if not TARGETS[request.target].mixes:
        return min((plain, *(plan for plan, _ in _uniform_plans(inventory, request))), key=lambda one: one.nbytes)
    options = {group: _options(request, group, outputs) for group, outputs in _groups(_outputs(plain)).items()}
    least = {group: min(of, key=lambda option: option[1])[0] for group, of in options.items()}
    return make_plan(inventory, replace(request.recipe, rules=tuple(_rules(least))))


def _options(
    request: AllocationRequest, group: TensorGroup, outputs: Sequence[Output]
) -> list[tuple[QuantizationConfig | None, int]]:
    """Return the settings that a group can have, and the bytes that it takes with each."""
    settings = [QuantizationConfig(bits, size, request.method) for bits, size in product(BITS, GROUP_SIZES)]
    return [
        (quantization, sum(replace(output, quantization=quantization).nbytes for output in outputs))
        for quantization in (None, *([] if group.component in request.keep else settings))
        if not (quantization and any(output.shape[-1] % quantization.group_size for output in outputs))
    ]


def _uniform_plans(
    inventory: Inventory, request: AllocationRequest
) -> Iterator[tuple[Plan, dict[TensorGroup, QuantizationConfig | None]]]:
    """Yield the plans of one setting that a target loads, and what they make of each group."""
    for rules in _candidates(request.method):
        try:
            plan = make_plan(inventory, replace(request.recipe, rules=rules))
        except UserError:  # not for this target, or not for these sizes
            continue
        settings = {group: outputs[0].quantization for group, outputs in _groups(_outputs(plan)).items()}
        if not any(quantization and group.component in request.keep for group, quantization in settings.items()):
            yield plan, settings


def _too_small(budget: Budget, smallest: Plan) -> UserError:
    """Return the error for a budget below the size of the smallest bundle."""
    return UserError(
        f"{budget.name}: the smallest bundle for {smallest.target.name} is larger ({described(smallest.nbytes)} or "
        f"{smallest.nbytes} bytes, {smallest.bits_per_weight:.2f} bits per weight): give at least that"
    )


def _sum(
    sensitivities: Sensitivities, settings: dict[TensorGroup, QuantizationConfig | None], method: str
) -> dict[str, float]:
    costs = [_cost(sensitivities, group, quantization, method) or {} for group, quantization in settings.items()]
    return {stream: math.fsum(cost[stream] for cost in costs) for stream in STREAMS}


def _uniform(inventory: Inventory, request: AllocationRequest, plain: Plan, sensitivities: Sensitivities) -> Allocation:
    """Choose one setting for some or all components, which is all that the target loads."""
    fitting, least = [], plain
    for plan, settings in _uniform_plans(inventory, request):
        if all(
            _cost(sensitivities, group, quantization, request.method) is not None
            for group, quantization in settings.items()
        ):
            least = min(least, plan, key=lambda one: one.nbytes)
            expected = _sum(sensitivities, settings, request.method)
            left = request.budget.left(plan)
            if left >= 0:
                fitting.append(Allocation(plan.recipe, plan.nbytes, expected, None, settings, left))
    if not fitting:
        raise _too_small(request.budget, least)
    return min(fitting, key=lambda one: (sum(one.expected.values()), one.nbytes))


def _candidates(method: str) -> Iterator[tuple[Rule, ...]]:
    yield ()
    for components, bits, size in product(_COMPONENTS, BITS, GROUP_SIZES):
        yield (Rule(QuantizationConfig(bits, size, method), components),)


def _rules(settings: dict[TensorGroup, QuantizationConfig | None]) -> list[Rule]:
    """Return the rules for these settings; groups of one kind with one setting share a rule."""
    together: dict[tuple[str, str, QuantizationConfig | None], list[TensorGroup]] = {}
    for group, quantization in settings.items():
        if quantization:
            together.setdefault((group.component, group.modules, quantization), []).append(group)
    return [
        Rule(
            quantization,
            (component,),
            (modules,),
            ranges_of([group.layer for group in groups if group.layer is not None]),
            ranges_of([group.step for group in groups if group.step is not None]),
        )
        for (component, modules, quantization), groups in together.items()
    ]
