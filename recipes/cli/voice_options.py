"""Options for voices that are made from recordings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ...convert.conversion import VoicesOf
from ...convert.errors import UserError
from ...convert.source.recorded_voice import SUFFIX
from ...speak.recorded_voices import check_voice_path, is_path, voices_for
from . import console

AddedVoices = Annotated[
    list[Path] | None,
    typer.Option("--voice", metavar="FILE", help="Make a voice of a recording, or take one of ppx-voice. Repeatable."),
]
Consent = Annotated[
    str | None,
    typer.Option(metavar="WORDS", help="Say who agreed to what, for a recording. It is stored and published."),
]
NeededConsent = Annotated[
    str | None,
    typer.Option(metavar="WORDS", help="Say who agreed to what. It is stored and published.  [required]"),
]
SpeakerConsent = Annotated[str | None, typer.Option(metavar="WORDS", help="Say who agreed to what, for a recording.")]


def added(paths: Sequence[Path] | None, consent: str | None, dry_run: bool = False) -> VoicesOf:
    """Return what makes the voices that are added to a source's; says that a dry run plans without them."""
    voices = voices_for(paths or (), consent)
    if consent is not None and all(path.suffix == SUFFIX for path in paths or ()):
        raise UserError("--consent is for a recording: a file of ppx-voice has its own, so leave it out")
    if paths and dry_run:
        console.say(f"{', '.join(map(str, paths))}: not in this plan: a dry run makes no voices")
    return voices


def check_voice(voice: str | None, consent: str | None) -> None:
    """Raise UserError for a voice of a file that is not there, and for consent that is missing or has no effect."""
    path = Path(voice) if voice and is_path(voice) else None
    if path:
        check_voice_path(path, consent)
    if consent is not None and (path is None or path.suffix == SUFFIX):
        raise UserError("--consent is for a recording: leave it out")
