"""kill -9 at ten moments of a conversion: nothing looks finished, nothing complete is lost, the result is the same."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

OPTIONS = ["--recipe", "4bit", "--jobs", "1", "--no-verify", "-o", "out"]
COMMAND = [sys.executable, "-m", "ppx.recipes.convert_program", "demo", *OPTIONS]
FILES = 24


def size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


MOMENTS = {
    "the workspace appears": lambda partial: partial.is_dir(),
    "the journal appears": lambda partial: size(partial / ".journal.json") > 0,
    "the first file begins": lambda partial: size(partial / "temporal.safetensors.tmp") > 0,
    "the first file is half written": lambda partial: size(partial / "temporal.safetensors.tmp") > 7_000_000,
    "the first file has its name": lambda partial: size(partial / "temporal.safetensors") > 0,
    "the second file begins": lambda partial: size(partial / "depformer.safetensors.tmp") > 0,
    "the third file begins": lambda partial: size(partial / "embeddings.safetensors.tmp") > 0,
    "some voices are written": lambda partial: size(partial / "voices" / "NATM1.safetensors") > 0,
    "the last file has its name": lambda partial: size(partial / "config.json") > 0,
    "the manifest is being written": lambda partial: (
        size(partial / "manifest.json.tmp") >= 0 or size(partial / "manifest.json") >= 0
    ),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(COMMAND, cwd=folder, check=True, capture_output=True)
    return contents(folder / "out")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_when(moment, folder):
    """Start a conversion and kill it when the moment has come; returns whether it was still at work."""
    process = subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and not moment(folder / "out.partial"):
        assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_conversion_goes_on(moment, uninterrupted, tmp_path, record_property):
    assert kill_when(MOMENTS[moment], tmp_path), "it had ended before it could be killed"
    partial = tmp_path / "out.partial"
    complete = 0
    if not (tmp_path / "out").exists():
        journal = partial / ".journal.json"
        complete = len(json.loads(journal.read_text())["files"]) if journal.is_file() else 0
    else:  # the rename had just been made: then the bundle must be whole
        assert contents(tmp_path / "out").items() >= uninterrupted.items()
        complete = FILES
    done = subprocess.run([*COMMAND, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files_made"] == FILES - complete
    assert contents(tmp_path / "out") == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record_property("files kept", complete)


def test_a_damaged_leftover_is_made_again(uninterrupted, tmp_path):
    assert kill_when(MOMENTS["some voices are written"], tmp_path)
    path = tmp_path / "out.partial" / "depformer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    subprocess.run(COMMAND, cwd=tmp_path, check=True, capture_output=True)
    assert contents(tmp_path / "out") == uninterrupted


def test_other_settings_do_not_touch_an_unfinished_conversion(tmp_path, program):
    assert kill_when(MOMENTS["the second file begins"], tmp_path)
    before = contents(tmp_path / "out.partial")
    done = program("ppx-convert", "demo", "--bits", "8", "-o", "out", cwd=tmp_path, status=2)
    assert "unfinished conversion" in done.stderr
    assert contents(tmp_path / "out.partial") == before
    program("ppx-convert", "demo", "--bits", "8", "-o", "out", "--force", cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]["name"] == "8bit-g64"


def test_two_conversions_of_one_folder_do_not_meet(tmp_path, program):
    process = subprocess.Popen(COMMAND, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.partial" / ".journal.json").exists():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        done = program("ppx-convert", "demo", "--recipe", "4bit", "-o", "out", cwd=tmp_path, status=2)
        assert "another conversion is at work" in done.stderr
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert process.wait() == 0


def test_control_c_ends_in_a_line(tmp_path):
    def listen():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which shells let background processes ignore

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(COMMAND, cwd=tmp_path, preexec_fn=listen, **pipes)
    while not (tmp_path / "out.partial" / "temporal.safetensors.tmp").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)  # so that it cannot finish before the signal that is meant reaches it
    assert not (tmp_path / "out").exists()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said == "interrupted: the same command goes on with the files that are complete\n"
