"""What ppx-verify does with two bundles: their reports side by side, or a page for a blind comparison by ear."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ...convert.bundle.describe import counted, size
from ...convert.bundle.location import locate_bundle
from ...convert.errors import UserError
from ...model.prompt import VOICE
from ...verify import compare_reports
from ...verify.listening import PAGE, ListenOptions, listen
from . import console

_DEFAULT = ListenOptions()

Listen = Annotated[
    list[Path] | None,
    typer.Option(metavar="QUESTION", help="Let both bundles answer this recording, for a blind page. Repeatable."),
]
Pairs = Annotated[
    int | None, typer.Option(help=f"Make so many pairs of answers, with --listen.  [default: {_DEFAULT.pairs}]")
]
Seed = Annotated[
    int | None, typer.Option(min=0, help=f"Begin sampling with it, with --listen.  [default: {_DEFAULT.seed}]")
]
Voice = Annotated[str | None, typer.Option(help=f"Speak with this voice of both, with --listen.  [default: {VOICE}]")]
Prompt = Annotated[
    str | None, typer.Option(help="Give both a role, as a text prompt, with --listen.  [default: ppx-speak's]")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="PAGE", help=f"Write this file, with --listen.  [default: {PAGE}]"),
]


@dataclass(frozen=True)
class Listening:
    """What is asked of a page."""

    questions: list[Path]
    output: Path
    options: ListenOptions


def listening(
    questions: list[Path] | None,
    pairs: int | None,
    seed: int | None,
    voice: str | None,
    prompt: str | None,
    output: Path | None,
    codec: Path | None,
    device: object | None,
) -> Listening | None:
    """Return what is asked of a page, None if none is; raises UserError for options that have no effect without."""
    chosen: dict[str, Any] = {"pairs": pairs, "seed": seed, "voice": voice, "prompt": prompt}
    if not questions:
        for name, value in (chosen | {"output": output}).items():
            if value is not None:
                raise UserError(f"--{name} needs --listen: give a recording that two bundles answer")
        return None
    given = {name: value for name, value in chosen.items() if value is not None}
    given |= {"codec": codec, "device": device and str(device)}
    return Listening(questions, output or Path(PAGE), ListenOptions(**given))


def run(
    where: str, other: str | None, revision: str | None, asked: Listening | None, unused: bool, as_json: bool
) -> None:
    """Compare two bundles, folders or Hub ids; unused: whether options are given that have no effect on that."""
    if other is None:
        raise UserError("--listen compares two bundles: give the other one as well")
    if unused and not asked:
        raise UserError("two bundles are compared by their reports: leave all options but --json out")
    if unused:
        raise UserError(
            "--listen takes --pairs, --seed, --voice, --prompt, --output, --codec and --device: leave the others out"
        )
    quiet = console.quiet(as_json)
    bundles = (locate_bundle(where, revision, quiet), locate_bundle(other, quiet=quiet))
    if asked:
        _listen(bundles, (where, other), asked, as_json)
        return
    figures = compare_reports.compare_reports(*bundles)
    console.show_json(figures.to_json()) if as_json else console.show(compare_reports.text((where, other), figures))


def _listen(bundles: tuple[Path, Path], names: tuple[str, str], asked: Listening, as_json: bool) -> None:
    """Write a page, and say where it is and how to use it."""
    options = asked.options
    if not as_json:
        recordings = ", ".join(file.name for file in asked.questions)
        pairs = counted(options.pairs, "pair")
        console.say(f"{pairs} of answers to {recordings}, by {names[0]} (A) and {names[1]} (B)")
    page = listen(*bundles, asked.questions, asked.output, options, quiet=as_json)
    if as_json:
        console.show_json(asdict(page) | {"output": str(page.output)})
        return
    console.show(f"{page.output}: {counted(page.pairs, 'pair')} of {page.seconds:.1f} s, {size(page.nbytes)}, one file")
    if page.equal:
        console.show(f"{page.equal} of the pairs have the same sound by both bundles, sample for sample")
    console.show(f"the key is sealed until the last pair is answered (sha256 {page.seal})")
    console.show(f"open it in a browser: {page.output.resolve().as_uri()}")
