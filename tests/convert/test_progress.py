"""Progress on terminals of any width, and where nobody watches."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress

import pytest
from ppx.convert import progress
from ppx.convert.progress import Estimate, Progress, keeping


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_forecast_before_there_is_some_work():
    clock = Clock()
    estimate = Estimate(1000, clock)
    assert estimate.left() is None
    clock.now += 60
    assert estimate.left() is None  # nothing is done
    estimate.add(2)
    assert estimate.left() is None  # one piece, and less than a hundredth
    estimate.add(20)
    assert estimate.left() == pytest.approx(60 / 20 * 980)
    early = Estimate(1000, clock)
    for _ in range(5):
        early.add(500)
    clock.now += 1
    assert early.left() is None  # a second tells nothing


def test_a_forecast_follows_the_speed_and_grows_while_nothing_moves():
    clock = Clock()
    estimate = Estimate(10_000, clock)
    for second in range(1, 101):
        clock.now += 1
        estimate.add(10 * second)
    assert estimate.left() == pytest.approx(900, rel=0.01)
    for second in range(1, 101):  # ten times as fast
        clock.now += 1
        estimate.add(1000 + 80 * second)
    assert estimate.left() == pytest.approx(1000 / 80, rel=0.05)
    before = estimate.left()
    clock.now += 50
    later = estimate.left()
    assert before
    assert later
    assert later > 1.3 * before
    clock.now += 1000
    assert estimate.left() is None
    assert len(estimate.samples) <= 257


def test_what_an_earlier_run_did_is_no_speed():
    clock = Clock()
    estimate = Estimate(1000, clock)
    estimate.skip(900)
    for _ in range(10):
        clock.now += 1
        estimate.add(estimate.samples[-1][1] + 1)
    assert estimate.speed() == pytest.approx(1)
    assert estimate.left() == pytest.approx(90)


@pytest.mark.parametrize("width", [12, 20, 39, 60, 79, 120, 200])
def test_lines_fit_and_say_the_most_important(width, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("checking source", 16_700_000_000, "B", quiet=True) as step:
        step.estimate = Estimate(16_700_000_000, clock)
        for _ in range(4):
            clock.now += 10
            step.update(1_000_000_000)
        step.set_postfix_str("model.safetensors")
        line = step.line(width)
    assert len(line) <= width
    assert "24%" in line
    if width >= 39:
        assert "2 min left" in line
    if width >= 79:
        assert "4.00 GB of 16.70 GB, 100 MB/s, 2 min left" in line


SCRIPT = """
import sys, time
from ppx.convert.progress import bar
with bar("measuring the sensitivities of all parts", 50, "block", False) as progress:
    for _ in range(50):
        time.sleep(0.02)
        progress.update(1)
"""


@pytest.mark.parametrize("columns", [40, 23])
def test_a_narrow_terminal_does_not_wrap(columns):
    """What is drawn between two carriage returns is narrower than the terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=slave)
    os.close(slave)
    drawn = b""
    while True:
        try:
            block = os.read(master, 4096)
        except OSError:  # the other side was closed
            break
        if not block:
            break
        drawn += block
    assert process.wait() == 0
    os.close(master)
    lines = [line for line in re.split(r"[\r\n]+", drawn.decode()) if line]
    assert len(lines) > 5
    assert max(map(len, lines)) < columns
    assert "100%" in lines[-1]
    assert "\x1b" not in drawn.decode()


def test_a_long_step_says_what_it_is_while_nothing_ends(monkeypatch, capsys):
    monkeypatch.setattr(progress, "ANNOUNCED_AFTER", 0.05)
    monkeypatch.setattr(progress, "_TICK", 0.02)
    monkeypatch.setattr(progress, "_BETWEEN", 0.2)
    with progress.bar("hashing", 5_000_000, "B", False) as step:
        time.sleep(0.15)
        assert capsys.readouterr().err == "hashing: 5 MB\n"
        step.update(1_000_000)
        time.sleep(0.4)
        assert capsys.readouterr().err.splitlines()[0] == "hashing: 20%"
    assert capsys.readouterr().err == "hashing: done in 1 s\n"


def test_a_short_a_quiet_and_a_failed_step_say_nothing_more(monkeypatch, capsys):
    with progress.bar("short", 5, "frame", False) as step:
        step.update(5)
    monkeypatch.setattr(progress, "ANNOUNCED_AFTER", 0.01)
    monkeypatch.setattr(progress, "_TICK", 0.01)
    with progress.bar("quiet", 5, "frame", True):
        time.sleep(0.1)
    with suppress(ValueError), progress.bar("failing", 5, "frame", False):
        time.sleep(0.1)
        raise ValueError("broken")
    assert capsys.readouterr().err == "failing: 5 frames\n"


def test_an_interrupt_takes_along_what_is_kept():
    with pytest.raises(KeyboardInterrupt) as caught, keeping(lambda: "7 of 152 matrices are kept"):
        raise KeyboardInterrupt
    assert caught.value.__notes__ == ["7 of 152 matrices are kept"]
    with pytest.raises(KeyboardInterrupt) as nothing, keeping(str):
        raise KeyboardInterrupt
    assert not hasattr(nothing.value, "__notes__")
    with pytest.raises(ValueError, match="other") as other, keeping(lambda: "all"):
        raise ValueError("other")
    assert not hasattr(other.value, "__notes__")
