"""ppx-voice: a voice from a recording."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...convert.bundle.destination import check_new_file
from ...convert.errors import UserError
from ...convert.preparation import open_named
from ...convert.source.recorded_voice import SUFFIX, check_voice_name
from ...convert.source.source import DEFAULT
from . import console, endings, options, voice_options

EXAMPLES = f"""\b
Examples:
  ppx-voice {DEFAULT} me.wav --name mine \\
      --consent "I am the speaker, and agree to this use of my voice."
      write mine.safetensors, for ppx-convert --voice and ppx-speak --voice
  ppx-voice ./my-finetune anna.flac -o voices/anna.safetensors \\
      --consent "Anna Example agreed on 28 November 2026."
      make one for another checkpoint: a voice belongs to one
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted: no voice was written")
def voice(
    where: options.Checkpoint,
    recording: Annotated[Path, typer.Argument(metavar="RECORDING", help="Read 0.4 to 60 s of one person.")],
    name: Annotated[str | None, typer.Option(help="Give the voice a name.  [default: the recording's]")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write this file.  [default: NAME.safetensors, here]"),
    ] = None,
    consent: voice_options.NeededConsent = None,
    revision: options.Revision = None,
    adapter: options.Adapter = None,
    fill_depformer_steps: options.FillDepformerSteps = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
    as_json: options.Json = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Make a voice for a checkpoint from a recording of a person who agreed to it.

    Does what the reference does with a voice prompt: 24 kHz, mono, -24 LUFS, the codec's tokens, summed embeddings and
    the last columns of tokens. The consent is stored in the file, and in every bundle that the voice is added to.
    """
    from ...speak import recorded_voices

    if recording.suffix == SUFFIX:
        raise UserError(f"{recording}: a file of tensors: give a recording, such as a WAV")
    name = check_voice_name(recording.stem if name is None else name)
    recorded_voices.check_voice_path(recording, consent)
    file = output or Path(f"{name}{SUFFIX}")
    check_new_file(file, SUFFIX, force)
    quiet = console.quiet(as_json)
    with open_named(where, revision, adapter, fill_depformer_steps, quiet) as source:
        recorded = recorded_voices.record_voice(source, recording, consent or "", name)
    recorded_voices.write_voice(file, recorded)
    frames = len(recorded.voice.embeddings) + 1
    if as_json:
        about = {key: value for key, value in recorded.origin.to_json().items() if key != "tokens"}
        console.show_json({"output": str(file), "frames": frames, **about})
    else:
        console.show(f"{file}: voice {name}, {frames} frames of 80 ms, for {source.location.identity}")


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-voice")


if __name__ == "__main__":
    main()
