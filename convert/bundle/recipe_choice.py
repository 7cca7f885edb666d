"""The recipe that a name or a few settings mean."""

from dataclasses import replace

from ...quant.affine import DEFAULT_METHOD, QuantizationConfig
from ..errors import UserError, refuse
from . import shipped
from .recipe import Recipe, uniform
from .targets import DEFAULT as DEFAULT_TARGET
from .targets import TARGETS

DEFAULT_RECIPE = TARGETS[DEFAULT_TARGET].recipe
DEFAULT_GROUP_SIZE = 64


def make_recipe(
    name: str | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    quantize: bool = True,
    target: str | None = None,
    dtype: str | None = None,
    method: str | None = None,
    depformer_steps: int | None = None,
) -> Recipe:
    """Return a shipped recipe, one from a TOML file, or (with ``bits``) one that quantizes whole components alike.

    name: of a shipped recipe or a file; the target's usual one if nothing is given. bits, group_size: of a uniform
    recipe. quantize: False for a recipe that keeps everything float. target, dtype, method: in place of the recipe's.
    depformer_steps: how many are kept. Raises UserError for settings that contradict each other, and for those that do
    not exist.
    """
    if sum((name is not None, bits is not None, not quantize)) > 1:
        raise UserError("a recipe's name, bits and quantize=False contradict each other: give one of them")
    if group_size is not None and bits is None:
        raise UserError("group_size has no effect without bits: give both")
    if method and not quantize:
        raise UserError("a recipe that quantizes nothing takes no method: leave one of them out")
    if bits is not None or not quantize:
        consumer = TARGETS[target or DEFAULT_TARGET]
        quantization = None
        if bits is not None:
            quantization = QuantizationConfig(bits, group_size or DEFAULT_GROUP_SIZE, method or DEFAULT_METHOD)
            refuse([f"{name} {problem}" for name, problem in quantization.problems().items()])
        recipe = uniform(quantization, consumer.name, str(dtype or consumer.dtype), consumer.uniform)
    else:
        recipe = shipped.load(name or TARGETS[target or DEFAULT_TARGET].recipe, target and str(target))
        recipe = recipe.with_method(method) if method else recipe
        recipe = replace(recipe, dtype=str(dtype or recipe.dtype))
    return recipe if depformer_steps is None else replace(recipe, depformer_steps=depformer_steps, original="")
