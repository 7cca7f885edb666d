"""What the benchmarks share: how a process is measured, and what is printed of it."""

import sys
from pathlib import Path

import numpy as np
import pytest

MIB = 1 << 20


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


def test_memory_is_that_of_the_process_alone():
    """Also where the one that measures is larger: a process begins with the memory of the one that starts it."""
    from processes import run

    ballast = np.ones(256 * MIB, np.uint8)
    nothing = run([sys.executable, "-S", "-c", "pass"])
    something = run([sys.executable, "-S", "-c", f"held = b'x' * {128 * MIB}; print(len(held))"])
    assert nothing.memory < 100 * MIB < len(ballast)  # a bare Python takes about 10 MiB
    assert 128 * MIB <= something.memory < 228 * MIB
    assert something.output == f"{128 * MIB}\n"
    assert something.seconds > 0


def test_a_process_that_fails_ends_a_benchmark():
    from processes import run

    with pytest.raises(SystemExit, match="ended with 3"):
        run([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    assert run([sys.executable, "-S", "-c", "raise SystemExit(3)"], allowed=(3,)).output == ""


def test_no_column_of_the_conversions_table_is_empty():
    from conversion import table

    head, *rows = table({"plain copy": [(2.0, 1.0, -1e5)], "rtn": [(3.0, 1.5, -1e6), (5.0, 2.5, 1e9)]}).splitlines()
    assert head.split() == ["seconds", "/", "copy", "peak", "memory", "above", "imports"]
    assert rows[0].split() == ["plain", "copy", "2.0", "1.00", "0.00", "GiB"]
    assert rows[1].split() == ["rtn", "4.0", "2.00", "0.47", "GiB"]
