"""What is recorded of a cell: figures of its report, or the error that it ended with."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...convert import typed_json
from ...convert.errors import UserError, printable, reason
from ...convert.regular_files import read_json
from ..records import Report, Times
from ..report import figures

RESULT = "result.json"
_LARGEST = 1 << 20
_LONGEST = 2000  # characters of an error
VERSION = 1


@dataclass(frozen=True)
class CellResult:
    """A bundle's size, and how its predictions diverge from its source's, in nats/token.

    intact: the verdict of its verification. bytes: of all files but the manifest, whose length does not matter for the
    model. rounding_kl: of plain rounding at the same bits. times: the only field that another run may change.
    """

    name: str
    identity: str
    source: str
    recipe: str
    method: str
    calibration: str
    target: str
    bytes: int
    bits_per_weight: float
    intact: bool
    failure: str | None
    text_kl: float | None
    codebook0_kl: float | None
    agent_kl: float | None
    agent_kl_error: float | None
    agent_top1: float | None
    rounding_kl: float | None
    times: Times


@dataclass(frozen=True)
class CellFailure:
    """A cell without a result. error: one line or more on why."""

    name: str
    identity: str
    error: str
    times: Times


def result_of(report: Report, names: dict[str, str], began: float) -> CellResult:
    """Return what is recorded of a cell; names: its own, its identity, source, recipe, method, calibration."""
    text, codebook, agent, top1 = figures(report)
    return CellResult(
        **names,
        target=report.bundle.target,
        bytes=sum(file.size for file in report.bundle.files.values()),
        bits_per_weight=report.bundle.bits_per_weight,
        intact=report.verdict.passed,
        failure=report.verdict.failures[0].message if report.verdict.failures else None,
        text_kl=text.bundle,
        codebook0_kl=codebook.bundle,
        agent_kl=agent.bundle,
        agent_kl_error=agent.error,
        agent_top1=top1.bundle,
        rounding_kl=agent.control,
        times=times_since(began),
    )


def times_since(began: float) -> Times:
    """Return when something began (seconds since the epoch), and how long it took until now."""
    return Times(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)), round(time.time() - began, 1))


def times_of(seconds: float) -> Times:
    """Return the times of what ended now and took so many seconds."""
    return Times(times_since(time.time() - seconds).began, seconds)


def error_of(error: BaseException) -> str:
    """Return what is recorded of an error; the kind of one that is no message to users."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return printable(" ".join(text.split()))[:_LONGEST]


def to_text(record: CellResult | CellFailure) -> str:
    """Return a record as its file holds it."""
    return json.dumps({"sweep_version": VERSION, **typed_json.to_json(record)}, indent=1, ensure_ascii=False) + "\n"


def read_result(path: Path) -> CellResult:
    """Read a cell's result; raises UserError for what is not one."""
    result: CellResult = _read(path, CellResult)
    return result


def read_failure(path: Path) -> CellFailure:
    """Read a cell's failure; raises UserError for what is not one."""
    failure: CellFailure = _read(path, CellFailure)
    return failure


def _read(path: Path, kind: Any) -> Any:
    try:
        return typed_json.from_json(kind, read_json(path, _LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a sweep's ({reason(error)}): remove its folder, and run the sweep again"
        ) from None


def front(results: Sequence[CellResult]) -> set[str]:
    """Return the names of results on the Pareto front: intact, and none is smaller and diverges less.

    Sizes and the agent's divergence count. Of two with the same figures, the first one is on it.
    """
    on, least = set(), float("inf")
    known = [one for one in results if one.intact and one.agent_kl is not None]
    for one in sorted(known, key=lambda one: (one.bytes, one.agent_kl, one.name)):
        if one.agent_kl is not None and one.agent_kl < least:
            on.add(one.name)
            least = one.agent_kl
    return on
