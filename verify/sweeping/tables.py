"""The results of a sweep as tables: CSV for everybody, Parquet where pyarrow is installed."""

import csv
import io
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .place import write_text
from .records import CellFailure, CellResult

CSV, PARQUET = "results.csv", "results.parquet"
COLUMNS: dict[str, type] = {
    "name": str,
    "source": str,
    "recipe": str,
    "method": str,
    "calibration": str,
    "target": str,
    "status": str,
    "on_front": bool,
    "bytes": int,
    "bits_per_weight": float,
    "text_kl": float,
    "codebook0_kl": float,
    "agent_kl": float,
    "agent_kl_error": float,
    "agent_top1": float,
    "rounding_kl": float,
    "report": str,
    "bundle": str,
    "message": str,
    "identity": str,
    "began": str,
    "seconds": float,
}
_RISKY = ("=", "+", "-", "@", "\t", "\r")  # first characters that a spreadsheet takes for a formula


def rows_of(
    results: Sequence[CellResult],
    failures: Sequence[CellFailure],
    on_front: set[str],
    reports: dict[str, str],
    bundles: dict[str, str],
) -> list[dict[str, Any]]:
    """Return a row for each cell, its values by column; None where there is none. status: intact, not intact, failed.

    reports, bundles: where they are, by the cell's name.
    """
    rows = []
    for one in results:
        row = {column: getattr(one, column, None) for column in COLUMNS}
        row |= {"status": "intact" if one.intact else "not intact", "on_front": one.name in on_front}
        row |= {"report": reports.get(one.name), "bundle": bundles.get(one.name), "message": one.failure}
        rows.append(row | {"began": one.times.began, "seconds": one.times.seconds})
    for failure in failures:
        source, _, rest = failure.name.partition("/")
        row = dict.fromkeys(COLUMNS) | {"name": failure.name, "source": source, "recipe": rest, "status": "failed"}
        row |= {"on_front": False, "message": failure.error, "identity": failure.identity}
        rows.append(row | {"began": failure.times.began, "seconds": failure.times.seconds})
    return sorted(rows, key=lambda row: str(row["name"]))


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as CSV; texts cannot become formulas of a spreadsheet."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _safe(value) for key, value in row.items()})
    write_text(path, text.getvalue())


def _safe(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}" if isinstance(value, str) and value.startswith(_RISKY) else value


def write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Write rows as Parquet; returns False where pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return False
    types = {str: pyarrow.string(), bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True
