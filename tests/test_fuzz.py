"""Damaged files of every kind, by a seed: programs end in a line, or accept them. More by hand: tests/fuzz/run.py."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz" / "run.py"


@pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer measures memory by /proc")
def test_two_hundred_damaged_inputs() -> None:
    command = [sys.executable, str(FUZZ), "--cases", "200", "--seed", "1", "--deep", "0.02"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-1].split()
    assert total[:2] == ["all", "200"]
    refused, accepted = int(total[2]), int(total[3])
    assert refused + accepted == 200
    assert refused > 100  # else what is damaged is not read
    assert accepted > 5  # else the first check hides the others
