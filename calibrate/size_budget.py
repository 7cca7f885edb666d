"""Fitting a model into a size: measure sensitivities or read them, allocate bits, write the recipe."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..convert.bundle.describe import size
from ..convert.bundle.destination import check_file, check_new_file
from ..convert.bundle.recipe_file import to_toml
from ..convert.bundle.workspace import write_durably
from ..convert.conversion import OpenConversion
from ..convert.errors import UserError
from ..convert.hints import Hint
from ..convert.preparation import inventory, open_named
from ..convert.source import source as sources
from ..convert.source.scan import Fingerprint
from ..convert.source.source import Source
from . import allocation_plot, sensitivity
from .allocation import (
    Allocation,
    AllocationRequest,
    Budget,
    best_recipe,
    check_budget,
    request_of,
    size_of,
)
from .sensitivity import Sensitivities
from .size_curve import size_curve

Fingerprints = Mapping[str, Fingerprint]  # of a source's files: taken once in a run, as it reads all of them


def budget_of(target_size: str | int | None, bits_per_weight: float | None) -> Budget | None:
    """Return the budget that a size (``5.3GB``, or bytes) or bits per weight mean, None for neither.

    Raises UserError for both, and for what is not a size.
    """
    if target_size is not None and bits_per_weight is not None:
        raise UserError("a target size and bits per weight contradict each other", Hint.ONE_BUDGET)
    if target_size is None and bits_per_weight is None:
        return None
    return Budget(size_of(target_size) if isinstance(target_size, str) else target_size, bits_per_weight)


def allocate(
    source: str | Path,
    output: str | Path,
    *,
    target_size: str | int | None = None,
    bits_per_weight: float | None = None,
    target: str | None = None,
    dtype: str | None = None,
    method: str | None = None,
    depformer_steps: int | None = None,
    keep: Sequence[str] = (),
    tokens: str | Path | None = None,
    sensitivity_file: str | Path | None = None,
    plot: str | Path | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    fill_depformer_steps: bool = False,
    force: bool = False,
    quiet: bool = True,
) -> Allocation:
    """Write the recipe that fits into a size and is expected to diverge least; its ``recipe`` is what convert takes.

    source: the checkpoint, a Hub id, a folder or ``demo``. output: the recipe's file, NAME.toml. target_size: of all
    files but manifest and report, ``"5.3GB"`` or bytes; or bits_per_weight, of the whole model. target, dtype, method,
    depformer_steps: of the recipe. keep: components that stay float. tokens: what to measure on; self-generated if not
    given. sensitivity_file: where measurements are kept, NAME.sensitivity.json; read if it is there. plot: an SVG to
    draw. Raises UserError for what the user can correct.
    """
    budget, path = budget_of(target_size, bits_per_weight), Path(output)
    if budget is None:
        raise UserError("no size is given: give a target size or bits per weight")
    check_new_file(path, ".toml", force)
    request = request_of(budget, target, dtype, method, depformer_steps, keep)
    file = path.with_suffix(".sensitivity.json") if sensitivity_file is None else Path(sensitivity_file)
    picture = None if plot is None else Path(plot)
    for written in (None if file.exists() else file, picture):
        if written:
            check_file(written)
    with open_named(str(source), revision, adapter, fill_depformer_steps, quiet) as opened:
        check_budget(inventory(opened), request)
        fingerprints = sources.fingerprint(opened, quiet)
        measured = sensitivities(opened, fingerprints, tokens, path.with_suffix(""), file, quiet)
        chosen = allocation(opened, request, measured, path)
        if picture:
            draw(opened, request, measured, chosen, picture)
    return chosen


def allocate_for(conversion: OpenConversion, request: AllocationRequest, tokens: str | Path | None) -> Allocation:
    """Find the recipe for a conversion; it and what was measured for it are left beside the bundle's folder."""
    source, fingerprints, folder = conversion.source, conversion.fingerprints, conversion.output
    file, recipe = (folder.with_name(f"{folder.name}.{what}") for what in ("sensitivity.json", "recipe.toml"))
    check_budget(inventory(source), request)
    measured = sensitivities(source, fingerprints, tokens, folder, file, conversion.quiet)
    return allocation(source, request, measured, recipe)


