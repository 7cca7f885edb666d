"""Two reports beside each other: which bundle is nearer to the original, by how much, and where they differ most."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..convert import typed_json
from ..convert.bundle.describe import size
from .bundle_report import reported
from .figures import ActivationRow, WeightRow
from .headline import INTACT, NOT_INTACT, bits_of
from .paired import PairedDifference, paired_difference
from .records import Report
from .report import figures, read, short

_LISTED = 5
_AGENT = 8  # codebooks
_ROUNDING = 1e-6  # errors below it are what a cast leaves
Side = Literal["a", "b", "same"]
Row = TypeVar("Row", WeightRow, ActivationRow, tuple[str, float | None])


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
    """Two reports compared. not_comparable: why their figures must not be compared, if they must not.

    bits: of the quantized tensors, in words. summary: the agent's divergences (of the mean over its codebooks); None
    where they must not be compared, or nothing was computed. codebooks: by their mean KL divergence.
    """

    passed: Passed
    not_comparable: list[str]
    bits: tuple[str, str]
    summary: PairedDifference | None
    sizes: list[Pair]
    figures: list[Pair]
    blocks: Differences
    tensors: Differences
    codebooks: Differences

    def to_json(self) -> dict[str, Any]:
        """Return it for a program to read."""
        return asdict(self)


def compare_reports(first: str | Path, second: str | Path) -> Comparison:
    """Compare the reports of two bundles, or two report files; raises UserError for anything else.

    Of a bundle in the Hub's cache it is the one that a verification left here, if any, else the published one.
    """
    return compare(read(reported(Path(first))), read(reported(Path(second))))


def differs(first: Report, second: Report) -> list[str]:
    """Return why two reports' figures must not be compared, if they must not."""
    both = (
        ("checkpoints", _shown_files(first), _shown_files(second), first.source.files == second.source.files),
        ("evaluation tokens", _shown_tokens(first), _shown_tokens(second), first.tokens == second.tokens),
        ("arithmetic", first.arithmetic, second.arithmetic, first.arithmetic == second.arithmetic),
    )
    return [f"they were made with different {what}: {one} and {other}" for what, one, other, same in both if not same]


def compare(first: Report, second: Report) -> Comparison:
    """Return a summary, sizes and figures of both, and the blocks, tensors and codebooks that differ most."""
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
    reasons = differs(first, second)
    return Comparison(
        passed=Passed(first.verdict.passed, second.verdict.passed),
        not_comparable=reasons,
        bits=(bits_of(first), bits_of(second)),
        summary=None if reasons else _summary(first, second),
        sizes=sizes,
        figures=pairs,
        blocks=_most_different(first.activations, second.activations, lambda row: row.name, _local_error),
        tensors=_most_different(first.weights, second.weights, _tensor, lambda row: row.relative_rmse),
        codebooks=_most_different(_codebooks(first), _codebooks(second), lambda row: row[0], lambda row: row[1]),
    )


def _summary(first: Report, second: Report) -> PairedDifference | None:
    one, other = (report.predictions.get("agent") for report in (first, second))
    if one is None or other is None or one.bundle.kl is None or other.bundle.kl is None:
        return None
    return paired_difference(one.bundle.kl, other.bundle.kl)


