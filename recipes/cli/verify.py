"""ppx-verify: does a bundle still compute what its checkpoint computes?"""

from functools import partial
from typing import Annotated

import typer

from ...convert.bundle.location import locate_bundle
from ...convert.bundle.manifest import manifest_of
from ...convert.errors import UserError
from ...model.mlx_device import ARITHMETICS
from ...verify import bundle_report
from ...verify.options import VerifyOptions
from . import bundle_argument, console, endings, options, two_bundles, verify_options

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
      say which is nearer to the original, and what differs most
  ppx-verify my-4bit my-8bit --listen question.wav -o listen.html
      make a page on which people compare answers of both by ear, blindly
  ppx-verify me/personaplex-4bit
      take a bundle on the Hub; its report goes into me--personaplex-4bit
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted: no report or page was written")
def verify_bundle(
    where: bundle_argument.Bundle,
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="Compare with another bundle, or a report.")
    ] = None,
    revision: bundle_argument.Revision = None,
    reference: verify_options.Reference = None,
    adapter: verify_options.Adapter = None,
    tokens: verify_options.Tokens = None,
    audio: verify_options.Audio = None,
    sequences: verify_options.Sequences = None,
    frames: verify_options.Frames = None,
    rollout: verify_options.Rollout = 0,
    arithmetic: verify_options.Arithmetic = None,
    controls: options.Controls = None,
    device: options.Device = None,
    round_trip: verify_options.RoundTrip = None,
    recognizer: options.Recognizer = None,
    codec: verify_options.Codec = None,
    listen: two_bundles.Listen = None,
    pairs: two_bundles.Pairs = None,
    seed: two_bundles.Seed = None,
    voice: two_bundles.Voice = None,
    prompt: two_bundles.Prompt = None,
    output: two_bundles.Output = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON; errors go to standard error.")
    ] = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Compare a bundle with its checkpoint, layer by layer, and leave a report in BUNDLE/parity (or USER--NAME/parity).

    Without tokens or audio it reads what every conversation starts with: a few voices, silence, a text prompt, silence.
    --round-trip adds to the report that is there, or makes one first.
    Ends with 0 if the bundle is intact, 1 if it is not, 2 if it could not be compared.
    """
    compared = any((reference, adapter, tokens, audio, sequences, frames, rollout, arithmetic, controls))
    listening = two_bundles.listening(listen, pairs, seed, voice, prompt, output, codec, device)
    if other is not None or listening:
        unused = compared or any((round_trip, recognizer)) or (not listening and (codec or device))
        two_bundles.run(where, other, revision, listening, bool(unused), as_json)
        return
    if audio and sequences:
        raise UserError("--sequences has no effect with --audio, which is one sequence: leave it out")
    console.one_of({"--tokens": tokens, "--audio": audio})
    if (recognizer or codec) and not round_trip:
        raise UserError("--recognizer and --codec are for --round-trip: give a recording to answer")
    computed_on, listener = device and str(device), recognizer and str(recognizer)
    quiet = console.quiet(as_json)
    bundle = locate_bundle(where, revision, quiet)
    if round_trip:
        bundle_report.check_round_trip(bundle, round_trip, codec, listener)
    more, computed_in = tuple(controls or ()), str(arithmetic or ARITHMETICS[0])
    asked = VerifyOptions(tokens, audio, sequences, frames, rollout, computed_in, computed_on, more)
    manifest_of(bundle)  # what is not a bundle is told first
    report = None if compared or not round_trip else bundle_report.report_of(bundle)
    if report is None:
        report = bundle_report.verify(bundle, reference, adapter=adapter, options=asked, quiet=quiet)
    if round_trip:
        report = bundle_report.add_round_trip(
            bundle, round_trip, report=report, codec=codec, recognizer=listener, device=computed_on, quiet=quiet
        )
    console.show(bundle_report.as_json(report) if as_json else bundle_report.text(report, bundle))
    bundle_report.fail_if_failed(report)


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-verify")


if __name__ == "__main__":
    main()
