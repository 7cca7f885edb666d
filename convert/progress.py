"""The progress that every long step shows: a bar on a terminal, elsewhere lines, where it takes long.

A step that takes less than some seconds prints nothing where standard error is no terminal.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

ANNOUNCED_AFTER = 5.0  # seconds of a step that is not watched
_BETWEEN = 60.0  # seconds between two lines on such a step
_TICK = 1.0  # seconds between two looks at a step that does not move
_BARS = 10  # columns at least: a shorter bar shows too little


def duration(seconds: float) -> str:
    """Return a time as people say it, two digits at most."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    if seconds < 99.5 * 60:
        return f"{round(seconds / 60)} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 9.95 else f"{round(hours)} h"


def watched() -> bool:
    """Tell whether somebody may look at progress: standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


class Estimate:
    """How long the rest takes, by the speed of the last half of the time; None as long as that is a guess."""

    _LEAST, _SHARE = 3.0, 0.01  # seconds and work, below which nothing is forecast
    _KEPT, _STEADY = 30.0, 256  # seconds that count at least, samples at most

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock; total: of the work."""
        self.total, self.clock = total, clock
        self.samples = [(clock(), 0.0)]

    def add(self, done: float) -> None:
        """Take a sample of how much is done."""
        self.samples.append((self.clock(), done))
        if len(self.samples) > self._STEADY:
            self.samples = self.samples[:1] + self.samples[2:-1:2] + self.samples[-1:]

    def skip(self, done: float) -> None:
        """Count what was done before the start."""
        self.samples = [(when, before + done) for when, before in self.samples]

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.samples[0][0]

    def speed(self) -> float:
        """Return the work a second, of the recent past; 0 before there is any."""
        now, done = self.clock(), self.samples[-1][1]
        since = now - max(self._KEPT, self.elapsed / 2)
        start, before = next((sample for sample in reversed(self.samples) if sample[0] <= since), self.samples[0])
        return (done - before) / (now - start) if now > start else 0.0

    def left(self) -> float | None:
        """Return the seconds that the rest takes, None if too little is done to tell."""
        done, speed = self.samples[-1][1], self.speed()
        begun = self.samples[0][1]
        little = done - begun < self._SHARE * (self.total - begun)
        few = len(self.samples) < 3 or self.elapsed < self._LEAST or little
        return None if few or speed <= 0 else max(0.0, self.total - done) / speed


