"""Two reports beside each other: which bundle is better, and where."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..convert import typed_json
from ..convert.bundle.describe import size
from .figures import ActivationRow, WeightRow
from .headline import INTACT, NOT_INTACT
from .records import Report
from .report import figures, read, short

_LISTED = 5
_ROUNDING = 1e-6  # errors below it are what a cast leaves
Side = Literal["a", "b", "same"]
Row = TypeVar("Row", WeightRow, ActivationRow)


@dataclass(frozen=True)
class Pair:
    """A figure of both bundles, and which one is better."""

    name: str
    a: float | None
    b: float | None
    better: Side


@dataclass(frozen=True)
class Passed:
    """Whether each bundle passes."""

    a: bool
    b: bool


@dataclass(frozen=True)
class Differences:
    """Rows of both reports: how many are better in which, and those that differ most, by the ratio of their values."""

    better: dict[Side, int]
    most_different: list[Pair]


@dataclass(frozen=True)
class Comparison:
    """Two reports compared. not_comparable: why their figures must not be compared, if they must not."""

    passed: Passed
    not_comparable: list[str]
    sizes: list[Pair]
    figures: list[Pair]
    blocks: Differences
    tensors: Differences

    def to_json(self) -> dict[str, Any]:
        """Return it for a program to read."""
        return asdict(self)


def compare_reports(first: str | Path, second: str | Path) -> Comparison:
    """Compare the reports of two bundles, or two report files; raises UserError for anything else."""
    return compare(read(Path(first)), read(Path(second)))


def differs(first: Report, second: Report) -> list[str]:
    """Return why two reports' figures must not be compared, if they must not."""
    both = (
        ("checkpoints", _shown_files(first), _shown_files(second), first.source.files == second.source.files),
        ("evaluation tokens", _shown_tokens(first), _shown_tokens(second), first.tokens == second.tokens),
        ("arithmetic", first.arithmetic, second.arithmetic, first.arithmetic == second.arithmetic),
    )
    return [f"they were made with different {what}: {one} and {other}" for what, one, other, same in both if not same]


def compare(first: Report, second: Report) -> Comparison:
    """Return sizes and figures of both, and the blocks and tensors that differ most."""
    sizes = [
        _pair("bytes", first.bundle.bytes, second.bundle.bytes),
        _pair("bits per weight", first.bundle.bits_per_weight, second.bundle.bits_per_weight),
    ]
    pairs = [
        _pair(one.name, one.bundle, other.bundle, more_is_better=one.sign == "≥")
        for one, other in zip(figures(first), figures(second), strict=True)
    ]
    for name, stream in first.predictions.items():
        one, other = stream.bundle.kl, second.predictions[name].bundle.kl if name in second.predictions else None
        if one and other and name not in ("text", "codebook_0", "agent"):  # which limits apply to
            pairs.append(_pair(f"KL of {name.replace('_', ' ')}", one.mean, other.mean))
    return Comparison(
        passed=Passed(first.verdict.passed, second.verdict.passed),
        not_comparable=differs(first, second),
        sizes=sizes,
        figures=pairs,
        blocks=_most_different(first.activations, second.activations, lambda row: row.name, _local_error),
        tensors=_most_different(first.weights, second.weights, _tensor, lambda row: row.relative_rmse),
    )


def _shown_files(report: Report) -> str:
    return f"{report.source.id} ({report.source.revision or 'no revision'})"


def _shown_tokens(report: Report) -> str:
    data = typed_json.to_json(report.tokens)
    return ", ".join(f"{key} {data[key]}" for key in ("kind", "file", "sequences", "frames") if key in data)


def _pair(name: str, a: float | None, b: float | None, more_is_better: bool = False) -> Pair:
    better: Side = "same"
    if a is not None and b is not None and a != b:
        better = "a" if (a > b) == more_is_better else "b"
    return Pair(name, a, b, better)


def _local_error(row: ActivationRow) -> float | None:
    return row.local.relative_l2 if row.local else None


def _tensor(row: WeightRow) -> str:
    """Return the row's name by its tensor in the checkpoint, which does not depend on the target."""
    return replace(row, tensor=row.source).name


def _most_different(
    first: Sequence[Row], second: Sequence[Row], name: Callable[[Row], str], value: Callable[[Row], float | None]
) -> Differences:
    others = {name(row): value(row) for row in second}
    values = [(name(row), value(row), others.get(name(row))) for row in first]
    known = [(label, a, b) for label, a, b in values if a is not None and b is not None]
    pairs = [_pair(label, a, b) for label, a, b in known]
    sides: tuple[Side, ...] = ("a", "b", "same")
    count = {side: sum(pair.better == side for pair in pairs) for side in sides}
    apart = [(max(a / (b or 1e-12), b / (a or 1e-12)), _pair(label, a, b)) for label, a, b in known if _differ(a, b)]
    apart.sort(key=lambda one: -one[0])
    return Differences(count, [pair for _, pair in apart[:_LISTED]])


def _differ(a: float, b: float) -> bool:
    return a != b and max(a, b) > _ROUNDING


def text(names: tuple[str, str], compared: Comparison) -> str:
    """Return a comparison as a table; an arrow stands at the better value."""
    pairs = compared.sizes + compared.figures
    lines = [f"warning: {why}" for why in compared.not_comparable]
    width = max(len(pair.name) for pair in pairs)
    lines.append(f"{'':<{width}}  {'A':>12}  {'B':>12}    A: {names[0]}, B: {names[1]}")
    verdicts = [(INTACT if passed else NOT_INTACT).lower() for passed in (compared.passed.a, compared.passed.b)]
    lines.append(f"{'verdict':<{width}}  {verdicts[0]:>12}  {verdicts[1]:>12}")
    arrows = {"a": "◀ A", "b": "  B ▶", "same": ""}
    for pair in pairs:
        a, b = (size(int(value or 0)) if pair.name == "bytes" else short(value) for value in (pair.a, pair.b))
        lines.append(f"{pair.name:<{width}}  {a:>12}  {b:>12}  {arrows[pair.better]}".rstrip())
    for what, rows in (("blocks", compared.blocks), ("tensors", compared.tensors)):
        count = rows.better
        lines.append("")
        lines.append(f"{what}: A is better in {count['a']}, B in {count['b']}, the same in {count['same']}")
        lines += [f"  {pair.name}: {short(pair.a)} | {short(pair.b)}" for pair in rows.most_different]
    return "\n".join(lines)