def sensitivities(
    source: Source, fingerprints: Fingerprints, tokens: str | Path | None, beside: Path, file: Path, quiet: bool
) -> Sensitivities:
    """Return a source's sensitivities: those in the file, else measured now and written there.

    fingerprints: of the source's files. tokens: None for those that the file was measured on, and where there is no
    file for self-generated ones. beside: the output, beside which these are written. What an interrupted measurement
    has left is beside the file. Raises UserError for a file of another source or of other tokens.
    """
    if file.exists():
        return _stored(source, fingerprints, tokens, beside, file)
    from ..model.tokens import read_tokens
    from . import measurement  # imports torch: seconds that a program's help does not need

    given = conversations(source, fingerprints, tokens, beside, quiet)
    token_set = read_tokens(given, source.architecture, None, None)
    unfinished = file.with_name(f"{file.name}.unfinished")
    measured = measurement.measure(source, token_set, _mark(source, fingerprints, given), quiet, unfinished)
    source.check_unchanged("measured")
    measured = replace(measured, source=_source_mark(source, fingerprints))
    sensitivity.write(measured, file)
    unfinished.unlink(missing_ok=True)
    return measured


def _stored(
    source: Source, fingerprints: Fingerprints, tokens: str | Path | None, beside: Path, file: Path
) -> Sensitivities:
    """Read a file of sensitivities; raises UserError, with the reason, for another source or other tokens."""
    measured = sensitivity.read(file)
    if measured.source and measured.source != _source_mark(source, fingerprints):
        raise UserError(f"{file}: was measured on another source: remove it, or name another file")
    spoken = _spoken(beside)
    given = Path(tokens) if tokens else spoken if not measured.source and spoken.exists() else None
    if given is None and not measured.source:
        raise UserError(
            f"{file}: was written by an earlier version, and does not say which source it was measured on",
            Hint.GIVE_MEASURED_TOKENS,
        )
    if given is not None and measured.fingerprint != _mark(source, fingerprints, given):
        if not measured.source:
            raise UserError(f"{file}: was measured on another source or other tokens: remove it, or name another file")
        raise UserError(
            f"{file}: was measured on other tokens than {given} ({measured.measured_on})", Hint.MEASURED_ON_OTHERS
        )
    return measured


def _source_mark(source: Source, fingerprints: Fingerprints) -> str:
    """Return what stands for a source and its adapter."""
    adapter = source.adapter and source.adapter.to_json()
    return hashlib.sha256(repr([_weights(source, fingerprints), adapter]).encode()).hexdigest()


def _mark(source: Source, fingerprints: Fingerprints, tokens: Path) -> str:
    """Return what stands for a source, its adapter and calibration tokens."""
    from ..model.tokens import read_tokens
    from . import dataset

    adapter = source.adapter and source.adapter.to_json()  # as earlier versions hashed it
    of_tokens = dataset.fingerprint(read_tokens(tokens, source.architecture, None, None))
    return hashlib.sha256(repr([_weights(source, fingerprints), adapter, of_tokens]).encode()).hexdigest()


def _weights(source: Source, fingerprints: Fingerprints) -> str:
    return source.location.files.weights_sha256(fingerprints)


def _spoken(beside: Path) -> Path:
    """Return the file of self-generated tokens beside an output."""
    return beside.with_name(f"{beside.name}.spoken.safetensors")


def conversations(
    source: Source, fingerprints: Fingerprints, tokens: str | Path | None, beside: Path, quiet: bool
) -> Path:
    """Return a file of calibration tokens: the given one, else self-generated ones, written beside the output."""
    if tokens:
        return Path(tokens)
    from .self_generated import self_generated

    return self_generated(source, _spoken(beside), quiet=quiet, fingerprints=fingerprints)


def allocation(source: Source, request: AllocationRequest, measured: Sensitivities, recipe: Path) -> Allocation:
    """Find the recipe for a budget, and write it."""
    chosen = best_recipe(inventory(source), request, measured)
    write_durably(recipe, to_toml(chosen.recipe))
    return chosen


def text(chosen: Allocation) -> str:
    """Return the line that is printed of an allocation, and the one on its sensitivities."""
    total = sum(chosen.expected.values())
    if chosen.bound is None:
        near = f"the best that {chosen.recipe.target} takes"
    elif chosen.bound >= total * (1 - 1e-9):
        near = "no other choice is better"
    else:
        near = f"no recipe has a sum below {chosen.bound:.3g}"
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


def draw(
    source: Source, request: AllocationRequest, measured: Sensitivities, chosen: Allocation, picture: Path
) -> None:
    """Draw sensitivities, the allocation, and what other sizes would cost, as an SVG file."""
    costs = {str(part): {bits: sum(cost.values()) for bits, cost in of.items()} for part, of in measured.costs.items()}
    expected = {
        str(part): sum(cost.values())
        for part, quantization in chosen.settings.items()
        if quantization and part in measured.costs and (cost := measured.cost(part, quantization))
    }
    settings = {
        str(part): f"{quantization.bits} bit g{quantization.group_size}" if quantization else "float"
        for part, quantization in chosen.settings.items()
    }
    here = (chosen.nbytes, sum(chosen.expected.values()))
    curve = sorted({*size_curve(inventory(source), request, measured), here})
    write_durably(picture, allocation_plot.draw(costs, expected, settings, curve, here))
