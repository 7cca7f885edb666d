"""Two reports beside each other: which bundle is better, and where."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..convert.bundle.describe import size
from ..convert.errors import UserError
from .limits import block_name, name_of
from .report import figures, read, short

_LISTED = 5
_ROUNDING = 1e-6  # errors below it are what a cast leaves


def compare_reports(first: Path, second: Path) -> dict[str, Any]:
    """Compare the reports of two bundles, or two report files; raises UserError for what is none."""
    reports = [read(path) for path in (first, second)]
    try:
        return compare(*reports)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{first}, {second}: not reports of ppx-verify ({str(error)[:60]!r})") from None


def differs(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return why two reports' figures must not be compared, if they must not."""
    found = []
    for what, values in (
        ("checkpoints", [report["source"].get("files") for report in (first, second)]),
        ("material", [report["material"] for report in (first, second)]),
        ("arithmetic", [report["arithmetic"] for report in (first, second)]),
    ):
        if values[0] != values[1]:
            found.append(f"they were made with different {what}: {_shown(values[0])} and {_shown(values[1])}")
    return found


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return sizes, limited figures and every stream's divergence of both, and the blocks and tensors that differ most.

    Each row holds ``a``, ``b`` and ``better``: ``a``, ``b`` or ``same``.
    """
    sizes = [_row(name, [r["bundle"][key] for r in (first, second)]) for name, key in _SIZES.items()]
    rows = []
    others = {row["name"]: row["bundle"] for row in figures(second)}
    for row in figures(first):
        rows.append(_row(row["name"], [row["bundle"], others[row["name"]]], more_is_better=row["sign"] == "≥"))
    for name in first["predictions"]:
        held = [report["predictions"].get(name, {}).get("bundle", {}).get("kl") for report in (first, second)]
        if all(held) and name not in ("text", "codebook_0", "agent"):  # which stand above
            rows.append(_row(f"KL of {name.replace('_', ' ')}", [kl["mean"] for kl in held]))
    passed = [report["verdict"]["passed"] for report in (first, second)]
    return {
        "passed": {"a": passed[0], "b": passed[1]},
        "not_comparable": differs(first, second),
        "sizes": sizes,
        "figures": rows,
        "blocks": _most_different(first["activations"], second["activations"], block_name, _own_error),
        "tensors": _most_different(first["weights"], second["weights"], _tensor, lambda row: row["relative_rmse"]),
    }


_SIZES = {"bytes": "bytes", "bits a weight": "bits_per_weight"}


def _shown(value: Any) -> str:
    """Return what a report says of its input, in short."""
    if not isinstance(value, Mapping):
        return str(value)
    keys = [key for key in ("kind", "file", "sequences", "frames") if key in value]
    return ", ".join(f"{key} {value[key]}" for key in keys) or "other files"


def _row(name: str, values: list[float | None], more_is_better: bool = False) -> dict[str, Any]:
    a, b = values
    better = "same"
    if a is not None and b is not None and a != b:
        better = "a" if (a > b) == more_is_better else "b"
    return {"name": name, "a": a, "b": b, "better": better}


def _own_error(row: Mapping[str, Any]) -> float | None:
    value: float | None = row["local"]["relative_l2"] if row["local"] else None
    return value


def _tensor(row: Mapping[str, Any]) -> str:
    """Return what a row of the weights is, by its name in the checkpoint, which does not depend on the target."""
    return name_of({**row, "tensor": row["source"]})


def _most_different(first: list[Any], second: list[Any], name: Any, value: Any) -> dict[str, Any]:
    """Return how many rows are better in which, and those whose values are farthest apart, by their ratio."""
    others = {name(row): value(row) for row in second}
    pairs = [(name(row), value(row), others.get(name(row))) for row in first]
    rows = [_row(label, [a, b]) for label, a, b in pairs if a is not None and b is not None]
    count = {key: sum(row["better"] == key for row in rows) for key in ("a", "b", "same")}
    apart = [row for row in rows if row["better"] != "same" and max(row["a"], row["b"]) > _ROUNDING]
    apart.sort(key=lambda row: -max(row["a"] / (row["b"] or 1e-12), row["b"] / (row["a"] or 1e-12)))
    return {"better": count, "most_different": apart[:_LISTED]}


def text(names: tuple[str, str], found: Mapping[str, Any]) -> str:
    """Return a comparison as a table for people; an arrow stands at the better value."""
    lines = [f"warning: {why}" for why in found["not_comparable"]]
    width = max(len(row["name"]) for row in found["figures"] + found["sizes"])
    lines.append(f"{'':<{width}}  {'A':>12}  {'B':>12}    A: {names[0]}, B: {names[1]}")
    verdicts = ["passes" if found["passed"][key] else "fails" for key in ("a", "b")]
    lines.append(f"{'verdict':<{width}}  {verdicts[0]:>12}  {verdicts[1]:>12}")
    for row in found["sizes"] + found["figures"]:
        shown = [size(int(row[key])) if row["name"] == "bytes" else short(row[key]) for key in ("a", "b")]
        mark = {"a": "◀ A", "b": "  B ▶", "same": ""}[row["better"]]
        lines.append(f"{row['name']:<{width}}  {shown[0]:>12}  {shown[1]:>12}  {mark}".rstrip())
    for what in ("blocks", "tensors"):
        count = found[what]["better"]
        lines.append("")
        lines.append(f"{what}: A is better in {count['a']}, B in {count['b']}, the same in {count['same']}")
        lines += [f"  {row['name']}: {short(row['a'])} | {short(row['b'])}" for row in found[what]["most_different"]]
    return "\n".join(lines)
