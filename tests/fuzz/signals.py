"""Stops conversions by signals at random moments, and runs them again: the bundle must have the same bytes.

    python tests/fuzz/signals.py --seed 1 --each 20

For each of SIGKILL, SIGINT and SIGTERM so many runs are stopped, every other one while it quantizes with GPTQ and
fine-tunes. Fails if a stopped run leaves a bundle that is not the whole one, ends in anything but one line and its
exit status, or if the next run of the same command ends with other bytes, or leaves something beside them.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from base import FILES, PICO
from program_server import wait
from safetensors.numpy import load_file, save_file
from server import Command, begin, preload

PLAIN = Command("convert", ("pico", "--recipe", "4bit", "--no-verify", "-o", "out"))
DATA_DRIVEN = Command(
    "convert", (*PLAIN.arguments, "--method", "gptq", "--calibration", "tokens.safetensors", "--refine", "12")
)
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
LONGEST = 600.0  # seconds


def folder_for(base: Path, work: Path) -> Path:
    """Return a new folder with a source and tokens."""
    folder = Path(tempfile.mkdtemp(dir=work))
    (folder / "pico").symlink_to(base / "pico")
    (folder / "tokens.safetensors").symlink_to(base / "tokens.safetensors")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stopped(command: Command, folder: Path, number: signal.Signals, moment: float, cache: Path) -> tuple[int, str]:
    """Run a program, send it a signal after some seconds; return its exit status and what it said."""
    child, _ = begin(command, folder, (folder, cache))
    end = time.monotonic() + moment
    while time.monotonic() < end and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    os.kill(child, number)
    status = wait(child, time.monotonic() + LONGEST)
    assert status is not None, "it hangs"
    return status, (folder / ".err").read_text("utf-8", "replace")


def problem(
    command: Command, folder: Path, number: signal.Signals, moment: float, whole: dict[str, bytes], cache: Path
) -> tuple[str | None, bool]:
    """Return what is wrong with a stopped run and the one after it, None if nothing is; and whether it was stopped."""
    status, said = stopped(command, folder, number, moment, cache)
    lines = [line for line in said.splitlines() if "tokens are scarce" not in line]  # a warning of every run
    begun = status != -number or bool(lines)  # before, nothing handles the signal
    if begun and status not in (0, STATUS[number]):
        return f"exit status {status}: {said}", True
    if "Traceback" in said or (status > 0 and (len(lines) != 1 or not lines[0].startswith(("interr", "termin")))):
        return f"it says {said}", True
    card = ("README.md", "NOTICE")  # written after the bundle has its name
    if (folder / "out").exists() and any(
        contents(folder / "out").get(name) != data for name, data in whole.items() if name not in card
    ):
        return "it leaves a bundle that is not whole", True
    child, _ = begin(command, folder, (folder, cache))
    if wait(child, time.monotonic() + LONGEST) != 0:
        return f"run again: {(folder / '.err').read_text('utf-8', 'replace')}", True
    if contents(folder / "out") != whole:
        found = contents(folder / "out")
        return f"other bytes: {sorted(n for n in found.keys() | whole.keys() if found.get(n) != whole.get(n))}", True
    beside = {path.name for path in folder.iterdir()} - {"pico", "tokens.safetensors", "out", ".out", ".err"}
    return (f"left beside: {sorted(beside)}" if beside else None), status != 0


def main() -> None:
    """Run from the command line; exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20, help="runs that get each signal")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    random = Random(options.seed)
    failed, counts = 0, Counter[str]()
    with tempfile.TemporaryDirectory(prefix="ppx-signals-") as name:
        work = Path(name)
        cache, base = work / "cache", work / "base"
        (base / "pico").mkdir(parents=True)
        cache.mkdir()
        for file in FILES:
            shutil.copy(PICO / file, base / "pico" / file)
        tokens = load_file(PICO / "calibration_tokens.safetensors")["tokens"]
        save_file({"tokens": tokens[:6, :, :60].copy()}, base / "tokens.safetensors")
        os.environ |= {"XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "TMPDIR": str(cache)}
        os.environ["OMP_NUM_THREADS"] = "1"
        tempfile.tempdir = None
        preload()
        whole, lasts = {}, {}
        for command in (PLAIN, DATA_DRIVEN):
            folder = folder_for(base, work)
            began = time.monotonic()
            child, _ = begin(command, folder, (folder, cache))
            assert wait(child, began + LONGEST) == 0, (folder / ".err").read_text()
            lasts[command], whole[command] = time.monotonic() - began, contents(folder / "out")
            print(f"uninterrupted: {lasts[command]:.1f} s", flush=True)
        for number in STATUS:
            for run in range(options.each):
                command = (PLAIN, DATA_DRIVEN)[run % 2]
                moment = random.uniform(0, lasts[command])
                folder = folder_for(base, work)
                wrong, was_stopped = problem(command, folder, number, moment, whole[command], cache)
                counts[f"{number.name} {'stopped' if was_stopped else 'finished before'}"] += 1
                if wrong:
                    failed += 1
                    print(f"{number.name} after {moment:.2f} s of {command.arguments}: {wrong}", flush=True)
                shutil.rmtree(folder)
            print(", ".join(f"{name}: {count}" for name, count in counts.items()), flush=True)
    print(f"{failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
