"""The report of a verification: ``parity/report.json`` in the bundle, a page to look at, and one screen to read."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..convert.bundle.describe import size
from ..convert.errors import UserError
from ..convert.file_names import MANIFEST
from ..convert.regular_files import read_json
from ..convert.schema import mismatch
from ..model.kernel_test import KernelRow, workarounds
from . import plots
from .limits import FIGURES, NAMES, block_name, name_of
from .report_schema import PREDICTED, REPORT

REPORT_VERSION = 1
FOLDER = "parity"
JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
_DIGITS = 6
_WORST = 5
_LARGEST = 16 << 20  # bytes; most of a report is a minute of sound


def write(report: Mapping[str, Any], folder: Path) -> Path:
    """Write a report's three files into a bundle's ``parity`` folder; return the folder.

    An earlier report stays until all three are on the disk. report.json, from which the others can be rendered again,
    comes last.
    """
    target, partial = folder / FOLDER, folder / f".{FOLDER}-partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
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


def pages(report: Mapping[str, Any]) -> dict[str, str]:
    """Return what people read of a report, by its name in the bundle."""
    return {f"{FOLDER}/{MARKDOWN}": markdown(report), f"{FOLDER}/{HTML}": html(report)}


def finish(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report as it is written: floats of 6 digits, what is not finite as None, sums left out."""
    rows = [{key: row[key] for key in row if not key.startswith("squared")} for row in report["weights"]]
    return dict(_plain({"report_version": REPORT_VERSION} | report | {"weights": rows}))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if key != "by_sequence"}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def read(path: Path) -> dict[str, Any]:
    """Read the report of a bundle, or a report's file; raises UserError for anything else."""
    file = path / FOLDER / JSON if path.is_dir() else path
    if not path.exists() or (path.is_dir() and not (path / MANIFEST).is_file()):
        raise UserError(f"{path}: neither a bundle nor a report of ppx-verify")
    if not file.is_file():
        raise UserError(f"{path}: holds no {FOLDER}/{JSON}: run ppx-verify {path} --reference SOURCE first")
    try:
        report = {"round_trip": None} | read_json(file, _LARGEST)
        wrong = _wrong(report)
        replaced(report)  # raises for rows of another kind
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file}: not a report of ppx-verify: give a bundle, or its {FOLDER}/{JSON}") from None
    if wrong:
        raise UserError(f"{file}: not a report that this version reads ({wrong}): run ppx-verify again")
    return dict(report)


def _wrong(report: Mapping[str, Any]) -> str | None:
    """Return what of a report is not as it must be, None if all that is used of it is."""
    if report["report_version"] != REPORT_VERSION:
        return f"report_version is {str(report['report_version'])[:20]!a}"
    found = mismatch(report, REPORT) or (mismatch(report, PREDICTED) if report["predictions"] else None)
    return found or (None if _is_printable(report) else "it holds text that cannot be printed")


def _is_printable(value: Any) -> bool:
    """Tell whether no text in a report can command a terminal."""
    if isinstance(value, str):
        return value.isprintable()
    if isinstance(value, Mapping):
        return all(_is_printable(inner) for pair in value.items() for inner in pair)
    return all(_is_printable(inner) for inner in value) if isinstance(value, list) else True


def replaced(report: Mapping[str, Any]) -> list[str]:
    """Return the kernels that were worked around, a line for each shape."""
    return workarounds(map(KernelRow.from_json, report["kernels"]))


def figures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the limited figures of a report: what it is, value, bound, noise floor and whether it passes."""
    rows = []
    failed = {failure["limit"] for failure in report["verdict"]["failures"]}
    for limit, bound in report["limits"].items():
        stream, figure, key = FIGURES[limit]
        held = report["predictions"].get(stream, {})
        values = {which: held[which][figure] for which in held if held[which][figure]}
        row = {which: values[which][key] if which in values else None for which in ("bundle", "noise")}
        error = values["bundle"]["standard_error"] if "bundle" in values else None
        passed = limit not in failed
        sign = "≥" if figure == "top1" else "≤"
        rows.append({"name": NAMES[limit], "bound": bound, "sign": sign, "error": error, "passed": passed} | row)
    return rows


def worst(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the worst five tensors, blocks and streams, as lines."""
    tensors = [row for row in report["weights"] if row["relative_rmse"] is None or row["relative_rmse"] > 0]
    tensors.sort(key=lambda row: -_badness(row["relative_rmse"]))
    blocks = [row for row in report["activations"] if row["local"]]
    blocks.sort(key=lambda row: -_badness(row["local"]["relative_l2"]))
    streams = [
        (name, held["bundle"]["kl"])
        for name, held in report["predictions"].items()
        if name not in ("agent", "user") and held["bundle"]["kl"]
    ]
    streams.sort(key=lambda pair: -_badness(pair[1]["mean"]))
    return {
        "tensors, relative error": [f"{name_of(row)}: {_percent(row['relative_rmse'])}" for row in tensors[:_WORST]],
        "blocks, own error": [f"{block_name(row)}: {_percent(row['local']['relative_l2'])}" for row in blocks[:_WORST]],
        "streams, KL": [f"{name.replace('_', ' ')}: {short(kl['mean'])}" for name, kl in streams[:_WORST]],
    }


def _badness(value: float | None) -> float:
    return math.inf if value is None else value  # None stands for what is not finite


def _percent(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2%}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def short(value: float | None) -> str:
    """Return a figure in a few digits."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def _environment() -> Environment:
    found = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    found.filters |= {
        "short": short,
        "size": size,
        "percent": _percent,
        "share": _share,
        "block": block_name,
        "tensor": name_of,
    }
    return found


def _render(name: str, report: Mapping[str, Any], **more: Any) -> str:
    environment = _environment()
    environment.autoescape = name.endswith(".html")
    template = environment.from_string((files(__package__) / "templates" / name).read_text("utf-8"))
    return template.render(
        report=report, figures=figures(report), worst=worst(report), replaced=replaced(report), **more
    )


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report on one screen."""
    return _render("summary.md", report) + "\n"


def html(report: Mapping[str, Any]) -> str:
    """Return the report as a page of its own: no network, its pictures inside."""
    tensors = sorted(report["weights"], key=lambda row: -_badness(row["relative_rmse"]))
    return _render("page.html", report, pictures=plots.pictures(report), tensors=tensors)
