"""A recipe: which tensors are quantized how, for which target. A plain value; its files are read in ``recipes``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from ...quant.affine import DATA_DRIVEN, QuantizationConfig
from ..source.tensors import Role

LIMITS = ("text_kl", "codebook0_kl", "agent_kl", "agent_top1")  # the figures of a verification that a recipe may limit
DTYPES = {"bfloat16": "BF16", "float16": "F16"}  # what stays float, and scales and biases: recipe's name -> file's


@dataclass(frozen=True)
class Rule:
    """One rule of a recipe: tensors that match everything it names get its form, None to keep them float.

    Empty components, modules, layers or steps match all. modules are shell patterns over a role's module. layers and
    steps are inclusive ranges.
    """

    quantization: QuantizationConfig | None
    components: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    layers: tuple[tuple[int, int], ...] = ()
    steps: tuple[tuple[int, int], ...] = ()
    line: int = 0

    def matches(self, role: Role, step: int | None) -> bool:
        """Tell whether an output of this role, belonging to this depformer step (None: to none or all), is meant."""
        return (
            (not self.components or role.component in self.components)
            and (not self.modules or any(fnmatchcase(role.module, pattern) for pattern in self.modules))
            and (not self.layers or _within(role.layer, self.layers))
            and (not self.steps or _within(step, self.steps))
        )


def _within(number: int | None, ranges: tuple[tuple[int, int], ...]) -> bool:
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
    name = f"{quantization.bits}bit-g{quantization.group_size}"
    return Recipe(
        name, target, dtype, (Rule(quantization, components),), f"{quantization.label}: {', '.join(components)}"
    )


def to_toml(recipe: Recipe) -> str:
    """Write a recipe as the TOML that its loader reads."""
    pairs = (("description", recipe.description), ("target", recipe.target), ("dtype", recipe.dtype))
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in pairs]
    if recipe.depformer_steps is not None:
        lines.append(f"depformer_steps = {recipe.depformer_steps}")
    for rule in recipe.rules:
        lines += ["", "[[rules]]"]
        lines += [
            f"{key} = {json.dumps(list(values), ensure_ascii=False)}"
            for key, values in (("components", rule.components), ("modules", rule.modules))
            if values
        ]
        lines += [
            f'{key} = "{",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)}"'
            for key, ranges in (("layers", rule.layers), ("steps", rule.steps))
            if ranges
        ]
        if rule.quantization is None:
            lines.append("keep = true")
        else:
            lines += [f"bits = {rule.quantization.bits}", f"group_size = {rule.quantization.group_size}"]
            lines.append(f'method = "{rule.quantization.method}"')
    if recipe.parity:
        lines += ["", "[parity]"] + [f"{key} = {value}" for key, value in recipe.parity.items()]
    return "\n".join(lines) + "\n"
