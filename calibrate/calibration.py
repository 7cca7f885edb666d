"""Making a file of calibration tokens: recordings, token files, or what the model generates itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..convert.bundle.destination import check_new_file
from ..convert.errors import UserError
from ..convert.preparation import open_named
from ..convert.progress import duration
from ..model.tokens import CALIBRATION_FRAMES, SELF_GENERATED

if TYPE_CHECKING:
    from .dataset import Statistics


def calibrate(
    source: str | Path,
    output: str | Path,
    *,
    tokens: Sequence[str | Path] = (),
    audio: Sequence[str | Path] = (),
    sessions: int | None = None,
    frames: int = CALIBRATION_FRAMES,
    revision: str | None = None,
    adapter: str | None = None,
    fill_depformer_steps: bool = False,
    force: bool = False,
    quiet: bool = True,
) -> "Statistics":
    """Write a file of calibration tokens; return how much it holds, and how much of the vocabulary it uses.

    source: the checkpoint, a Hub id, a folder or ``demo``. output: the file, NAME.safetensors. tokens, audio: token
    files ``[N, streams, T]`` and WAV files to join; without any, the model generates sessions itself. sessions: how
    many of these; None for as many as a conversion generates. frames: length of a sequence, 12.5 are a second. force:
    replace the file. Sessions are kept as they come: a run that was killed resumes behind them. Raises UserError for
    what the user can correct.
    """
    path = Path(output)
    if sessions and (tokens or audio):
        raise UserError("sessions is for self-generated tokens: leave it out, or the token files and recordings")
    check_new_file(path, ".safetensors", force)
    from . import dataset, self_generated  # imports torch: seconds that a mistake above does not need

    with open_named(str(source), revision, adapter, fill_depformer_steps, quiet) as opened:
        metadata, unfinished = None, None
        if tokens or audio:
            gathered = dataset.gather(opened, [Path(file) for file in tokens], [Path(file) for file in audio], frames)
        else:
            unfinished = self_generated.unfinished_of(path)
            mark = self_generated.mark_of(opened, sessions, frames, quiet)
            kept = self_generated.KeptSessions(unfinished, mark)
            gathered = self_generated.generate(opened, frames, sessions, quiet, kept)
            metadata = {"kind": SELF_GENERATED}
        statistics = dataset.statistics(gathered, opened)
    dataset.write(gathered, path, metadata)
    if unfinished:
        unfinished.unlink(missing_ok=True)
    return statistics


def text(statistics: "Statistics", path: Path) -> str:
    """Return what is printed of a file of calibration tokens."""
    of_text, *codebooks = statistics.coverage
    return (
        f"{path}: {statistics.sequences} sequences, {statistics.frames} frames ({duration(statistics.frames / 12.5)})\n"
        f"of the text's tokens {of_text:.0%} occur, of the codebooks' {min(codebooks):.0%} to {max(codebooks):.0%}"
    )


def advice(statistics: "Statistics") -> list[str]:
    """Return what should be better about a file of calibration tokens, one line each."""
    lines = [f"{statistics.alike} sequences are the same as another"] if statistics.alike else []
    if statistics.frames < statistics.enough:
        lines.append(f"scarce: {statistics.enough} frames ({duration(statistics.enough / 12.5)}) or more are better")
    return lines
