"""Options of a conversation."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ...convert.errors import UserError
from ...model.prompt import VOICE

Voice = Annotated[
    str | None,
    typer.Option(help=f"Speak with one of the bundle's, a recording, or a file of ppx-voice.  [default: {VOICE}]"),
]
Question = Annotated[
    Path | None, typer.Argument(metavar="[QUESTION]", help="Answer this recording, of any sample rate.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="ANSWER", help="Write this WAV file.")]
Live = Annotated[bool, typer.Option("--live", help="Use microphone and speaker instead, until Ctrl-C.")]
Prompt = Annotated[str, typer.Option(help="Give it a role, as a text prompt.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the top-1 token always.")]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Begin sampling with it.")]
_SETTING = typer.Option(min=0, help="Sample with it.  [default: the bundle's]")
Temperature = Annotated[float | None, _SETTING]
TopK = Annotated[int | None, _SETTING]


def settings(greedy: bool, **chosen: float | None) -> dict[str, Any]:
    """Return the settings of sampling that are given; raises UserError for any beside greedy."""
    given = {name: value for name, value in chosen.items() if value is not None}
    if greedy and given:
        raise UserError("--greedy takes the top-1 token: leave temperatures and top-k out")
    return given
