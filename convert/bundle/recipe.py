"""A recipe: which tensors are quantized how, for which target. A plain value; ``recipe_file`` reads and writes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from ...quant.affine import DATA_DRIVEN, QuantizationConfig
from ..source.tensors import Role
from ..tensorfile import CODES
from .ranges import Ranges

LIMITS = ("text_kl", "codebook0_kl", "agent_kl", "agent_top1")  # the figures of a verification that a recipe may limit
DTYPES = {name: CODES[name] for name in ("bfloat16", "float16")}  # of floats, scales and biases: name -> code


@dataclass(frozen=True)
class Rule:
    """One rule of a recipe: tensors that match everything it names get its form, None to keep them float.

    Empty components, modules, layers or steps match all. modules are shell patterns over a role's module. layers and
    steps are inclusive ranges.
    """

    quantization: QuantizationConfig | None
    components: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    layers: Ranges = ()
    steps: Ranges = ()
    line: int = 0

    def matches(self, role: Role, step: int | None) -> bool:
        """Tell whether an output of this role, belonging to this depformer step (None: to none or all), is meant."""
        return (
            (not self.components or role.component in self.components)
            and (not self.modules or any(fnmatchcase(role.module, pattern) for pattern in self.modules))
            and (not self.layers or _within(role.layer, self.layers))
            and (not self.steps or _within(step, self.steps))
        )


def _within(number: int | None, ranges: Ranges) -> bool:
    return number is not None and any(first <= number <= last for first, last in ranges)


@dataclass(frozen=True)
class Recipe:
    """Ordered rules (the first that matches decides, what none matches stays float), a target, a dtype, and limits.

    dtype: ``bfloat16`` or ``float16``, of what stays float and of scales and biases. parity: limits that
    a verification holds the bundle to, by figure. original: the text of the file that it was read from.
    depformer_steps: how many are kept, None for all.
    """

    name: str
    target: str
    dtype: str
    rules: tuple[Rule, ...] = ()
    description: str = ""
    parity: Mapping[str, float] = field(default_factory=dict)
    original: str = ""
    depformer_steps: int | None = None

    def quantization(self, role: Role, step: int | None) -> QuantizationConfig | None:
        """Return how an output is quantized, None if it stays float; norms always do.

        A table of embeddings has no inputs to go by: it takes ``lsq`` where its rule says ``gptq``.
        """
        if role.kind == "norm":
            return None
        found = next((rule.quantization for rule in self.rules if rule.matches(role, step)), None)
        return (
            replace(found, method="lsq")
            if found and found.method in DATA_DRIVEN and role.kind == "embedding"
            else found
        )

    @property
    def needs_data(self) -> bool:
        """Tell whether any rule quantizes by more than the weights."""
        return any(rule.quantization and rule.quantization.method in DATA_DRIVEN for rule in self.rules)

    def with_method(self, method: str) -> "Recipe":
        """Return the recipe with another quantizer in every rule that quantizes."""
        rules = (
            replace(rule, quantization=rule.quantization and replace(rule.quantization, method=method))
            for rule in self.rules
        )
        return replace(self, rules=tuple(rules))


def uniform(quantization: QuantizationConfig | None, target: str, dtype: str, components: tuple[str, ...]) -> Recipe:
    """Return the recipe that quantizes whole components alike, or nothing."""
    if quantization is None:
        return Recipe("float", target, dtype, description="nothing is quantized")
    bits, size = quantization.bits, quantization.group_size
    description = f"{bits} bit g{size} {quantization.method}: {', '.join(components)}"  # stored: its words stay
    return Recipe(f"{bits}bit-g{size}", target, dtype, (Rule(quantization, components),), description)
