"""ppx-calibrate: recordings and token files into one file of calibration tokens."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...calibrate import calibration
from ...convert.errors import UserError
from ...model.tokens import CALIBRATION_FRAMES, CALIBRATION_SESSIONS
from . import console, endings, options

EXAMPLES = """\b
Examples:
  ppx-calibrate nvidia/personaplex-7b-v1 -o mine.safetensors \\
      --audio monday.wav --audio tuesday.wav
      encode recordings: first channel the agent, second the user
  ppx-calibrate ./my-finetune -o own.safetensors
      let the model generate conversations itself
  ppx-calibrate ./my-finetune -o mine.safetensors \\
      --tokens a.safetensors --tokens b.safetensors
      join token files
  ppx-convert ./my-finetune --method gptq --tokens mine.safetensors
      convert with what was written
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted: nothing was written")
def calibrate(
    where: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the file NAME.safetensors.")],
    tokens: Annotated[
        list[Path] | None,
        typer.Option("--tokens", "--calibration", help="Join calibration tokens [N, streams, T]. Repeatable."),
    ] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="Encode a WAV. Repeatable.")] = None,
    sessions: Annotated[
        int | None,
        typer.Option(min=1, help=f"Generate so many conversations, without files.  [default: {CALIBRATION_SESSIONS}]"),
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="Cut sequences of this length; 12.5 are a second.")
    ] = CALIBRATION_FRAMES,
    revision: options.Revision = None,
    adapter: options.Adapter = None,
    fill_depformer_steps: options.FillDepformerSteps = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: options.Json = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Gather calibration tokens, conversations to quantize by, and tell whether they are enough.

    Without files, the model generates them: sessions in which it predicts both sides, half of them after a voice and a
    text prompt. ppx-convert --method gptq does the same where no --tokens are given.
    """
    if sessions and (tokens or audio):
        raise UserError("--sessions is for self-generated conversations: leave it out, or --tokens and --audio")
    statistics = calibration.calibrate(
        where,
        output,
        tokens=tokens or (),
        audio=audio or (),
        sessions=sessions,
        frames=frames,
        revision=revision,
        adapter=adapter,
        fill_depformer_steps=fill_depformer_steps,
        force=force,
        quiet=console.quiet(as_json),
    )
    if as_json:
        console.show_json(asdict(statistics) | {"file": str(output)})
    else:
        console.show(calibration.text(statistics, output))
    for line in calibration.advice(statistics):
        console.say(line)


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-calibrate")


if __name__ == "__main__":
    main()
