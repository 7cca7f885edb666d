"""Recordings as token sets, through the real rustymimi and a codec with random weights of Mimi's names and shapes."""

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rustymimi
import soundfile
from numpy.typing import NDArray
from ppx.convert.errors import UserError
from ppx.convert.file_names import CODEC, TOKENIZER
from ppx.convert.source.mimi import FRAME, RATE, tensors
from ppx.convert.source.source import Source, locate, open_source
from ppx.model.forward import Floats
from ppx.model.prompt import PROMPT, prompt_tokens
from ppx.model.session import PAUSE, SILENCE
from ppx.model.tokens import TokenDescription, from_tokens
from ppx.speak import audio_files
from ppx.speak.codec import Codec
from ppx.speak.recordings import read_audio, recorded
from safetensors import safe_open


@pytest.fixture(scope="module")
def source(pico: Path, codec: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """Pico with a whole codec, and room for its 2048 tokens."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / CODEC).symlink_to(codec)
    (folder / TOKENIZER).symlink_to(pico.absolute() / TOKENIZER)
    with open_source(locate(str(pico))) as opened:
        room = replace(opened.checkpoint, architecture=replace(opened.architecture, card=2048))
        yield replace(opened, checkpoint=room, location=replace(opened.location, folder=folder))


def tone(seconds: float, rate: int, pitch: int = 220) -> Floats:
    return np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate).astype(np.float32) * 0.3


def encoded(source: Source, samples: Floats) -> NDArray[Any]:
    """What rustymimi itself makes of samples."""
    tokenizer = rustymimi.Tokenizer(str(source.location.folder / CODEC), num_codebooks=8)
    codes: NDArray[Any] = np.asarray(tokenizer.encode(samples[None, None]))[0]
    return codes


def test_one_channel_is_a_user_who_speaks_after_the_system_prompt(source, tmp_path):
    samples = tone(1.0, RATE)
    soundfile.write(tmp_path / "mono.wav", samples, RATE, subtype="FLOAT")
    token_set = read_audio(tmp_path / "mono.wav", source, None)
    voice, text = source.voices[0], prompt_tokens(source.location.folder / TOKENIZER, source.architecture, PROMPT)
    begin = len(voice.embeddings) + 2 * PAUSE + len(text)
    description = TokenDescription(
        kind="audio", text=PROMPT, file="mono.wav", sequences=1, frames=begin + 12, voices=(voice.name,)
    )
    assert token_set.description == description
    expected = encoded(source, samples[: 12 * FRAME])
    targets = token_set.targets[0]
    np.testing.assert_array_equal(targets[0, begin - PAUSE - len(text) : begin - PAUSE], text)
    np.testing.assert_array_equal(targets[9, begin:], expected[0])  # codebook 0 has no delay
    np.testing.assert_array_equal(targets[10:, begin + 1 :], expected[1:, :-1])
    assert (targets[0, begin:] == source.architecture.text_padding).all()
    assert (targets[1, begin:] == SILENCE[0]).all()
    assert token_set.counted[0, 9, begin:].all()
    assert len(np.unique(expected)) > 3
    assert read_audio(tmp_path / "mono.wav", source, begin + 5).tokens.shape == (1, 17, begin + 5)


def test_one_channel_alone_is_the_user_and_the_agent_is_silent(source, tmp_path):
    samples = tone(1.0, RATE)
    soundfile.write(tmp_path / "mono.wav", samples, RATE, subtype="FLOAT")
    tokens = recorded(tmp_path / "mono.wav", source)[0]
    np.testing.assert_array_equal(tokens[9:], encoded(source, samples[: 12 * FRAME]))
    assert (tokens[0] == source.architecture.text_padding).all()
    assert (tokens[1:9] == np.array(SILENCE)[:, None]).all()


def test_two_channels_are_agent_and_user_at_any_rate(source, tmp_path):
    rate = 16000
    samples = np.stack([tone(0.8, rate, 150), tone(0.8, rate, 330)], 1)
    soundfile.write(tmp_path / "stereo.wav", samples, rate)
    token_set = read_audio(tmp_path / "stereo.wav", source, 5)
    assert token_set.tokens.shape == (1, 17, 5)
    alone = []
    for channel in (0, 1):
        soundfile.write(tmp_path / "one.wav", samples[:, channel], rate)
        alone.append(from_tokens(recorded(tmp_path / "one.wav", source, 5), source.architecture).targets[0, 9:])
    np.testing.assert_array_equal(token_set.targets[0, 1:9], alone[0])
    np.testing.assert_array_equal(token_set.targets[0, 9:], alone[1])
    assert (alone[0] != alone[1]).any()


def test_what_is_no_recording_is_refused(source, pico, tmp_path):
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(UserError, match="unreadable audio"):
        read_audio(tmp_path / "text.wav", source, None)
    soundfile.write(tmp_path / "short.wav", tone(0.05, RATE), RATE)
    with pytest.raises(UserError, match="shorter than a frame"):
        read_audio(tmp_path / "short.wav", source, None)
    soundfile.write(tmp_path / "mono.wav", tone(1.0, RATE), RATE)
    with open_source(locate(str(pico))) as plain:
        small = replace(source, checkpoint=plain.checkpoint)
        with pytest.raises(UserError, match="tokens outside the vocabulary of this model"):
            read_audio(tmp_path / "mono.wav", small, None)
        with pytest.raises(UserError, match="not a codec that rustymimi loads"):
            read_audio(tmp_path / "mono.wav", plain, None)


def test_a_made_codec_has_mimis_names_and_shapes(layout, codec):
    assert tensors(codebooks=8) == {name: tuple(shape) for name, shape in layout("mimi").items()}
    whole = tensors()
    assert set(whole) > set(layout("mimi"))
    assert sum(name.endswith("embedding_sum") for name in whole) == 32
    with safe_open(codec, "np") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == whole  # noqa: SIM118
    assert 384e6 < codec.stat().st_size < 386e6


def test_a_codec_frame_by_frame_is_the_codec_as_a_whole(codec):
    samples = np.random.default_rng(0).standard_normal(6 * FRAME).astype(np.float32) * 0.1
    mimi = Codec(codec, 8)
    apart = np.stack([mimi.encode(frame) for frame in samples.reshape(-1, FRAME)], 1)
    np.testing.assert_array_equal(apart, mimi.encode_whole(samples))
    assert apart.shape == (8, 6)
    assert 0 <= apart.min() <= apart.max() < 2048
    first = [mimi.decode(tokens) for tokens in apart.T]
    assert all(frame.shape == (FRAME,) and np.isfinite(frame).all() for frame in first)
    mimi.reset()
    np.testing.assert_array_equal(np.stack([mimi.encode(frame) for frame in samples.reshape(-1, FRAME)], 1), apart)
    again = [mimi.decode(tokens) for tokens in apart.T]
    np.testing.assert_allclose(np.stack(again), np.stack(first), atol=1e-4)  # its threads sum in any order
    whole = rustymimi.Tokenizer(str(codec), num_codebooks=8).decode(apart[None].astype(np.uint32))[0, 0]
    np.testing.assert_allclose(np.concatenate(first), whole[: 6 * FRAME], atol=2e-4 * np.abs(whole).max())


@pytest.mark.parametrize(("rate", "channels"), [(24000, 1), (16000, 1), (44100, 2), (8000, 1)])
def test_a_file_is_read_frame_by_frame_as_it_is_as_a_whole(tmp_path, rate, channels):
    samples = np.stack([tone(3.33, rate, 150 + 90 * channel) for channel in range(channels)], 1)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    with audio_files.reading(tmp_path / "a.wav") as (count, frames):
        found = np.concatenate(list(frames))
    assert count == round(len(samples) * RATE / rate)
    assert len(found) == -(-count // FRAME) * FRAME
    whole = audio_files.read(tmp_path / "a.wav").mean(0)
    middle = slice(2000, count - 2000)  # a stream's resampler does not know what comes at the ends
    np.testing.assert_allclose(found[middle], whole[middle], atol=1e-3)
    assert not found[count:].any() or np.abs(found[count:]).max() < 0.02


def test_a_long_file_is_read_in_little_memory(tmp_path):
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 48000, 2) as file:
        for _ in range(60):
            file.write(np.zeros((48000, 2), np.float32))
    tracemalloc.start()
    try:
        with audio_files.reading(tmp_path / "long.wav") as (count, frames):
            assert sum(1 for _ in frames) == count / FRAME == 750
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_holds_less_than_it_says_is_damaged(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tone(2.0, RATE), RATE)
    with audio_files.reading(tmp_path / "a.wav") as (_, frames):
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: np.zeros((0, 1), np.float32))
        with pytest.raises(UserError, match="truncated"):
            list(frames)


def test_an_answer_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.wav"
    with audio_files.writing(path, 3000) as write:
        write(np.full(FRAME, 0.5, np.float32))
        assert not path.exists()
        write(np.full(FRAME, 2.0, np.float32))
    samples, rate = soundfile.read(path)
    assert (len(samples), rate) == (3000, RATE)
    np.testing.assert_allclose(samples[:FRAME], 0.5, atol=1e-4)
    assert samples[FRAME:].min() > 0.99  # clipped, not wrapped around

    def broken():
        with audio_files.writing(tmp_path / "b.wav", 3000) as write:
            write(np.zeros(FRAME, np.float32))
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        broken()
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]
