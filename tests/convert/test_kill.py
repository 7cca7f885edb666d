"""kill -9 at ten moments of a conversion: nothing looks finished, nothing complete is lost, the result is the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stopping import Moment

DATA = Path(__file__).parent.parent / "data"
OPTIONS = (DATA / "pico", "--recipe", "4bit", "--jobs", "1", "-o", "out")
FILES = 24
VOICE = "voices/NATM1.safetensors"


def after(event: str, name: str, number: int = 1) -> Moment:
    return Moment(event, name, number, after=True)


MOMENTS = {  # and the number of files that are complete then; a file counts when the journal names it
    "the workspace appears": (after("os.mkdir", "out.partial"), 0),
    "the journal appears": (after("os.rename", ".journal.json"), 0),
    "the first file begins": (after("open", "temporal.safetensors.tmp"), 0),
    "the first file has its name": (after("os.rename", "/temporal.safetensors"), 0),
    "the first file is in the journal": (after("os.rename", ".journal.json", 2), 1),
    "the second file begins": (after("open", "depformer.safetensors.tmp"), None),
    "the third file begins": (after("open", "embeddings.safetensors.tmp"), None),
    "some voices are written": (after("os.rename", VOICE), None),
    "the last file has its name": (after("os.rename", "/config.json"), None),
    "the manifest is about to get its name": (Moment("os.rename", "/manifest.json"), FILES),
    "the bundle is about to get its name": (Moment("os.rename", "out"), FILES),
    "the bundle has its name": (after("os.rename", "out"), FILES),
}


@pytest.fixture(scope="module")
def uninterrupted(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    program("ppx-convert", *OPTIONS, cwd=folder)
    return contents(folder / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def kill(program, tmp_path):
    """Start a conversion, and kill it at a moment."""

    def run(moment):
        program("ppx-convert", *OPTIONS, cwd=tmp_path, status=-signal.SIGKILL, stop=(moment, signal.SIGKILL))

    return run


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_conversion_goes_on(moment, kill, uninterrupted, program, tmp_path, record_property):
    when, expected = MOMENTS[moment]
    kill(when)
    partial = tmp_path / "out.partial"
    if moment != "the bundle has its name":
        assert not (tmp_path / "out").exists()
        journal = partial / ".journal.json"
        complete = len(json.loads(journal.read_text())["files"]) if journal.is_file() else 0
    else:  # then the bundle must be whole; the card comes after it
        named = {name: data for name, data in uninterrupted.items() if name not in ("README.md", "NOTICE")}
        assert contents(tmp_path / "out").items() >= named.items()
        complete = FILES
    assert expected in (None, complete)
    done = program("ppx-convert", *OPTIONS, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["files_made"] == FILES - complete
    assert contents(tmp_path / "out") == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record_property("files kept", complete)


def test_a_file_cut_off_in_its_middle_is_made_again(kill, uninterrupted, program, tmp_path):
    kill(MOMENTS["the second file begins"][0])
    path = tmp_path / "out.partial" / "depformer.safetensors.tmp"
    path.write_bytes(uninterrupted["depformer.safetensors"][:100_000])
    program("ppx-convert", *OPTIONS, cwd=tmp_path)
    assert contents(tmp_path / "out") == uninterrupted


def test_a_damaged_leftover_is_made_again(kill, uninterrupted, program, tmp_path):
    kill(MOMENTS["some voices are written"][0])
    path = tmp_path / "out.partial" / "depformer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    program("ppx-convert", *OPTIONS, cwd=tmp_path)
    assert contents(tmp_path / "out") == uninterrupted


def test_other_settings_do_not_touch_an_unfinished_conversion(kill, tmp_path, program):
    kill(MOMENTS["the second file begins"][0])
    before = contents(tmp_path / "out.partial")
    done = program("ppx-convert", DATA / "pico", "--bits", "8", "-o", "out", cwd=tmp_path, status=2)
    assert "unfinished conversion" in done.stderr
    assert contents(tmp_path / "out.partial") == before
    program("ppx-convert", DATA / "pico", "--bits", "8", "-o", "out", "--force", cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]["name"] == "8bit-g64"


def test_two_conversions_of_one_folder_do_not_meet(uninterrupted, tmp_path, program):
    stopping = str(Path(__file__).parent.parent / "stopping.py")
    options = [
        str(after("os.rename", ".journal.json")),
        "SIGSTOP",
        "ppx.recipes.cli.convert",
        *map(str, OPTIONS),
        "--no-verify",
    ]
    process = subprocess.Popen([sys.executable, stopping, *options], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        done = program("ppx-convert", *OPTIONS, cwd=tmp_path, status=2)
        assert "another conversion is at work" in done.stderr
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert process.wait() == 0
    assert contents(tmp_path / "out") == uninterrupted


def test_control_c_ends_in_a_line(program, tmp_path):
    moment = MOMENTS["the first file begins"][0]
    done = program("ppx-convert", *OPTIONS, cwd=tmp_path, status=130, stop=(moment, signal.SIGINT))
    assert not (tmp_path / "out").exists()
    assert done.stderr == "interrupted: run the same command again to resume\n"
