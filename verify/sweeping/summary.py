"""What a sweep prints: for people, and for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...convert import typed_json
from ...convert.bundle.describe import counted, size
from ...convert.parallel import cores
from ...convert.progress import duration
from .estimate import Estimate
from .settings import Sweep
from .sweep import SweepResult


def plan_text(sweep: Sweep, made: Sequence[Estimate], on_ray: bool) -> str:
    """Return what a dry run prints. on_ray: cells run side by side, by this machine's cores, else one after another."""
    side_by_side = max(1, cores() // sweep.resources.cores) if on_ray else 1
    width = max(len(one.cell.name) for one in made)
    lines = [f"{'cell':<{width}}  {'size':>12}  {'time':>8}"]
    for one in made:
        total = "unknown" if one.nbytes is None else size(one.nbytes)
        taken = "unknown" if one.seconds is None else duration(one.seconds)
        lines.append(f"{one.cell.name:<{width}}  {('≤ ' if one.at_most else '') + total:>12}  {taken:>8}")
    known = [one.seconds for one in made if one.seconds is not None]
    line = f"{len(made)} cells"
    if known:
        total_time = max(sum(known) / side_by_side, max(known))
        order = "one after another" if side_by_side == 1 else f"{side_by_side} at a time"
        line += f", about {duration(total_time)} on this machine, {order}"
    data = {(one.cell.source.name, one.cell.calibration.name) for one in made if one.cell.calibration}
    if data:
        line += f"; without {counted(len(data), 'calibration set')} (and sensitivities) made once"
    return "\n".join([*lines, line])


def plan_json(made: Sequence[Estimate]) -> dict[str, Any]:
    """Return the same for a program; None where the source has to be fetched first."""
    return {
        "cells": [
            {
                "name": one.cell.name,
                "source": one.cell.source.name,
                "recipe": one.cell.recipe.name,
                "method": one.cell.method_names,
                "calibration": one.cell.calibration and one.cell.calibration.name,
                "bytes": one.nbytes,
                "at_most": one.at_most,
                "forecast_seconds": one.seconds and round(one.seconds, 1),
            }
            for one in made
        ]
    }


def result_json(made: SweepResult) -> dict[str, Any]:
    """Return the results for a program."""
    return {
        "results": [typed_json.to_json(one) for one in made.results],
        "failures": [asdict(one) for one in made.failures],
        "front": sorted(made.front),
        "page": str(made.page),
    }


def result_text(made: SweepResult) -> str:
    """Return what is printed of a sweep."""
    intact = sum(one.intact for one in made.results)
    lines = [f"{len(made.results)} cells done ({intact} intact), {len(made.failures)} failed"]
    best = [one for one in made.results if one.name in made.front]
    lines += [f"on the Pareto front: {one.name} ({one.bits_per_weight:.2f} bpw, KL {one.agent_kl:.3g})" for one in best]
    if not made.parquet:
        lines.append("results.parquet was not written: pyarrow is not installed (pip install 'ppx-convert[cluster]')")
    return "\n".join([*lines, f"results: {made.page}"])
