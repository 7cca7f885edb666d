"""Sweeps on a Ray cluster of several nodes: what dies, and that the results are those of a run in which nothing did."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweep_files import RECIPES, rows_of, untimed, written

pytest.importorskip("ray", reason="Ray is not installed: pip install 'ppx-convert[cluster]'")
pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent.parent
NODES = 2


@pytest.fixture
def cluster() -> Iterator["subprocess.Popen[str]"]:
    """A cluster of a head and two nodes; its first line of output, the address, is read."""
    command = [sys.executable, str(TESTS / "sweep_cluster.py"), str(NODES)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        yield process
        assert process.stdin
        process.stdin.close()
        process.wait(60)


def driver(file: Path, results: Path, address: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "ppx.recipes.cli.sweep", str(file), "-o", str(results), "--ray", address]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def done(results: Path) -> int:
    return len(list(results.glob("cells/*/*/result.json")))


def wait_for(results: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Wait until so many cells are done."""
    limit = time.monotonic() + 240
    while done(results) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_node_and_the_driver_die_and_the_results_are_the_same(cluster, program, pico, tmp_path):
    """One cluster for all of it: it takes seconds to start.

    The driver is killed after the first cell; then a node, at a random moment of the next driver's run.
    """
    file = written(tmp_path, RECIPES + "[resources]\nretries = 5\n", pico)
    assert cluster.stdout
    address = cluster.stdout.readline().strip()
    results = tmp_path / "results"
    first = driver(file, results, address)
    wait_for(results, 1, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = {path: path.stat().st_mtime_ns for path in results.glob("cells/*/*/result.json")}
    assert not (results / "index.html").exists()

    second = driver(file, results, address)
    seed = random.SystemRandom().randrange(1 << 16)
    wait_for(results, min(len(before) + 1, 2), second)
    time.sleep(random.Random(seed).uniform(0, 1.5))
    assert cluster.stdin
    cluster.stdin.write("kill\n")
    cluster.stdin.flush()
    assert cluster.stdout.readline() == "killed\n"
    out, errors = second.communicate(timeout=300)
    assert second.returncode == 0, (seed, out, errors)
    assert "3 cells done (3 intact), 0 failed" in out
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished cell ran again"
    rows = rows_of(results)
    assert len(rows) == len({row["name"] for row in rows}) == 3

    usual = tmp_path / "usual" / "results"
    program("ppx-sweep", file, "--output", usual, cwd=tmp_path)
    assert untimed(results) == untimed(usual), seed


def test_without_ray_the_message_says_what_to_install(tmp_path, pico, monkeypatch):
    from ppx.convert.errors import UserError
    from ppx.verify import sweep

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'ppx-convert\[cluster\]'"):
        sweep(written(tmp_path, RECIPES, pico), tmp_path / "results", ray="auto")
