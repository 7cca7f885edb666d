"""ppx-verify: does a bundle still compute what its checkpoint computes?"""

import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ...convert import conversion
from ...convert.bundle.manifest import Manifest, manifest_of
from ...convert.bundle.records import SourceRecord
from ...convert.errors import UserError, printable
from ...convert.source import adapter as adapters
from ...convert.source import demo, source
from ...model.mlx_device import ARITHMETICS
from ...verify import compare_reports
from ...verify.options import EMBEDDED, VerifyOptions
from . import console, reporting
from .choices import ArithmeticName, DeviceName, RecognizerName

EXAMPLES = """\b
Examples:
  ppx-verify my-bundle --reference nvidia/personaplex-7b-v1
      compare a bundle with its checkpoint, and write my-bundle/parity/report.html
  ppx-verify my-bundle --reference ./my-finetune --tokens heldout.safetensors --sequences 24 --frames 200
      the same, on recorded conversations
  ppx-verify my-bundle --round-trip question.wav
      let it answer aloud, and have a speech recognizer write down what it hears
  ppx-verify my-4bit my-8bit
      print two reports side by side
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
@partial(console.reported, interrupted="interrupted: the report was not written; the same command begins anew")
def verify_bundle(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that ppx-convert wrote.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="Another bundle or report: print both side by side.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="The checkpoint.  [default: the one it was made from, if found]"),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="The LoRA that was merged.  [default: the one that the manifest names, if on the Hub]"),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="safetensors with tokens [N, streams, T] to read, as heard.")
    ] = None,
    audio: Annotated[Path | None, typer.Option(help="WAV file to encode with the source's codec and read.")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="At most so many sequences, or voices.")] = None,
    frames: Annotated[int | None, typer.Option(min=2, help="At most so many frames of each (80 ms).")] = None,
    rollout: Annotated[int, typer.Option(min=0, max=10000, help="Also speak so many frames, greedily, on both.")] = 0,
    arithmetic: Annotated[
        ArithmeticName | None, typer.Option(help="Of the bundle's activations.  [default: float32]")
    ] = None,
    device: Annotated[
        DeviceName | None, typer.Option(help="Where to compute.  [default: gpu if MLX has one, else cpu]")
    ] = None,
    round_trip: Annotated[
        Path | None, typer.Option(metavar="QUESTION", help="Recording to answer aloud, and to be understood.")
    ] = None,
    recognizer: Annotated[
        RecognizerName | None, typer.Option(help=f"Who listens to the answer.  [default: {EMBEDDED}]")
    ] = None,
    codec: Annotated[Path | None, typer.Option(help="Mimi's weights for that.  [default: the bundle's]")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON; errors go to standard error.")
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=console.show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compare a bundle with its checkpoint, layer by layer, and leave a report in BUNDLE/parity.

    With nothing at hand it reads what every conversation starts with: a few voices, silence, a text prompt, silence.
    --round-trip adds to the report that is there, or makes one first.
    Ends with 0 if the bundle passes, 1 if it fails, 2 if it could not be compared.
    """
    compared = any((reference, adapter, tokens, audio, sequences, frames, rollout, arithmetic))
    if other is not None:
        if compared or any((device, round_trip, recognizer, codec)):
            raise UserError("two bundles are compared by their reports: leave all options but --json out")
        _print_both(bundle, other, as_json)
        return
    if audio and sequences:
        raise UserError("--sequences says nothing of --audio, which is one: leave it out")
    if tokens and audio:
        raise UserError("--tokens and --audio contradict each other: give one of them")
    listener = str(recognizer or EMBEDDED)
    if round_trip:
        reporting.check_round_trip(bundle, round_trip, codec, listener)
    elif recognizer or codec:
        raise UserError("--recognizer and --codec are for --round-trip: give a recording to answer")
    quiet = console.quiet(as_json)
    asked = VerifyOptions(
        tokens, audio, sequences, frames, rollout, str(arithmetic or ARITHMETICS[0]), device and str(device)
    )
    manifest = manifest_of(bundle)
    found = None if compared else round_trip and reporting.report_of(bundle, manifest)
    if not found:
        found = _compare(bundle, manifest, reference, adapter, asked, quiet)
    if round_trip:
        found = reporting.add_round_trip(found, bundle, round_trip, codec, listener, asked.device, quiet)
    reporting.leave_card(found, bundle)
    console.show(reporting.as_json(found) if as_json else reporting.text(found, bundle))
    reporting.fail_if_failed(found)


