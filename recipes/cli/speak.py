"""ppx-speak: talk to a bundle."""

import json
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ...convert.bundle.manifest import manifest_of
from ...convert.errors import UserError
from ...convert.file_names import CONFIG
from ...convert.progress import bar
from ...convert.source.architecture import read_config
from ...convert.source.mimi import FRAME, RATE
from ...model.prompt import PROMPT, VOICE
from . import console
from .choices import ArithmeticName, DeviceName

if TYPE_CHECKING:
    from ...speak.speaker import Speaker, SpeakOptions

EXAMPLES = """\b
Examples:
  ppx-speak my-bundle question.wav -o answer.wav
      answer a recording: a WAV of the same length, and the words as they come
  ppx-speak my-bundle question.wav -o answer.wav --voice NATM1 --prompt "You run a small bakery." --seed 3
      another voice, another role, another answer
  ppx-speak my-bundle --live
      talk to it through microphone and headphones
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
@partial(console.reported, interrupted="interrupted: no answer was written")
def speak(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that ppx-convert wrote.")],
    question: Annotated[
        Path | None, typer.Argument(metavar="[QUESTION]", help="Recording of what is said to it: any rate.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="ANSWER", help="WAV file to write.")] = None,
    live: Annotated[bool, typer.Option(help="Use microphone and speaker instead, until Ctrl-C.")] = False,
    voice: Annotated[str, typer.Option(help="One of the bundle's voices.")] = VOICE,
    prompt: Annotated[str, typer.Option(help="What it is told to be.")] = PROMPT,
    greedy: Annotated[bool, typer.Option(help="Always take the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Of what is drawn.")] = 0,
    audio_temperature: Annotated[float | None, typer.Option(min=0, help="[default: the bundle's]")] = None,
    audio_top_k: Annotated[int | None, typer.Option(min=0, help="[default: the bundle's]")] = None,
    text_temperature: Annotated[float | None, typer.Option(min=0, help="[default: the bundle's]")] = None,
    text_top_k: Annotated[int | None, typer.Option(min=0, help="[default: the bundle's]")] = None,
    codec: Annotated[Path | None, typer.Option(help="File of Mimi's weights.  [default: the bundle's]")] = None,
    arithmetic: Annotated[
        ArithmeticName | None, typer.Option(help="Of activations.  [default: bundle on a GPU, else float32]")
    ] = None,
    device: Annotated[
        DeviceName | None, typer.Option(help="Where to compute.  [default: gpu if MLX has one, else cpu]")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace ANSWER if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was said as JSON, at the end.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=console.show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Have a full-duplex conversation with a bundle: it hears and speaks at the same time, 80 ms by 80 ms.

    Prints the words that it means to say while it says them. It hears a recording's channels as one.
    """
    if live == (question is not None) or live == (output is not None):
        raise UserError("give a recording and --output, or --live")
    if live and (force or as_json):
        raise UserError("--force and --json are for recordings: leave them out with --live")
    asked: dict[str, Any] = {
        "audio_temperature": audio_temperature,
        "audio_top_k": audio_top_k,
        "text_temperature": text_temperature,
        "text_top_k": text_top_k,
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    if greedy and asked:
        raise UserError("--greedy takes the likeliest token: leave temperatures and top-k out")
    if output is not None:
        console.check_new(output, ".wav", force)
    from ...model.mlx_device import computing_on  # imports mlx: a second that --help does not need
    from ...speak.sampling import GREEDY, sampling_of
    from ...speak.speaker import SpeakOptions

    with computing_on(device and str(device)):
        manifest_of(bundle)  # what is no bundle is told first
        sampling = GREEDY if greedy else replace(sampling_of(read_config(bundle / CONFIG)), **asked)
        options = SpeakOptions(voice, prompt, sampling, seed, arithmetic and str(arithmetic), codec)
        if question is None or output is None:
            _talk(bundle, options)
        else:
            _answer(bundle, options, question, output, as_json)


def _answer(bundle: Path, options: "SpeakOptions", question: Path, output: Path, as_json: bool) -> None:
    """Answer a recording."""
    from ...speak import audio_files
    from ...speak.speaker import open_speaker, text_of

    words: list[str] = []
    shown = not as_json and sys.stdout.isatty()  # words show how far it is
    with audio_files.reading(question) as (count, frames):  # what cannot be read is told before a model is loaded
        speaker = open_speaker(bundle, options, as_json)
        _say_what_is_worked_around(speaker)
        began = time.perf_counter()
        with (
            audio_files.writing(output, count) as write,
            bar("speaking", -(-count // FRAME), "frame", shown or console.quiet(as_json)) as progress,
        ):
            for said in speaker.answer(frames):
                write(said.samples)
                progress.update(1)
                words.append(said.text)
                if not as_json:
                    typer.echo(said.text, nl=False)
    took = time.perf_counter() - began
    if speaker.wrapped:
        console.say(
            f"this model knows {speaker.conversation.runtime.architecture.card} of the codec's tokens: the question's "
            "were taken modulo that"
        )
    seconds = count / RATE
    if as_json:
        found = {"output": str(output), "seconds": seconds, "text": text_of(words), "voice": options.voice}
        console.show(json.dumps(found | {"seed": options.seed, "took": round(took, 3)}, ensure_ascii=False))
    else:
        typer.echo()
        console.say(f"{output}: {seconds:.1f} s of sound, made in {took:.1f} s ({took / seconds:.2f} times real time)")


def _talk(bundle: Path, options: "SpeakOptions") -> None:
    """Talk through the machine's own devices until interrupted."""
    from ...speak import microphone
    from ...speak.speaker import open_speaker

    microphone.check()
    speaker = open_speaker(bundle, options)
    _say_what_is_worked_around(speaker)
    for _ in speaker.answer([np.zeros(FRAME, np.float32)] * 2):  # a moment of silence, in which functions are compiled
        pass
    with microphone.devices() as (frames, play), suppress(KeyboardInterrupt):
        console.say("listening: speak, and end with Ctrl-C (headphones keep it from hearing itself)")
        for said in speaker.answer(frames):
            play(said.samples)
            typer.echo(said.text, nl=False)
    typer.echo()


def _say_what_is_worked_around(speaker: "Speaker") -> None:
    for line in speaker.conversation.runtime.matmul.workarounds():
        console.say(f"MLX computes quantized_matmul wrongly here; worked around: {line}")


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-speak")


if __name__ == "__main__":
    main()
