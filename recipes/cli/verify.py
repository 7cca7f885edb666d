"""ppx-verify: does a bundle still compute what its checkpoint computes?"""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...convert.bundle.manifest import manifest_of
from ...convert.errors import UserError
from ...model.mlx_device import ARITHMETICS
from ...verify import bundle_report, compare_reports
from ...verify.options import VerifyOptions
from . import console, endings, options

EXAMPLES = """\b
Examples:
  ppx-verify my-bundle --reference nvidia/personaplex-7b-v1
      compare a bundle with its checkpoint; see my-bundle/parity/report.html
  ppx-verify my-bundle --reference ./my-finetune \\
      --tokens heldout.safetensors --sequences 24 --frames 200
      compare on recorded conversations
  ppx-verify my-bundle --round-trip question.wav
      answer a recording, and transcribe the answer with a speech recognizer
  ppx-verify my-bundle --reference ./my-finetune --controls 8
      compare with plain rounding at its own bits, and at 8
  ppx-verify my-4bit my-8bit
      print two reports side by side
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted: no report was written")
def verify_bundle(
    bundle: options.Bundle,
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="Print another bundle's report beside it.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Compare with this checkpoint.  [default: the one it was made from, if found]"
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Merge this LoRA into it.  [default: the one that the manifest names, if on the Hub]"),
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="Read evaluation tokens [N, streams, T], in safetensors.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Read a WAV file, a question after the system prompt.")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="Take at most so many sequences, or voices.")] = None,
    frames: Annotated[int | None, typer.Option(min=2, help="Take at most so many frames of each (80 ms).")] = None,
    rollout: Annotated[int, typer.Option(min=0, max=10000, help="Generate so many frames, greedily, on both.")] = 0,
    arithmetic: Annotated[
        options.ArithmeticName | None,
        typer.Option(help=f"Choose the dtype of the bundle's activations.  [default: {ARITHMETICS[0]}]"),
    ] = None,
    controls: options.Controls = None,
    device: options.Device = None,
    round_trip: Annotated[
        Path | None, typer.Option(metavar="QUESTION", help="Answer this recording, transcribe and judge the answer.")
    ] = None,
    recognizer: options.Recognizer = None,
    codec: Annotated[
        Path | None, typer.Option(help="Read Mimi's weights from a file.  [default: the bundle's]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON; errors go to standard error.")
    ] = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Compare a bundle with its checkpoint, layer by layer, and leave a report in BUNDLE/parity.

    Without tokens or audio it reads what every conversation starts with: a few voices, silence, a text prompt, silence.
    --round-trip adds to the report that is there, or makes one first.
    Ends with 0 if the bundle is intact, 1 if it is not, 2 if it could not be compared.
    """
    compared = any((reference, adapter, tokens, audio, sequences, frames, rollout, arithmetic, controls))
    if other is not None:
        if compared or any((device, round_trip, recognizer, codec)):
            raise UserError("two bundles are compared by their reports: leave all options but --json out")
        figures = compare_reports.compare_reports(bundle, other)
        names = (str(bundle), str(other))
        console.show_json(figures.to_json()) if as_json else console.show(compare_reports.text(names, figures))
        return
    if audio and sequences:
        raise UserError("--sequences has no effect with --audio, which is one sequence: leave it out")
    console.one_of({"--tokens": tokens, "--audio": audio})
    if (recognizer or codec) and not round_trip:
        raise UserError("--recognizer and --codec are for --round-trip: give a recording to answer")
    quiet, where, listener = console.quiet(as_json), device and str(device), recognizer and str(recognizer)
    if round_trip:
        bundle_report.check_round_trip(bundle, round_trip, codec, listener)
    more, computed_in = tuple(controls or ()), str(arithmetic or ARITHMETICS[0])
    asked = VerifyOptions(tokens, audio, sequences, frames, rollout, computed_in, where, more)
    manifest_of(bundle)  # what is not a bundle is told first
    report = None if compared or not round_trip else bundle_report.report_of(bundle)
    if report is None:
        report = bundle_report.verify(bundle, reference, adapter=adapter, options=asked, quiet=quiet)
    if round_trip:
        report = bundle_report.add_round_trip(
            bundle, round_trip, report=report, codec=codec, recognizer=listener, device=where, quiet=quiet
        )
    console.show(bundle_report.as_json(report) if as_json else bundle_report.text(report, bundle))
    bundle_report.fail_if_failed(report)


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-verify")


if __name__ == "__main__":
    main()
