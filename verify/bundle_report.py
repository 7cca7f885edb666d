"""Verifying a bundle as a whole: compare it, write report and model card into it, and show the result."""

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..convert.bundle.describe import counted
from ..convert.bundle.location import published_as
from ..convert.bundle.manifest import manifest_of, read_manifest
from ..convert.bundle.workspace import write_durably
from ..convert.errors import CheckFailed, UserError
from ..convert.preparation import open_merged, trimmed
from ..convert.source.source import Source, locate
from ..model.kernel_test import workarounds
from ..model.tokens import SYSTEM_PROMPT
from . import headline
from . import report as reports
from .options import EMBEDDED, VerifyOptions
from .provenance import adapter_of, check_adapter, command_of, reference_of
from .publishing import card
from .records import Report, RoundTrip, Verdict

_SHOWN = 3  # reasons that are printed; the report has them all


def report_home(bundle: Path) -> Path:
    """Return the folder for a bundle's report: its own, or ``USER--NAME`` here for one in the Hub's cache."""
    published = published_as(bundle)
    return Path(published[0].replace("/", "--")) if published else bundle


def reported(bundle: Path) -> Path:
    """Return what has a bundle's report: the bundle, or a file here for one in the Hub's cache."""
    file = report_home(bundle) / reports.FOLDER / reports.JSON
    return file if file.is_file() else bundle


def _check_writable(bundle: Path) -> None:
    home = report_home(bundle)
    if home != bundle and not home.exists():
        home.mkdir()
    if not os.access(home, os.W_OK) and home.is_dir():
        why = "the report goes into it, so copy the bundle to where you can write"
        raise UserError(f"{home}: not writable: {why if home == bundle else 'run it where you can write'}")


def verify(
    bundle: str | Path,
    reference: str | Path | Source | None = None,
    *,
    adapter: str | None = None,
    options: VerifyOptions | None = None,
    same_source: bool = False,
    keep: bool = False,
    quiet: bool = True,
) -> Report:
    """Compare a bundle with its checkpoint; write the report and the card into it, and return the report.

    Example::

        report = verify("my-bundle", "demo")
        report.verdict.passed

    reference: a Hub id, a folder, ``demo``, or an open source; the checkpoint it was made from if that can be found.
    adapter: the LoRA that was merged, if it cannot be found. options: what to read. same_source: whether an open source
    is known to be the one that the bundle was made from, which is checked otherwise. keep: whether a report of this
    bundle stays that calls it intact on tokens or audio that somebody chose. Raises UserError for what cannot
    be compared; a bundle that does not pass is in the report's verdict.
    """
    folder, options = Path(bundle), options or VerifyOptions()
    manifest = manifest_of(folder)
    made_from, steps = manifest.source, manifest.architecture.steps
    if keep and (kept := _chosen_report_of(folder)):
        return kept
    if isinstance(reference, Source):
        command = command_of(folder, reference.location.identity, adapter, options)
        report = _leave_report(trimmed(reference, steps), folder, options, command, same_source, quiet)
    else:
        named = None if reference is None else str(reference)
        location = locate(*reference_of(folder, named, made_from), quiet=quiet)
        merged = adapter_of(folder, adapter, made_from)
        with open_merged(location, merged, bool(made_from.copied_steps), quiet=quiet) as opened:
            check_adapter(opened, made_from)
            command = command_of(folder, named, merged, options)
            report = _leave_report(trimmed(opened, steps), folder, options, command, False, quiet)
    write_card(folder, report)
    return report


def _leave_report(
    source: Source, bundle: Path, options: VerifyOptions, command: str, same_source: bool, quiet: bool
) -> Report:
    """Compare a bundle with an open source, write its report beside it, and return it."""
    _check_writable(bundle)
    from .verification import (
        verify as compare_with,  # imports torch and mlx: seconds that a program's help does not need
    )

    report = reports.finish(compare_with(source, bundle, options, command, quiet, same_source))
    reports.write(report, report_home(bundle))
    return report


def report_of(bundle: Path) -> Report | None:
    """Return the report that a bundle has, None if it has none, or one of other files."""
    manifest, where = manifest_of(bundle), reported(bundle)
    if where == bundle and not (bundle / reports.FOLDER / reports.JSON).is_file():
        return None
    report = reports.read(where)
    return report if report.is_about(manifest) else None


def _chosen_report_of(bundle: Path) -> Report | None:
    """Return a bundle's report if it is intact by it, on tokens or audio that somebody chose; None for any other."""
    with suppress(UserError):  # a report that cannot be read proves nothing
        report = report_of(bundle)
        if report and report.verdict.passed and report.tokens.kind != SYSTEM_PROMPT:
            return report
    return None


def check_round_trip(bundle: Path, question: Path, codec: Path | None = None, recognizer: str | None = None) -> None:
    """Raise UserError for what a round trip would end with, before anything that takes long."""
    from . import round_trip

    _check_writable(bundle)
    round_trip.check(bundle, question, codec, recognizer or EMBEDDED)


