"""What programs that fit a model into a budget share: measure, or take what was measured; choose; write a recipe."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..convert import conversion
from ..convert.bundle.describe import size
from ..convert.bundle.recipe import to_toml
from ..convert.bundle.workspace import write_durably
from ..convert.errors import UserError
from ..convert.file_names import WEIGHTS
from ..convert.source.scan import Fingerprint
from ..convert.source.source import Source
from . import allocation_plot, sensitivity
from .allocation import Allocation, AllocationRequest, Budget, allocate, size_of
from .sensitivity import Sensitivities

Prints = Mapping[str, Fingerprint]  # of a source's files: taken once in a run, as it reads all of them


def budget_of(target_size: str | None, bits_per_weight: float | None) -> Budget | None:
    """Return the budget that two options mean, None for neither; raises UserError for both."""
    if target_size is not None and bits_per_weight is not None:
        raise UserError("--target-size and --bits-per-weight contradict each other: give one of them")
    if target_size is None and bits_per_weight is None:
        return None
    return Budget(None if target_size is None else size_of(target_size), bits_per_weight)


def sensitivities(source: Source, fingerprints: Prints, tokens: Path, file: Path, quiet: bool) -> Sensitivities:
    """Return a source's sensitivities: those in the file, else measured now and written there.

    prints: the source's fingerprint. Raises UserError for a file of another source or other material.
    """
    from ..model.tokens import read_tokens
    from . import dataset, measurement  # imports torch: seconds that --help does not need

    token_set = read_tokens(tokens, source.architecture, None, None)
    decisive = [fingerprints[WEIGHTS].sha256, source.adapter, dataset.record(token_set)["sha256"]]
    mark = hashlib.sha256(repr(decisive).encode()).hexdigest()
    if file.exists():
        found = sensitivity.read(file)
        if found.mark != mark:
            raise UserError(f"{file}: was measured on another source or other tokens: remove it, or name another file")
        return found
    found = measurement.measure(source, token_set, mark, quiet)
    source.check_unchanged("measured")
    sensitivity.write(found, file)
    return found


def conversations(source: Source, fingerprints: Prints, tokens: Path | None, beside: Path, quiet: bool) -> Path:
    """Return a file of conversations: the one that is given, else one that the model speaks itself, left beside."""
    if tokens:
        return tokens
    from .self_generated import self_generated

    return self_generated(
        source, beside.with_name(f"{beside.name}.spoken.safetensors"), quiet=quiet, fingerprints=fingerprints
    )


def allocation(
    source: Source, fingerprints: Prints, wanted: AllocationRequest, tokens: Path, file: Path, recipe: Path, quiet: bool
) -> Allocation:
    """Find the recipe for a budget, and write it."""
    found = allocate(conversion.inventory(source), wanted, sensitivities(source, fingerprints, tokens, file, quiet))
    write_durably(recipe, to_toml(found.recipe))
    return found


def beside(
    source: Source, fingerprints: Prints, wanted: AllocationRequest, tokens: Path | None, folder: Path, quiet: bool
) -> Allocation:
    """Find the recipe for a bundle; it and what was measured for it are left beside the bundle's folder."""
    measured, recipe = (folder.with_name(f"{folder.name}.{what}") for what in ("sensitivity.json", "recipe.toml"))
    heard = conversations(source, fingerprints, tokens, folder, quiet)
    return allocation(source, fingerprints, wanted, heard, measured, recipe, quiet)


def text(found: Allocation) -> str:
    """Return what is printed of a recipe that was found."""
    total = sum(found.expected.values())
    if found.bound is None:
        near = f"the best that {found.recipe.target} takes"
    elif found.bound >= total * (1 - 1e-9):
        near = "no other choice is better"
    else:
        near = f"none is below {found.bound:.3g} in sum"
    line = f"{found.recipe.name}: {size(found.nbytes)}, {found.forecast} ({near})"
    return f"{line}\nmeasured on {found.measured_on}"


def said(found: Allocation) -> dict[str, Any]:
    """Return the same for a program."""
    return {
        "recipe": found.recipe.name,
        "bytes": found.nbytes,
        "expected": found.expected,
        "bound": found.bound,
        "measured_on": found.measured_on,
        "settings": {
            str(part): quantization.label if quantization else None for part, quantization in found.settings.items()
        },
    }


def draw(found: Allocation, file: Path, picture: Path) -> None:
    """Draw what was measured and chosen, as an SVG file."""
    held = sensitivity.read(file)
    costs = {str(part): {bits: sum(cost.values()) for bits, cost in of.items()} for part, of in held.costs.items()}
    chosen = {
        str(part): sum(cost.values())
        for part, quantization in found.settings.items()
        if quantization and part in held.costs and (cost := held.cost(part, quantization))
    }
    write_durably(picture, allocation_plot.sensitivities(costs, chosen))
