"""The progress of a sweep: one line that is written again on a terminal, elsewhere one line a cell."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from ...convert.errors import printable
from ...convert.progress import duration
from .cells import Cell
from .jobs import Job
from .work import Outcome

Kind = tuple[str, str]  # of cells that take about as long: their source and methods
_WIDTH = 100  # columns, at most


def kind_of(cell: Cell) -> Kind:
    """Return what the time of a cell depends on most."""
    return cell.source.name, cell.methods


def time_left(left: Sequence[Kind], took: Mapping[Kind, Sequence[float]], side_by_side: int) -> float | None:
    """Return the seconds that cells will take, None while no cell is done.

    left: of what kinds they are. took: seconds of finished cells by kind; those of another kind stand in where there
    are none. side_by_side: cells that run at the same time.
    """
    if not left:
        return 0.0
    every = [seconds for times in took.values() for seconds in times]
    if not every:
        return None
    each = [mean(took.get(kind) or every) for kind in left]
    return max(sum(each) / max(1, min(side_by_side, len(each))), max(each))


@dataclass
class ProgressLine:
    """What is shown while a sweep runs: an open handle on standard error.

    total: cells of this run; before: those that were done by earlier ones.
    """

    left: dict[str, Kind]
    before: int
    took: dict[Kind, list[float]]
    side_by_side: int
    quiet: bool
    done: int = 0
    failed: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def counts(self) -> str:
        """The line itself."""
        total = self.before + self.done + self.failed + len(self.left)
        running = min(self.side_by_side, len(self.left))
        seconds = time_left(list(self.left.values()), self.took, self.side_by_side)
        rest = "unknown until a cell is done" if seconds is None else f"about {duration(seconds)}"
        parts = [f"{self.before + self.done} of {total} cells done", f"{running} running", f"{self.failed} failed"]
        return ", ".join([*parts, f"time left: {rest}"] if self.left else [*parts[::2]])

    def start(self) -> None:
        """Show what is there before any cell ends."""
        self._line(self.counts) if not self._terminal else self.tick()

    def tick(self) -> None:
        """Write the line again on a terminal."""
        if self._terminal and not self.quiet:
            sys.stderr.write(f"\r{self.counts[:_WIDTH]:<{_WIDTH}}")
            sys.stderr.flush()

    def show(self, job: Job, outcome: Outcome) -> None:
        """Count an outcome, and show it."""
        if job.cell is not None:
            self.left.pop(job.work.key)
            if outcome.error is None:
                self.done += 1
                self.took.setdefault(kind_of(job.cell), []).append(outcome.seconds)
            else:
                self.failed += 1
        text = f"failed: {outcome.error}" if outcome.error else f"done in {duration(outcome.seconds)}"
        text = "there already" if outcome.kind == "there" else text
        if outcome.error or not self._terminal:
            self._line(f"{job.label}: {text}" + (f" ({self.counts})" if job.cell else ""))
        self.tick()

    def close(self) -> None:
        """Leave the last line as it is."""
        if self._terminal and not self.quiet:
            sys.stderr.write("\n")

    @property
    def _terminal(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def _line(self, text: str) -> None:
        if not self.quiet and sys.stderr is not None:
            begin = "\r" if self._terminal else ""
            sys.stderr.write(f"{begin}{printable(text):<{_WIDTH if self._terminal else 0}}\n")
            sys.stderr.flush()