def add_round_trip(
    bundle: str | Path,
    question: str | Path,
    *,
    report: Report | None = None,
    codec: Path | None = None,
    recognizer: str | None = None,
    device: str | None = None,
    quiet: bool = True,
) -> Report:
    """Let a bundle answer a recording, judge the answer by a speech recognizer, and add that to its report.

    report: the bundle's, read from it if it is not given. codec: Mimi's weights, None for the bundle's. recognizer: one
    of ``options.RECOGNIZERS``. device: None for MLX's choice. Report and card are written again; returns the report.
    """
    from ..model.mlx_device import computing_on
    from ..speak.speaker import SpeakOptions
    from . import round_trip

    folder = Path(bundle)
    before = report or reports.read(reported(folder))
    with computing_on(device):
        spoken = round_trip.run(folder, Path(question), SpeakOptions(codec=codec), recognizer or EMBEDDED, quiet)
    failures = [failure for failure in before.verdict.failures if failure.check != round_trip.CHECK]
    failures += round_trip.failures(spoken.answer, spoken.question.word_error_rate)
    verdict = Verdict(passed=not failures, failures=tuple(failures))
    finished = reports.finish(replace(before, round_trip=spoken, verdict=verdict))
    reports.write(finished, report_home(folder))
    write_card(folder, finished)
    return finished


def as_json(report: Report) -> str:
    """Return a report for a program to read, without the audio that its page plays."""
    data = report.to_json()
    if data["round_trip"]:
        del data["round_trip"]["audio"]
    return json.dumps(data, indent=1)


def write_card(bundle: str | Path, report: Report | None = None) -> None:
    """Write a bundle's model card; report: None for the one that the bundle has, if any.

    A bundle in the Hub's cache keeps the card that was published with it.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    if manifest is not None and not published_as(folder):
        with suppress(UserError):  # a report that cannot be read proves nothing
            report = report or report_of(folder)
        for name, content in card.files(manifest, report).items():
            write_durably(folder / name, content)


def text(report: Report, bundle: Path) -> str:
    """Return what a verification prints for people."""
    verdict, tokens = headline.verdict(report).lower(), report.tokens
    page, published = report_home(bundle) / reports.FOLDER / reports.HTML, published_as(bundle)
    name = published[0] if published else bundle
    sequences = counted(tokens.sequences, "sequence")
    if not report.predictions:
        return f"{name} is {verdict}: nothing was computed, it could not be read\nreport: {page}"
    lines = [headline.headline(report)]
    lines.append(f"{name} is {verdict}: {sequences} of {tokens.frames} frames, {tokens.kind}")
    if tokens.kind == SYSTEM_PROMPT:
        lines.append("limits are wide for a system prompt: recorded conversations give a sharper verdict")
    lines.append(f"{'':<41}{'bundle':>8}  {'plain':>8}  {'limit':>8}  {'noise floor':>11}")
    for row in reports.figures(report):
        bound = f"{row.sign} {reports.short(row.bound)}"
        plain = reports.short(row.control)
        values = f"{reports.short(row.bundle):>8}  {plain:>8}  {bound:>8}  {reports.short(row.noise):>11}"
        lines.append(f"{row.name:<41}{values}{'' if row.passed else '  fails'}")
    if replaced := workarounds(report.kernels):
        mlx = f"MLX {report.ran_on.libraries.get('mlx')} on {report.ran_on.device.mlx}"
        lines.append(
            f"{mlx} computes quantized_matmul wrongly; dequantized and multiplied instead: {'; '.join(replaced)}"
        )
    if session := report.rollout:
        first = session.first_difference
        where = f"the first difference is at frame {first.frame} ({first.stream})" if first else "no difference"
        share = f"{session.agreement_agent:.0%} of the agent's tokens agree"
        lines.append(f"a greedy session of {session.frames} frames on both: {where}; {share}")
    if report.round_trip:
        lines += _round_trip(report.round_trip)
    lines.append(f"report: {page}")
    return "\n".join(lines)


def _round_trip(spoken: RoundTrip) -> list[str]:
    """Return what is printed of a round trip."""
    answer, floor = spoken.answer, spoken.question.word_error_rate
    wrong = answer.word_error_rate
    line = "too few words to compare" if wrong is None else f"{wrong:.0%} of the words differ"
    if floor is None or floor > spoken.limits.floor:
        line += f"; not judged by its words: {spoken.recognizer} does not understand the question through the codec"
    else:
        line += f" (of the question through the codec alone: {floor:.0%})"
    return [
        f"round trip: {answer.seconds:.1f} s, {answer.silent:.0%} of it silent; transcribed by {spoken.recognizer}",
        f"  text        {answer.text or '(nothing)'}",
        f"  transcript  {answer.transcript or '(nothing)'}",
        f"  {line}",
    ]


def fail_if_failed(report: Report) -> None:
    """Raise CheckFailed with the reasons why a report does not pass."""
    failures = report.verdict.failures
    if failures:
        more = f"; and {len(failures) - _SHOWN} more, in the report" if len(failures) > _SHOWN else ""
        raise CheckFailed("; ".join(failure.message for failure in failures[:_SHOWN]) + more)