def _compare(
    bundle: Path,
    manifest: Manifest,
    reference: str | None,
    adapter: str | None,
    asked: VerifyOptions,
    quiet: bool,
) -> dict[str, Any]:
    """Compare a bundle with its checkpoint; leave the report, and return it."""
    made_from = manifest.source
    location = source.locate(*_reference(bundle, reference, made_from), quiet=quiet)
    merged = _adapter(bundle, adapter, made_from)
    with conversion.open_merged(location, merged, bool(made_from.copied_steps), quiet=quiet) as opened:
        _check_adapter(opened, made_from)
        steps = conversion.trimmed(opened, manifest.architecture.steps)
        return reporting.leave_report(steps, bundle, asked, _command(bundle, reference, merged, asked), quiet)


def _reference(bundle: Path, named: str | None, made_from: SourceRecord) -> tuple[str, str | None]:
    """Return the source to compare with, and its commit: the one that is named, else the one it was made from."""
    identity = named or made_from.id
    if identity == made_from.id and source.is_hub_id(identity):
        commit = made_from.revision
        return identity, commit if commit and re.fullmatch("[0-9a-f]{40}", commit) else None
    if named or identity in demo.SIZES:
        return identity, None
    raise UserError(f"{bundle}: was made from a folder called {identity}: give it as --reference")


def _adapter(bundle: Path, named: str | None, made_from: SourceRecord) -> str | None:
    """Return the adapter to merge into the reference, None for a bundle that has none."""
    recorded = made_from.adapter
    if not recorded:
        if named:
            raise UserError(f"{bundle}: was made without an adapter: leave --adapter out")
        return None
    if named or recorded.revision:
        return named or f"{recorded.id}@{recorded.revision}"
    raise UserError(f"{bundle}: an adapter was merged into it ({recorded.id}): give its file as --adapter")


def _check_adapter(opened: source.Source, made_from: SourceRecord) -> None:
    used, recorded = opened.adapter, made_from.adapter
    if used is None or recorded is None:
        return
    if (used.sha256, used.rank, used.scaling) != (recorded.sha256, recorded.rank, recorded.scaling):
        raise UserError(f"{used.id}: not the adapter that was merged ({recorded.id}): give that one as --adapter")


def _command(bundle: Path, reference: str | None, adapter: str | None, asked: VerifyOptions) -> str:
    """Return the command that runs a verification again; folders are named without what is above them."""
    words = ["ppx-verify", bundle.resolve().name]
    if reference:
        words += ["--reference", reference if source.is_hub_id(reference) else Path(reference).name]
    if adapter:
        words += ["--adapter", adapters.named(adapter)]
    for option, path in (("--tokens", asked.tokens), ("--audio", asked.audio)):
        words += [option, path.name] if path else []
    for option, number in (("--sequences", asked.sequences), ("--frames", asked.frames), ("--rollout", asked.rollout)):
        words += [option, str(number)] if number else []
    words += ["--arithmetic", asked.arithmetic] if asked.arithmetic != ARITHMETICS[0] else []
    words += ["--device", asked.device] if asked.device else []
    return printable(shlex.join(words))


def _print_both(first: Path, second: Path, as_json: bool) -> None:
    found = compare_reports.compare_reports(first, second)
    console.show(json.dumps(found, indent=1) if as_json else compare_reports.text((str(first), str(second)), found))


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-verify")


if __name__ == "__main__":
    main()
