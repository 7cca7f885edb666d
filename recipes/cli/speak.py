"""ppx-speak: talk to a bundle."""

import json
import sys
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

from ...convert.bundle.destination import check_new_file
from ...convert.bundle.location import locate_bundle
from ...convert.errors import UserError
from ...model.mlx_device import computing_on
from ...model.prompt import PROMPT
from ...speak import answers
from ...speak.sampling import GREEDY, sampling_in
from ...speak.speaker import SpeakOptions
from . import bundle_argument, console, endings, options, speak_options, voice_options

EXAMPLES = """\b
Examples:
  ppx-speak my-bundle question.wav -o answer.wav
      answer a recording: a WAV of the same length, and the words as they come
  ppx-speak my-bundle question.wav -o answer.wav --voice NATM1 --seed 3 \\
      --prompt "You run a small bakery."
      answer with another voice, in another role
  ppx-speak my-bundle question.wav -o answer.wav --voice me.wav \\
      --consent "I am the speaker, and agree to this."
      answer in a voice of your own; ppx-voice keeps it in a file
  ppx-speak my-bundle --live
      talk to it through microphone and headphones
  ppx-speak me/personaplex-4bit question.wav -o answer.wav
      take a bundle on the Hub, downloaded first
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted: no answer was written")
def speak(
    where: bundle_argument.Bundle,
    question: speak_options.Question = None,
    output: speak_options.Output = None,
    live: speak_options.Live = False,
    voice: speak_options.Voice = None,
    consent: voice_options.SpeakerConsent = None,
    prompt: speak_options.Prompt = PROMPT,
    greedy: speak_options.Greedy = False,
    seed: speak_options.Seed = 0,
    audio_temperature: speak_options.Temperature = None,
    audio_top_k: speak_options.TopK = None,
    text_temperature: speak_options.Temperature = None,
    text_top_k: speak_options.TopK = None,
    revision: bundle_argument.Revision = None,
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
    settings = speak_options.settings(
        greedy,
        audio_temperature=audio_temperature,
        audio_top_k=audio_top_k,
        text_temperature=text_temperature,
        text_top_k=text_top_k,
    )
    voice_options.check_voice(voice, consent)
    if output is not None:
        check_new_file(output, ".wav", force)
    bundle = locate_bundle(where, revision, console.quiet(as_json))
    with computing_on(device and str(device)):
        chosen = GREEDY if greedy else replace(sampling_in(bundle), **settings)
        how = SpeakOptions(voice, prompt, chosen, seed, arithmetic and str(arithmetic), codec, consent)
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
        summary = {"output": str(output), "seconds": done.seconds, "text": done.text, "voice": done.voice or None}
        console.show(json.dumps(summary | {"seed": seed, "took": round(done.took, 3)}, ensure_ascii=False))
    else:
        typer.echo(nl=noise is None)
        console.say(done.line)


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-speak")


if __name__ == "__main__":
    main()
