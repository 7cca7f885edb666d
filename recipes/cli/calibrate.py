"""ppx-calibrate: recordings and token files into one file of conversations, which a bundle can be quantized by."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...convert.errors import UserError
from ...convert.source import source
from ...model.tokens import CALIBRATION_FRAMES, CALIBRATION_SESSIONS, SELF_GENERATED
from . import console

if TYPE_CHECKING:  # its module imports torch: seconds that --help does not need
    from ...calibrate.dataset import Statistics

EXAMPLES = """\b
Examples:
  ppx-calibrate nvidia/personaplex-7b-v1 --audio monday.wav --audio tuesday.wav -o mine.safetensors
      encode recordings: first channel the agent, second the user
  ppx-calibrate ./my-finetune -o own.safetensors
      let the model speak for itself
  ppx-calibrate ./my-finetune --tokens a.safetensors --tokens b.safetensors -o mine.safetensors
      join token files, and see what they cover
  ppx-convert ./my-finetune --method gptq --calibration mine.safetensors
      what it is for
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
@partial(console.reported, interrupted="interrupted: nothing was written")
def calibrate(
    where: Annotated[str, typer.Argument(metavar="SOURCE", help="The checkpoint: a Hub id, a folder, or demo.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    tokens: Annotated[
        list[Path] | None, typer.Option(help="safetensors with tokens [N, streams, T], as heard; as often as you like.")
    ] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A WAV; as often as you like.")] = None,
    sessions: Annotated[
        int | None,
        typer.Option(min=1, help=f"Of what the model speaks itself, so many.  [default: {CALIBRATION_SESSIONS}]"),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Length of a sequence; 12.5 are a second.")] = CALIBRATION_FRAMES,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; errors go to standard error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=console.show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Gather conversations to quantize by, and say whether they are enough.

    Without any, the model speaks: sessions in which it says both sides, half of them after a voice and a text prompt.
    That is also what ppx-convert --method gptq goes by where no --calibration is given.
    """
    if sessions and (tokens or audio):
        raise UserError("--sessions is for what the model speaks itself: leave it out, or --tokens and --audio")
    console.check_new(output, ".safetensors", force)
    from ...calibrate import dataset, self_generated  # imports torch: seconds that --help does not need

    with source.open_source(source.locate(where, quiet=console.quiet(as_json))) as opened:
        metadata = None
        if tokens or audio:
            gathered = dataset.gather(opened, tokens or [], audio or [], frames)
        else:
            gathered = self_generated.speak(opened, frames, sessions, console.quiet(as_json))
            metadata = {"kind": SELF_GENERATED}
        statistics = dataset.statistics(gathered, opened)
    dataset.write(gathered, output, metadata)
    console.show(
        json.dumps(asdict(statistics) | {"file": str(output)}, indent=1) if as_json else _text(statistics, output)
    )
    if statistics.alike:
        console.say(f"{statistics.alike} sequences are the same as another")
    if statistics.frames < statistics.enough:
        minutes = statistics.enough / 12.5 / 60
        console.say(f"scarce: {statistics.enough} frames ({minutes:.0f} minutes) or more are better")


def _text(statistics: "Statistics", output: Path) -> str:
    text, *codebooks = statistics.coverage
    minutes = statistics.frames / 12.5 / 60
    return (
        f"{output}: {statistics.sequences} sequences, {statistics.frames} frames ({minutes:.0f} minutes)\n"
        f"of the text's tokens {text:.0%} occur, of the codebooks' {min(codebooks):.0%} to {max(codebooks):.0%}"
    )


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-calibrate")


if __name__ == "__main__":
    main()
