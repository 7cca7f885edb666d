"""Fitting a model into a size: measure sensitivities or read them, allocate bits, write the recipe."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

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

Fingerprints = Mapping[str, Fingerprint]  # of a source's files: taken once in a run, as it reads all of them


def budget_of(target_size: str | None, bits_per_weight: float | None) -> Budget | None:
    """Return the budget that two options mean, None for neither; raises UserError for both."""
    if target_size is not None and bits_per_weight is not None:
        raise UserError("--target-size and --bits-per-weight contradict each other: give one of them")
    if target_size is None and bits_per_weight is None:
        return None
    return Budget(None if target_size is None else size_of(target_size), bits_per_weight)


def sensitivities(source: Source, fingerprints: Fingerprints, tokens: Path, file: Path, quiet: bool) -> Sensitivities:
    """Return a source's sensitivities: those in the file, else measured now and written there.

    fingerprints: of the source's files. Raises UserError for a file of another source or of other tokens.
    """
    from ..model.tokens import read_tokens
    from . import dataset, measurement  # imports torch: seconds that --help does not need

    token_set = read_tokens(tokens, source.architecture, None, None)
    adapter = source.adapter and source.adapter.to_json()  # as earlier versions hashed it
    decisive = [fingerprints[WEIGHTS].sha256, adapter, dataset.fingerprint(token_set)]
    fingerprint = hashlib.sha256(repr(decisive).encode()).hexdigest()
    if file.exists():
        measured = sensitivity.read(file)
        if measured.fingerprint != fingerprint:
            raise UserError(f"{file}: was measured on another source or other tokens: remove it, or name another file")
        return measured
    measured = measurement.measure(source, token_set, fingerprint, quiet)
    source.check_unchanged("measured")
    sensitivity.write(measured, file)
    return measured


def conversations(source: Source, fingerprints: Fingerprints, tokens: Path | None, beside: Path, quiet: bool) -> Path:
    """Return a file of calibration tokens: the given one, else self-generated ones, written beside the output."""
    if tokens:
        return tokens
    from .self_generated import self_generated

    return self_generated(
        source, beside.with_name(f"{beside.name}.spoken.safetensors"), quiet=quiet, fingerprints=fingerprints
    )


def allocation(
    source: Source,
    fingerprints: Fingerprints,
    wanted: AllocationRequest,
    tokens: Path,
    file: Path,
    recipe: Path,
    quiet: bool,
) -> Allocation:
    """Find the recipe for a budget, and write it."""
    measured = sensitivities(source, fingerprints, tokens, file, quiet)
    chosen = allocate(conversion.inventory(source), wanted, measured)
    write_durably(recipe, to_toml(chosen.recipe))
    return chosen


def beside(
    source: Source,
    fingerprints: Fingerprints,
    wanted: AllocationRequest,
    tokens: Path | None,
    folder: Path,
    quiet: bool,
) -> Allocation:
    """Find the recipe for a bundle; it and the sensitivities are written beside the bundle's folder."""
    measured, recipe = (folder.with_name(f"{folder.name}.{what}") for what in ("sensitivity.json", "recipe.toml"))
    calibration = conversations(source, fingerprints, tokens, folder, quiet)
    return allocation(source, fingerprints, wanted, calibration, measured, recipe, quiet)


def text(chosen: Allocation) -> str:
    """Return the line that is printed of an allocation, and the one on its sensitivities."""
    total = sum(chosen.expected.values())
    if chosen.bound is None:
        near = f"the best that {chosen.recipe.target} takes"
    elif chosen.bound >= total * (1 - 1e-9):
        near = "no other choice is better"
    else:
        near = f"none is below {chosen.bound:.3g} in sum"
    line = f"{chosen.recipe.name}: {size(chosen.nbytes)}, {chosen.forecast} ({near})"
    return f"{line}\nmeasured on {chosen.measured_on}"


@dataclass(frozen=True)
class AllocationSummary:
    """An allocation for a program to read. settings: such as ``4 bit group 64`` by part, None where it stays float."""

    recipe: str
    bytes: int
    expected: dict[str, float]
    bound: float | None
    measured_on: str
    settings: dict[str, str | None]


def as_json(chosen: Allocation) -> str:
    """Return an allocation for a program to read."""
    settings = {
        str(part): quantization.label if quantization else None for part, quantization in chosen.settings.items()
    }
    summary = AllocationSummary(
        chosen.recipe.name, chosen.nbytes, chosen.expected, chosen.bound, chosen.measured_on, settings
    )
    return json.dumps(asdict(summary), indent=1)


def draw(chosen: Allocation, file: Path, picture: Path) -> None:
    """Draw sensitivities and the allocation, as an SVG file."""
    measured = sensitivity.read(file)
    costs = {str(part): {bits: sum(cost.values()) for bits, cost in of.items()} for part, of in measured.costs.items()}
    expected = {
        str(part): sum(cost.values())
        for part, quantization in chosen.settings.items()
        if quantization and part in measured.costs and (cost := measured.cost(part, quantization))
    }
    write_durably(picture, allocation_plot.sensitivities(costs, expected))
