"""Measuring sensitivities: the original and its variants, each with one group of tensors quantized, on the same tokens.

The original goes through some sequences, with one block in memory. At each block a stream begins for every number of
bits that the block could have, and is computed beside the original's. How far its predictions diverge at the end is the
sensitivity of the group. Sequences whose streams do not fit into memory together are read in several passes. A few
groups are measured at a time (a unit), and kept on the disk: a measurement that was killed resumes behind them.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..convert.errors import UserError
from ..convert.progress import bar, keeping
from ..convert.source.source import Source
from ..model import torch_device as devices
from ..model.forward import Floats, Tokens
from ..model.reference import reference_of
from ..model.tokens import TokenDescription, TokenSet, evenly_spaced
from ..model.weights import Rows, kept_by
from ..quant.affine import BITS
from .kept_measurement import KeptMeasurement
from .measured_pass import MOST_FRAMES, Pass, depformer_rows, reads_temporal, run_pass
from .measurement_work import MeasurementWork, Members, work_of
from .sensitivity import STREAMS, Sensitivities, TensorGroup, members_of
from .weight_error import relative_errors

_SHARE = 0.25  # of the machine's memory, for all streams
_UNIT = 4  # groups that are measured at a time: the original is computed again for each unit


def measure(
    source: Source,
    token_set: TokenSet,
    fingerprint: str,
    quiet: bool = False,
    kept_in: Path | None = None,
    *,
    bits: Sequence[int] = BITS,
    sequences: int = 4,
    memory: int | None = None,
) -> Sensitivities:
    """Measure every group of tensors at every number of ``bits``, in float32, quantized by ``lsq``.

    kept_in: a file for what is measured so far, which an interrupted measurement resumes from; the caller removes it.
    sequences: to measure on at least, in as many passes as they take; more are read where they fit into one. memory:
    bytes for all streams, None for a share of the machine's. PyTorch computes on a GPU where there is one. Groups of
    depformer steps that predict the user's codebooks are left out: the agent's predictions do not depend on them.
    Raises UserError, which names the group, for predictions that are not finite, and for sequences without known tokens
    of the text or the agent.
    """
    members = members_of(source.architecture)
    nbytes = int(_SHARE * devices.host_memory()) if memory is None else memory
    streams = 1 + len(bits) * sum(group.component != "depformer" for group in members)
    passes = _passes(token_set, sequences, nbytes // (streams * source.architecture.dim * 4))
    available, frames = len(token_set.tokens), token_set.tokens.shape[2]
    used = replace(token_set.description, sequences=sum(map(len, passes)), frames=frames, available=available)
    sensitivities = _zeros(used, members, bits, fingerprint)
    decisive = [fingerprint, tuple(bits), [chosen.tolist() for chosen in passes], list(map(str, members)), _UNIT]
    kept = KeptMeasurement.open(kept_in, hashlib.sha256(repr(decisive).encode()).hexdigest())
    units = _units(members)
    todo = [
        [place for place, unit in enumerate(units) if not kept.has(f"{number}.{place}", list(map(str, unit)), bits)]
        for number in range(len(passes))
    ]
    works = [_work(source, members, token_set.chosen(chosen)) for chosen in passes]
    total = sum(
        work.of(units[index], len(bits), not place or reads_temporal(units[index]))
        for work, left in zip(works, todo, strict=True)
        for place, index in enumerate(left)
    ) + sum(works[0].sampled.values())
    whole = len(passes) * len(units)
    with (
        bar("measuring sensitivities", total, "", quiet) as progress,
        keeping(lambda: f"{len(kept.units)} of {whole} parts of the measurement are kept" if kept.units else ""),
        torch.inference_mode(),
    ):
        for number, chosen in enumerate(passes):
            weights: dict[tuple[str, int], Tensor] = {}
            model = reference_of(source.checkpoint, device=devices.device())
            model = replace(model, weights=kept_by(weights, model.weights, model.device), rows=_cached(model.rows))
            some, known = token_set.chosen(chosen), dict[None, Floats]()
            for index in todo[number]:
                unit = {group: members[group] for group in units[index]}
                sums = _zeros(used, unit, bits)
                run = Pass(source, unit, model, weights, some, nbytes, sums, works[number], progress, known)
                run_pass(run)
                costs = {str(group): {str(one): cost for one, cost in sums.costs[group].items()} for group in unit}
                kept.add(f"{number}.{index}", run.counts, costs)
        counts = _add_up(kept, sensitivities, units, len(passes))
        if silent := [stream for stream, count in counts.items() if not count]:
            raise UserError(
                f"the {used.sequences} sequences that were measured on have no known tokens of {' and '.join(silent)}: "
                "give tokens in which both are known"
            )
        for group, tensors in members.items():
            for cost in sensitivities.costs[group].values():
                cost.update({stream: max(0.0, value / counts[stream]) for stream, value in cost.items()})
            sensitivities.errors[group] = relative_errors(source, tensors)
            progress.update(works[0].sampled[group])
    return sensitivities


def _zeros(
    used: TokenDescription, groups: Iterable[TensorGroup], bits: Sequence[int], fingerprint: str = ""
) -> Sensitivities:
    """Return sensitivities of some groups in which nothing is measured yet."""
    costs = {group: {one: dict.fromkeys(STREAMS, 0.0) for one in bits} for group in groups}
    return Sensitivities(used, fingerprint, costs=costs)


def _add_up(
    kept: KeptMeasurement, sensitivities: Sensitivities, units: Sequence[Sequence[TensorGroup]], passes: int
) -> dict[str, int]:
    """Add the divergences of all units to sensitivities; return the number of rows that they are of, by stream.

    All units of a pass are of the same rows.
    """
    counts = dict.fromkeys(STREAMS, 0)
    for number in range(passes):
        for index, groups in enumerate(units):
            measured = kept.units[f"{number}.{index}"]
            for group in groups:
                for one, cost in sensitivities.costs[group].items():
                    for stream in STREAMS:
                        cost[stream] += measured.costs[str(group)][str(one)][stream]
        counts = {stream: counts[stream] + measured.counts[stream] for stream in STREAMS}
    return counts


def _units(members: Members) -> list[list[TensorGroup]]:
    """Return the groups that are measured together, those that begin in the temporal transformer first."""
    ordered = sorted(members, key=lambda group: not reads_temporal([group]))
    return [ordered[first : first + _UNIT] for first in range(0, len(ordered), _UNIT)]


def _work(source: Source, members: Members, token_set: TokenSet) -> MeasurementWork:
    """Count what one pass over some sequences computes."""
    rows = len(depformer_rows(source, token_set)[1])
    return work_of(source.architecture, members, token_set.tokens.shape[0] * token_set.tokens.shape[2], rows)


def _cached(rows: Rows) -> Rows:
    """Return a way to read rows of embedding tables that reads those of the same tokens once."""
    cache: dict[tuple[str, bytes], Tensor] = {}

    def read(name: str, tokens: Tokens) -> Tensor:
        key = (name, tokens.tobytes())
        if key not in cache:
            cache[key] = rows(name, tokens)
        return cache[key]

    return read


def _passes(token_set: TokenSet, least: int, frames: int) -> list[NDArray[np.int64]]:
    """Return the sequences that are read, evenly spread, by pass; frames: of which all streams fit into memory."""
    count, length = len(token_set.tokens), token_set.tokens.shape[2]
    at_once = max(1, frames // length)
    chosen = evenly_spaced(count, max(1, min(max(at_once, least), MOST_FRAMES // length)))
    return np.array_split(chosen, -(-len(chosen) // at_once))
