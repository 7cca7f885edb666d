"""What the programs that verify share: run it, leave the report, say what came of it."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...convert.bundle.manifest import Manifest, read_manifest
from ...convert.bundle.records import files_to_json
from ...convert.bundle.workspace import write_durably
from ...convert.errors import CheckFailed, UserError
from ...convert.source.source import Source
from ...verify import report as reports
from ...verify.options import VerifyOptions
from ...verify.publish import card

_SAID = 3  # reasons that are printed; the report has them all


def _check_writable(bundle: Path) -> None:
    if not os.access(bundle, os.W_OK) and bundle.is_dir():
        raise UserError(f"{bundle}: not writable: the report goes into it, so copy the bundle to where you can write")


def leave_report(
    source: Source, bundle: Path, asked: VerifyOptions, command: str, quiet: bool, same_source: bool = False
) -> dict[str, Any]:
    """Verify a bundle, write its report beside it, and return it."""
    _check_writable(bundle)
    from ...verify.verification import verify  # imports torch and mlx: seconds that --help does not need

    found = reports.finish(verify(source, bundle, asked, command, quiet, same_source))
    reports.write(found, bundle)
    return found


def report_of(bundle: Path, manifest: Manifest) -> dict[str, Any] | None:
    """Return the report that a bundle has, None if it has none, or one of other files."""
    if not (bundle / reports.FOLDER / reports.JSON).is_file():
        return None
    found = reports.read(bundle)
    about = found["bundle"]
    same = about.get("fingerprint") == manifest.fingerprint and about.get("files") == files_to_json(manifest.files)
    return found if same else None


def check_round_trip(bundle: Path, question: Path, codec: Path | None, listener: str) -> None:
    """Raise UserError for what a round trip would end with, before anything that takes long."""
    from ...verify import round_trip

    _check_writable(bundle)
    round_trip.check(bundle, question, codec, listener)


def add_round_trip(
    found: dict[str, Any],
    bundle: Path,
    question: Path,
    codec: Path | None,
    listener: str,
    device: str | None,
    quiet: bool,
) -> dict[str, Any]:
    """Let a bundle answer a recording, add what comes of it to its report, and write that again."""
    from ...model.mlx_device import computing_on
    from ...speak.speaker import SpeakOptions
    from ...verify import round_trip

    with computing_on(device):
        heard = round_trip.run(bundle, question, SpeakOptions(codec=codec), listener, quiet)
    failures = [one for one in found["verdict"]["failures"] if one["check"] != round_trip.CHECK]
    failures += heard.pop("failures")
    verdict = {"passed": not failures, "failures": failures}
    found = reports.finish(found | {"round_trip": heard, "verdict": verdict})
    reports.write(found, bundle)
    return found


def as_json(found: Mapping[str, Any]) -> str:
    """Return a report for a program to read, without the sound that its page plays."""
    heard = found["round_trip"]
    short = dict(found) | {"round_trip": heard and {key: heard[key] for key in heard if key != "audio"}}
    return json.dumps(short, indent=1)


def leave_card(found: Mapping[str, Any] | None, bundle: Path) -> None:
    """Write a bundle's model card; found: its report, None for the one that it has, if any."""
    manifest = read_manifest(bundle)
    if manifest is not None:
        with suppress(UserError):  # a report that cannot be read proves nothing
            found = found or report_of(bundle, manifest)
        for name, content in card.files(manifest, found).items():
            write_durably(bundle / name, content)


def text(found: Mapping[str, Any], bundle: Path) -> str:
    """Return what a verification prints for people."""
    verdict = "passes" if found["verdict"]["passed"] else "fails"
    token_set = found["material"]
    page = bundle / reports.FOLDER / reports.HTML
    sequences = f"{token_set['sequences']} sequence{'s' if token_set['sequences'] > 1 else ''}"
    if not found["predictions"]:
        return f"{bundle} {verdict}: nothing was computed, it could not be read\nreport: {page}"
    lines = [f"{bundle} {verdict} the comparison: {sequences} of {token_set['frames']} frames, {token_set['kind']}"]
    lines.append(f"{'':<41}{'bundle':>8}  {'limit':>8}  {'noise floor':>11}")
    for row in reports.figures(found):
        bound = f"{row['sign']} {reports.short(row['bound'])}"
        values = f"{reports.short(row['bundle']):>8}  {bound:>8}  {reports.short(row['noise']):>11}"
        lines.append(f"{row['name']:<41}{values}{'' if row['passed'] else '  fails'}")
    if replaced := reports.replaced(found):
        mlx = f"MLX {found['ran_on']['libraries']['mlx']} on {found['ran_on']['device']['mlx']}"
        lines.append(
            f"{mlx} computes quantized_matmul wrongly; dequantized and multiplied instead: {'; '.join(replaced)}"
        )
    if found["looser_limits"]:
        lines.append(f"its recipe allows more than is usual for its bits: {', '.join(found['looser_limits'])}")
    if session := found["rollout"]:
        first = session["first_difference"]
        parts = f"parts at frame {first['frame']} ({first['stream']})" if first else "never parts"
        share = f"{session['agreement_agent']:.0%} of the agent's tokens agree"
        lines.append(f"a greedy session of {session['frames']} frames on both: {parts}; {share}")
    if heard := found["round_trip"]:
        lines += _round_trip(heard)
    lines.append(f"report: {page}")
    return "\n".join(lines)


def _round_trip(heard: Mapping[str, Any]) -> list[str]:
    """Return what is printed of a round trip."""
    answer, floor = heard["answer"], heard["question"]["word_error_rate"]
    wrong = answer["word_error_rate"]
    line = "too few words to compare" if wrong is None else f"{wrong:.0%} of the words differ"
    if floor is None or floor > heard["limits"]["floor"]:
        line += f"; not judged by its words: {heard['recognizer']} does not understand the question through the codec"
    else:
        line += f" (of the question through the codec alone: {floor:.0%})"
    return [
        f"round trip: {answer['seconds']:.1f} s, {answer['silent']:.0%} of it silent; heard by {heard['recognizer']}",
        f"  means  {answer['text'] or '(nothing)'}",
        f"  heard  {answer['heard'] or '(nothing)'}",
        f"  {line}",
    ]


def fail_if_failed(found: Mapping[str, Any]) -> None:
    """Raise CheckFailed with the reasons why a report does not pass."""
    failures = found["verdict"]["failures"]
    if failures:
        more = f"; and {len(failures) - _SAID} more, in the report" if len(failures) > _SAID else ""
        raise CheckFailed("; ".join(failure["message"] for failure in failures[:_SAID]) + more)
