"""ppx-speak: talk to a bundle."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ...convert.bundle.destination import check_new_file
from ...convert.errors import UserError
from ...model.mlx_device import computing_on
from ...model.prompt import PROMPT, VOICE
from ...speak import answers
from ...speak.sampling import GREEDY, sampling_in
from ...speak.speaker import SpeakOptions
from . import console, endings, options

EXAMPLES = """\b
Examples:
  ppx-speak my-bundle question.wav -o answer.wav
      answer a recording: a WAV of the same length, and the words as they come
  ppx-speak my-bundle question.wav -o answer.wav --voice NATM1 --seed 3 \\
      --prompt "You run a small bakery."
      answer with another voice, in another role
  ppx-speak my-bundle --live
      talk to it through microphone and headphones
"""
Setting = typer.Option(min=0, help="Sample with it.  [default: the bundle's]")

app = console.application()


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted: no answer was written")
def speak(
    bundle: options.Bundle,
    question: Annotated[
        Path | None, typer.Argument(metavar="[QUESTION]", help="Answer this recording, of any sample rate.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="ANSWER", help="Write this WAV file.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Use microphone and speaker instead, until Ctrl-C.")] = False,
    voice: Annotated[str, typer.Option(help="Speak with one of the bundle's voices.")] = VOICE,
    prompt: Annotated[str, typer.Option(help="Give it a role, as a text prompt.")] = PROMPT,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the top-1 token always.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Begin sampling with it.")] = 0,
    audio_temperature: Annotated[float | None, Setting] = None,
    audio_top_k: Annotated[int | None, Setting] = None,
    text_temperature: Annotated[float | None, Setting] = None,
    text_top_k: Annotated[int | None, Setting] = None,
    codec: options.Codec = None,
    arithmetic: options.Arithmetic = None,
    device: options.Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace ANSWER if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer's text as JSON, at the end.")] = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Have a full-duplex conversation with a bundle: it listens and speaks at the same time, 80 ms by 80 ms.

    Prints its text tokens as words while it speaks. The channels of a recording are mixed into one.
    """
    if live == (question is not None) or live == (output is not None):
        raise UserError("give a recording and --output, or --live")
    if live and (force or as_json):
        raise UserError("--force and --json are for recordings: leave them out with --live")
    settings: dict[str, Any] = {
        "audio_temperature": audio_temperature,
        "audio_top_k": audio_top_k,
        "text_temperature": text_temperature,
        "text_top_k": text_top_k,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    if greedy and settings:
        raise UserError("--greedy takes the top-1 token: leave temperatures and top-k out")
    if output is not None:
        check_new_file(output, ".wav", force)
    with computing_on(device and str(device)):
        sampling = replace(sampling_in(bundle), **settings)
        chosen = GREEDY if greedy else sampling
        how = SpeakOptions(voice, prompt, chosen, seed, arithmetic and str(arithmetic), codec)
        noise = answers.made_of_noise(bundle)
        write = (lambda _: None) if noise else partial(typer.echo, nl=False)
        console.say(noise) if noise and not as_json else None
        if question is None or output is None:
            listening = partial(console.say, "listening: speak, and end with Ctrl-C (headphones avoid an echo)")
            answers.talk(bundle, how, show=write, ready=listening, silent=False)
            typer.echo()
            return
        quiet = not as_json and not noise and sys.stdout.isatty()  # words show how far it is
        done = answers.answer(
            bundle,
            question,
            output,
            how,
            show=(lambda _: None) if as_json else write,
            quiet=quiet or console.quiet(as_json),
            silent=as_json,
        )
    if as_json:
        summary = {"output": str(output), "seconds": done.seconds, "text": done.text, "voice": voice, "seed": seed}
        console.show(json.dumps(summary | {"took": round(done.took, 3)}, ensure_ascii=False))
    else:
        typer.echo(nl=noise is None)
        console.say(done.line)


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-speak")


if __name__ == "__main__":
    main()
