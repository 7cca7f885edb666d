"""The report of a verification: ``parity/report.json`` in the bundle, a page to look at, and one screen to read."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..convert.bundle.describe import size
from ..convert.bundle.targets import TARGETS
from ..convert.errors import Problem, UserError, reason
from ..convert.file_names import MANIFEST
from ..convert.hints import Hint
from ..convert.regular_files import read_json
from ..convert.typed_json import mapped
from ..model.kernel_test import workarounds
from . import headline, plots
from .figures import Cosine, PredictionFigures, WeightRow, finite_or_infinite
from .limits import AT_LEAST, FIGURES, NAMES, limited
from .records import Report

FOLDER = "parity"
JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
_DIGITS = 6
_WORST = 5
_LARGEST = 16 << 20  # bytes; most of a report is a minute of audio


def write(report: Report, folder: Path) -> Path:
    """Write a report's three files into a bundle's ``parity`` folder; return the folder.

    An earlier report stays until all three are on the disk. report.json, from which the others can be rendered again,
    comes last.
    """
    target, partial = folder / FOLDER, folder / f".{FOLDER}-partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {JSON: text} | {name.partition("/")[2]: page for name, page in pages(report).items()}
    for name, content in contents.items():
        with (partial / name).open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    if target.is_symlink():  # which may lead out of the bundle
        target.unlink()
    target.mkdir(exist_ok=True)
    for name in (HTML, MARKDOWN, JSON):
        (partial / name).replace(target / name)
    partial.rmdir()
    return target


def pages(report: Report) -> dict[str, str]:
    """Return the pages of a report, by their names in the bundle."""
    return {f"{FOLDER}/{MARKDOWN}": markdown(report), f"{FOLDER}/{HTML}": html(report)}


def finish(report: Report) -> Report:
    """Return a report as it is written: floats of 6 digits, None for those that are not finite."""
    return mapped(report, _rounded)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def read(path: Path) -> Report:
    """Read the report of a bundle, or a report's file; raises UserError for anything else."""
    file = path / FOLDER / JSON if path.is_dir() else path
    if not path.exists() or (path.is_dir() and not (path / MANIFEST).is_file()):
        raise UserError(f"{path}: neither a bundle nor a report of ppx-verify")
    if not file.is_file():
        raise UserError(f"{path}: has no {FOLDER}/{JSON}", Hint.VERIFY_FIRST)
    try:
        data = read_json(file, _LARGEST)
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{file}: not a report of ppx-verify: give a bundle, or its {FOLDER}/{JSON}") from None
    try:
        return Report.from_json(data)
    except ValueError as error:
        message = f"not a report that this version reads ({reason(error)})"
        raise UserError(Problem(str(file), message, "run ppx-verify again")) from None


@dataclass(frozen=True)
class LimitedFigure:
    """A row of the table of limits: a figure of each model, and its bound, None where there is nothing to judge by.

    error: standard error over sequences. control: None in reports of earlier versions. controls: at other bits.
    """

    name: str
    bound: float | None
    sign: str
    error: float | None
    passed: bool
    bundle: float | None
    control: float | None
    controls: list[float | None]
    noise: float | None

    @property
    def is_beyond(self) -> bool:
        """Whether the figure itself is beyond the bound, or not known."""
        if self.bundle is None or self.bound is None:
            return True
        return self.bundle < self.bound if self.sign == "≥" else self.bundle > self.bound


def figures(report: Report) -> list[LimitedFigure]:
    """Return the limited figures of a report."""
    rows = []
    failed = {failure.limit for failure in report.verdict.failures}
    for limit, stream in FIGURES.items():
        of_stream = report.predictions.get(stream)
        bundle = of_stream and limited(of_stream.bundle, limit)
        noise = of_stream and limited(of_stream.noise, limit)
        control = limited(of_stream.control, limit) if of_stream and of_stream.control else None
        rows.append(
            LimitedFigure(
                name=NAMES[limit],
                bound=report.limits[limit],
                sign="≥" if limit in AT_LEAST else "≤",
                error=bundle.standard_error if bundle else None,
                passed=limit not in failed,
                bundle=bundle.value if bundle else None,
                control=control.value if control else None,
                controls=[_value(figures, limit) for figures in of_stream.controls.values()] if of_stream else [],
                noise=noise.value if noise else None,
            )
        )
    return rows


def controls(report: Report) -> list[str]:
    """Return the bits of the controls beside the one at the bundle's own bits."""
    return list(report.hidden.controls) if report.hidden else []


def _value(figures: PredictionFigures, limit: str) -> float | None:
    found = limited(figures, limit)
    return found.value if found else None


def worst(report: Report) -> dict[str, list[str]]:
    """Return the worst five tensors, blocks and streams, as lines."""
    tensors = [row for row in worst_first(report.weights) if row.relative_rmse is None or row.relative_rmse > 0]
    blocks = [(row.name, row.local.relative_l2) for row in report.activations if row.local]
    blocks.sort(key=lambda pair: -finite_or_infinite(pair[1]))
    streams = [
        (name, figures.bundle.kl.mean)
        for name, figures in report.predictions.items()
        if name not in ("agent", "user") and figures.bundle.kl
    ]
    streams.sort(key=lambda pair: -finite_or_infinite(pair[1]))
    return {
        "tensors, relative error": [
            f"{row.component} {row.name}: {_percent(row.relative_rmse)}" for row in tensors[:_WORST]
        ],
        "blocks, local error": [f"{name}: {_percent(value)}" for name, value in blocks[:_WORST]],
        "streams, KL": [f"{name.replace('_', ' ')}: {short(value)}" for name, value in streams[:_WORST]],
    }


def worst_first(weights: Sequence[WeightRow]) -> list[WeightRow]:
    """Return rows of weights, the largest relative errors first."""
    return sorted(weights, key=lambda row: -finite_or_infinite(row.relative_rmse))


def _percent(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2%}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _cosine(figures: Cosine | None) -> str:
    values = (figures.mean, figures.min) if figures else (None, None)
    return ", ".join("–" if value is None else f"{value:.5f}" for value in values)


def short(value: float | None) -> str:
    """Return a figure in a few digits."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def _render(name: str, report: Report, **more: Any) -> str:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"short": short, "size": size, "percent": _percent, "share": _share, "cosine": _cosine}
    environment.autoescape = name.endswith(".html")
    template = environment.from_string((files(__package__) / "templates" / name).read_text("utf-8"))
    return template.render(
        report=report,
        verdict=headline.verdict(report),
        headline=headline.headline(report),
        meaning=headline.MEANING,
        figures=figures(report),
        controls=controls(report),
        worst=worst(report),
        replaced=workarounds(report.kernels),
        **more,
    )


def markdown(report: Report) -> str:
    """Return the report on one screen."""
    return _render("summary.md", report) + "\n"


def html(report: Report) -> str:
    """Return the report as one page with its pictures inside; it loads nothing from the network."""
    target = TARGETS.get(report.bundle.target)
    return _render(
        "page.html",
        report,
        pictures=plots.pictures(report),
        tensors=worst_first(report.weights),
        comparison=headline.comparison(report),
        lacks_8_bit=headline.lacks_8_bit(report),
        bits=headline.bits_of(report),
        programs=target.programs if target else report.bundle.target,
        has_losses=any(stream.bundle.loss for stream in report.predictions.values()),
    )
