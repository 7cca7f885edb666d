"""Programs behave the same whether they are forked from a server or started afresh, as on macOS."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from program_server import FORKS, Programs
from stopping import Moment, parse

PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
print(sys.argv[1:], os.environ.get("COLOUR"), Path.cwd().name, sys.stdin.read(), sep="|", flush=True)
print("a warning", file=sys.stderr)
if "sleep" in sys.argv:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path("child").write_text(str(child.pid))
    time.sleep(60)
for name in ("one", "two", "three"):
    Path(name).write_text(name)
sys.exit(3 if "fail" in sys.argv else "a reason" if "reason" in sys.argv else None)
"""


@pytest.fixture(
    scope="module", params=[pytest.param(True, marks=pytest.mark.skipif(not FORKS, reason="unsafe")), False]
)
def programs(request: pytest.FixtureRequest) -> Iterator[Programs]:
    usual = Programs({**os.environ, "COLOUR": "usual"}, request.param)
    yield usual
    usual.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(PROGRAM)
    return tmp_path


@pytest.mark.slow
def test_arguments_folder_environment_output_and_status(programs, folder):
    other = {**os.environ, "COLOUR": "red"}
    done = programs.run("toy", ["a b", "fail"], folder, other)
    assert done.returncode == 3
    assert done.stdout == f"['a b', 'fail']|red|{folder.name}|\n"
    assert done.stderr == "a warning\n"
    assert programs.run("toy", [], folder, other).returncode == 0
    assert programs.run("toy", ["reason"], folder, other).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_comes_at_its_moment(programs, folder, number):
    other = {**os.environ, "COLOUR": "red"}
    done = programs.run("toy", [], folder, other, (Moment("open", "two"), number))
    assert done.returncode == (1 if number == signal.SIGINT and programs.forks else -number)
    assert (folder / "one").exists()
    assert not (folder / "three").exists()


@pytest.mark.slow
def test_a_program_that_hangs_is_ended_with_what_it_started(programs, folder):
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        programs.run("toy", ["sleep"], folder, {**os.environ, "COLOUR": "red"}, timeout=3)
    assert "['sleep']" in str(caught.value.stdout)
    child = int((folder / "child").read_text())
    end = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(process: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return state not in ("", "Z")


def test_macos_does_not_fork():
    assert FORKS is (sys.platform != "darwin")
    assert Programs({}).forks is FORKS


def test_a_moment_survives_the_way_through_a_command_line():
    for moment in (Moment("os.rename", "/manifest.json", 2, after=True), Moment("open", "two")):
        assert parse(str(moment)) == moment
