"""Gathering conversations to quantize by."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from ppx.convert.source.mimi import FRAME
from ppx.speak import audio_files, recordings
from safetensors.numpy import load_file, save_file


def held(pico: Path) -> NDArray[np.int16]:
    return load_file(pico / "calibration_tokens.safetensors")["tokens"]


def test_files_are_joined_and_cut(program, pico, tmp_path):
    tokens = held(pico)
    save_file({"tokens": tokens[:5]}, tmp_path / "a.safetensors")
    save_file({"tokens": tokens[5:7, :, :130].astype(np.int64)}, tmp_path / "b.safetensors")
    files = ("--tokens", "a.safetensors", "--tokens", "b.safetensors")
    done = program("ppx-calibrate", pico, *files, "--frames", "100", "-o", "c.safetensors", "--json", cwd=tmp_path)
    found = load_file(tmp_path / "c.safetensors")["tokens"]
    assert found.dtype == np.int16
    expected = [piece[:, at : at + 100] for piece in tokens[:5] for at in (0, 100)]
    expected += [piece[:, :100] for piece in tokens[5:7]]
    assert (found == np.stack(expected)).all()
    said = json.loads(done.stdout)
    assert (said["sequences"], said["frames"], said["alike"]) == (12, 1200, 0)
    shares = [len(np.unique(found[:, k])) for k in range(17)]
    config = json.loads((pico / "config.json").read_text())
    cards = [config["text_card"]] + [config["card"]] * 16
    assert said["coverage"] == pytest.approx(
        [share / card for share, card in zip(shares, cards, strict=True)], rel=1e-3
    )
    assert "scarce: " in done.stderr
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_said_to_people(program, pico, tmp_path):
    source = pico / "calibration_tokens.safetensors"
    twice = ("--tokens", source, "--tokens", source)
    done = program("ppx-calibrate", pico, *twice, "-o", "c.safetensors", cwd=tmp_path)
    count = len(held(pico))
    assert done.stdout.startswith(f"c.safetensors: {2 * count} sequences, {2 * count * 250} frames (")
    assert f"{count} sequences are the same as another" in done.stderr


def test_recordings_become_tokens(pico, tmp_path, monkeypatch):
    """Through the encoder's place: the codec of the small model is no real one."""
    from ppx.calibrate import dataset
    from ppx.convert.source.source import locate, open_source

    codes = np.arange(8 * 30).reshape(8, 30) % 100
    monkeypatch.setattr(audio_files, "read", lambda _: np.zeros((2, 30 * FRAME), np.float32))
    monkeypatch.setattr(recordings, "Codec", lambda *_: SimpleNamespace(encode_whole=lambda _: codes))
    with open_source(locate(str(pico))) as source:
        tokens = dataset.gather(source, [], [tmp_path / "x.wav"], 15)
    assert tokens.shape == (2, 17, 15)
    assert (tokens[:, 0] == source.architecture.text_padding).all()
    assert (tokens[1, 1:9] == codes[:, 15:]).all()
    assert (tokens[0, 9:] == codes[:, :15]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sessions", "2", "--tokens", "own"], "--sessions is for self-generated conversations"),
        (["--tokens", "nothing.safetensors"], "nothing.safetensors: No such file or directory: check the path"),
        (["--tokens", "me.wav"], "a safetensors file of tokens is needed: ppx-calibrate makes one from recordings"),
        (["--tokens", "own", "--frames", "251"], "no conversation is 251 frames long (20 s)"),
        (["--audio", "nothing.wav"], "nothing.wav: No such file"),
    ],
)
def test_mistakes(options, message, program, pico, tmp_path):
    options = [str(pico / "calibration_tokens.safetensors") if option == "own" else option for option in options]
    (tmp_path / "me.wav").write_bytes(b"RIFF\x24\0\0\0WAVEfmt " + bytes(100))
    done = program("ppx-calibrate", pico, *options, "-o", "c.safetensors", cwd=tmp_path, status=2)
    assert message in done.stderr
    assert not (tmp_path / "c.safetensors").exists()


def test_a_file_that_is_there_stays(program, pico, tmp_path):
    (tmp_path / "c.safetensors").write_text("mine")
    options = ("--tokens", pico / "calibration_tokens.safetensors", "-o", "c.safetensors")
    assert "is there already" in program("ppx-calibrate", pico, *options, cwd=tmp_path, status=2).stderr
    assert (tmp_path / "c.safetensors").read_text() == "mine"
    program("ppx-calibrate", pico, *options, "--force", cwd=tmp_path)
    assert len(load_file(tmp_path / "c.safetensors")["tokens"]) == len(held(pico))