def _codebooks(report: Report) -> list[tuple[str, float | None]]:
    """Return the mean divergence of each codebook; the user's are left out, whose tokens are given when it speaks."""
    streams = [(number, report.predictions.get(f"codebook_{number}")) for number in range(_AGENT)]
    known = [(f"codebook {number}", stream.bundle.kl) for number, stream in streams if stream]
    return [(name, kl.mean) for name, kl in known if kl]


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
    """Return a comparison for people: a summary, what differs most, and tables; an arrow stands at the better value.

    Of reports that must not be compared only the figures, without arrows.
    """
    pairs = compared.sizes + compared.figures
    comparable = not compared.not_comparable
    lines = [*_summary_lines(names, compared), *(_most_lines(compared) if comparable else []), ""]
    width = max(len(pair.name) for pair in pairs)
    lines.append(f"{'':<{width}}  {'A':>12}  {'B':>12}    A: {names[0]}, B: {names[1]}")
    verdicts = [(INTACT if passed else NOT_INTACT).lower() for passed in (compared.passed.a, compared.passed.b)]
    lines.append(f"{'verdict':<{width}}  {verdicts[0]:>12}  {verdicts[1]:>12}")
    arrows = {"a": "◀ A", "b": "  B ▶", "same": ""}
    for pair in pairs:
        a, b = (size(int(value or 0)) if pair.name == "bytes" else short(value) for value in (pair.a, pair.b))
        arrow = arrows[pair.better] if comparable or pair in compared.sizes else ""
        lines.append(f"{pair.name:<{width}}  {a:>12}  {b:>12}  {arrow}".rstrip())
    for what, rows in (("blocks", compared.blocks), ("tensors", compared.tensors)) if comparable else ():
        count = rows.better
        lines.append("")
        lines.append(f"{what}: A is better in {count['a']}, B in {count['b']}, the same in {count['same']}")
        lines += [f"  {pair.name}: {short(pair.a)} | {short(pair.b)}" for pair in rows.most_different]
    return "\n".join(lines)


def _summary_lines(names: tuple[str, str], compared: Comparison) -> list[str]:
    """Return which bundle is nearer to the original, and what both are."""
    lines = [f"warning: {why}" for why in compared.not_comparable]
    if compared.not_comparable:
        lines.append("their figures must not be compared: verify both with the same options first")
    elif compared.summary is None:
        lines.append("nothing to compare: a report has no predictions of the agent's codebooks")
    else:
        lines.append(_nearer(compared.summary))
    bytes_of, bits_per_weight = compared.sizes
    for side, name, bits, nbytes, bpw in zip(
        "AB",
        names,
        compared.bits,
        (bytes_of.a, bytes_of.b),
        (bits_per_weight.a, bits_per_weight.b),
        strict=True,
    ):
        lines.append(f"  {side}: {name}: {bits}, {short(bpw)} bits per weight, {size(int(nbytes or 0))}")
    return lines


def _nearer(summary: PairedDifference) -> str:
    values = f"agent KL {short(summary.a)} (A) and {short(summary.b)} (B) nats/token"
    apart = f"A − B = {summary.difference:+.3g}"
    if summary.standard_error is None:
        return f"one sequence, so no standard error: {values}, {apart}; verify both on more sequences"
    error = f"{apart} ± {short(summary.standard_error)} (standard error"
    error += f", {summary.sequences} sequences paired)" if summary.paired else ", not paired: earlier reports)"
    if summary.nearer == "unclear":
        return f"no clear difference: {values}, {error}"
    ratio = "" if summary.ratio is None else f", {short(summary.ratio)} times as far"
    far = "B" if summary.nearer == "a" else "A"
    return f"{summary.nearer.upper()} is nearer to the original: {values}, {error}; {far} is farther{ratio}"


def _most_lines(compared: Comparison) -> list[str]:
    """Return the block, tensor and codebook whose values have the largest ratio."""
    kinds = (
        ("block, local error", compared.blocks),
        ("tensor, relative error", compared.tensors),
        ("agent's codebook, KL", compared.codebooks),
    )
    first = [(kind, rows.most_different[0]) for kind, rows in kinds if rows.most_different]
    if not first:
        return ["what differs most: nothing"]
    width = max(len(kind) for kind, _ in first)
    return ["what differs most:"] + [
        f"  {kind:<{width}}  {pair.name}: {short(pair.a)} (A), {short(pair.b)} (B){_times(pair)}"
        for kind, pair in first
    ]


def _times(pair: Pair) -> str:
    """Return how many times the larger value is the smaller one."""
    if not pair.a or not pair.b:
        return ""
    return f": {short(max(pair.a, pair.b) / min(pair.a, pair.b))} times"