class Progress(tqdm):  # type: ignore[type-arg]
    """One step's progress. unit: what is counted (``B``, ``frame``), empty for work that has no unit but a share."""

    monitor_interval = 0  # tqdm's own thread redraws after ten seconds; this one's does every second

    def __init__(self, label: str, total: float, unit: str, quiet: bool, announced: bool = False) -> None:
        """Begin a step; quiet: show nothing. announced: whether a line has said already that it begins."""
        seen = watched()
        self.estimate, self.label, self.kind, self.detail = Estimate(total), label, unit, ""
        self.lines = not quiet and not seen and sys.stderr is not None
        self._announced, self._said, self._failed = announced, time.monotonic(), False
        self._closed = threading.Event()
        super().__init__(total=total, desc=label, unit=unit, disable=quiet or not seen, dynamic_ncols=True, miniters=1)
        if self.lines or not self.disable:
            self._ticker = threading.Thread(target=self._tick, name="ppx-progress", daemon=True)
            self._ticker.start()

    def update(self, n: float | None = 1) -> bool | None:
        """Count work that is done."""
        if self.disable:
            self.n += n or 0
            self.estimate.add(self.n)
            return None
        self.estimate.add(self.n + (n or 0))
        return super().update(n)

    def skip(self, done: float) -> None:
        """Count work that an earlier run did: nothing is forecast from it."""
        self.n += done
        self.estimate.skip(done)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Say what is worked at."""
        self.detail = s
        if refresh and not self.disable:
            self.refresh()

    def __str__(self) -> str:
        """The line on a terminal: what fits into its width, the most important first."""
        try:
            columns = os.get_terminal_size(self.fp.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return self.line((columns or 80) - 1)

    def line(self, width: int) -> str:
        """Return the line in so many columns."""
        share, facts = f"{self._share:.0%}".rjust(4), self._facts()
        fits = len(self.label) + 6 <= width
        head = f"{self.label}: {share}" if fits else f"{self.label[: max(0, width - 8)]}.. {share}"
        kept: list[_Fact] = []
        for fact in facts:  # the first ones say most
            if len(head) + sum(len(one) + 2 for one in [*kept, fact]) <= width:
                kept.append(fact)
        tail = "".join(f", {fact}" for fact in sorted(kept, key=lambda fact: fact.place))
        free = width - len(head) - len(tail) - 3
        if free < _BARS:
            return (head + tail)[:width]
        full = int(self._share * min(free, 40))
        return f"{head} [{'#' * full}{'.' * (min(free, 40) - full)}]{tail}"

    @property
    def _share(self) -> float:
        return min(1.0, self.n / self.total) if self.total else 1.0

    def _facts(self) -> list["_Fact"]:
        """Return what can be said of the step, the most important first."""
        left, speed = self.estimate.left(), self.estimate.speed()
        ended = self.total and self.n >= self.total
        facts = [_Fact(3, f"{duration(self.estimate.elapsed)}")] if ended or left is None else []
        facts += [_Fact(3, f"{duration(left)} left")] if left is not None and not ended else []
        facts += [_Fact(1, f"{self.amount(self.n)} of {self.amount(self.estimate.total)}")] if self.kind else []
        facts += [_Fact(2, f"{self.amount(speed)}/s")] if self.kind and speed and self.estimate.elapsed >= 1 else []
        facts += [_Fact(4, self.detail)] if self.detail else []
        return facts

    def amount(self, count: float) -> str:
        """Return an amount with its unit."""
        if self.kind != "B":
            return f"{count:.3g} {self.kind}" if count != int(count) else f"{int(count)} {self.kind}s"
        for unit in ("B", "kB", "MB"):
            if count < 999.5:
                return f"{count:.3g} {unit}"
            count /= 1000
        return f"{count:.2f} GB"

    def _tick(self) -> None:
        """Redraw, or print that work continues, also where none ends for long."""
        while not self._closed.wait(_TICK):
            if not self.lines:
                self.refresh()
            elif not self._announced and self.estimate.elapsed >= ANNOUNCED_AFTER:
                self._announced = True
                self._say(f"{self.label}{f': {self.amount(self.estimate.total)}' if self.kind else ''}")
            elif self._announced and time.monotonic() - self._said >= _BETWEEN:
                left = self.estimate.left()
                more = [self.detail] if self.detail else []
                more += [f"{duration(left)} left"] if left is not None else []
                self._say(", ".join([f"{self.label}: {self._share:.0%}", *more]))

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def __exit__(self, *error: Any) -> None:
        """End the step; one that failed does not say that it is done."""
        self._failed = error[0] is not None
        super().__exit__(*error)

    def close(self) -> None:
        """End the step."""
        ended, waiting = self._closed.is_set(), getattr(self, "_ticker", None)
        self._closed.set()
        if waiting and not ended and waiting is not threading.current_thread():
            waiting.join()
            if self.lines and self._announced and not self._failed:
                self._say(f"{self.label}: done in {duration(self.estimate.elapsed)}")
        super().close()


class _Fact(str):
    """Something on a line, and its place there."""

    place: int

    def __new__(cls, place: int, text: str) -> "_Fact":
        fact = super().__new__(cls, text)
        fact.place = place
        return fact


def byte_bar(label: str, total: int, quiet: bool) -> Progress:
    """Return the progress of a step over bytes; shows nothing if ``quiet``."""
    return bar(label, total, "B", quiet)


def bar(label: str, total: float, unit: str, quiet: bool) -> Progress:
    """Return the progress of a step over anything; bytes (``B``) are shown with their thousands."""
    return Progress(label, total, unit, quiet)


@contextmanager
def long_step(label: str, total: int, unit: str, silent: bool) -> Iterator[Progress]:
    """Show what is being waited for: a bar on a terminal, elsewhere one line on standard error; nothing if silent."""
    lines = not silent and sys.stderr is not None and not watched()
    if lines:
        sys.stderr.write(f"{label}: this can take a minute\n")
        sys.stderr.flush()
    with Progress(label, total, unit, silent, announced=lines) as progress:
        yield progress


@contextmanager
def keeping(describe: Callable[[], str]) -> Iterator[None]:
    """Tell who is interrupted inside, by a note on the exception, what is kept of the work; empty for nothing."""
    try:
        yield
    except Exception:
        raise
    except BaseException as interrupt:
        if kept := describe():
            interrupt.add_note(kept)
        raise
