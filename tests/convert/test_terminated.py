"""SIGTERM ends a program as Ctrl-C does: one line, its own exit status, and nothing half-made that looks whole."""

import signal

import pytest
from ppx.recipes.cli import endings
from stopping import Moment


@pytest.mark.parametrize("event", ["open:temporal.safetensors.tmp", "open:config.json.tmp", "os.rename:manifest.json"])
def test_a_terminated_conversion_resumes(event, program, bundle, pico, tmp_path):
    asked = (pico, "--recipe", "4bit", "-o", "out")
    kind, name = event.split(":")
    stop = (Moment(kind, name, after=True), signal.SIGTERM)
    done = program("ppx-convert", *asked, cwd=tmp_path, status=143, stop=stop)
    assert done.stderr.startswith("terminated: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    program("ppx-convert", *asked, cwd=tmp_path)
    whole = bundle("--recipe", "4bit")
    for path in whole.rglob("*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []
    endings.reported(lambda: seen.append(signal.getsignal(signal.SIGTERM)))()
    assert seen[0] != before
    assert signal.getsignal(signal.SIGTERM) == before
