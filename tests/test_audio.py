"""Recordings as material, through the real rustymimi and a codec with random weights of Mimi's names and shapes."""

from dataclasses import replace

import numpy as np
import pytest
import rustymimi
import soundfile
from ppx.convert.problems import UserError
from ppx.convert.source import CODEC, locate, open_source
from ppx.verify.audio import FRAME, RATE, read_audio
from ppx.verify.session import SILENCE
from safetensors.numpy import save_file


@pytest.fixture(scope="module")
def source(pico, layout, tmp_path_factory):
    """Pico with a whole codec, and room for its 2048 tokens."""
    random = np.random.default_rng(5)
    tensors = {}
    for name, shape in layout("mimi").items():
        values = random.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[1:], dtype=np.float32))
        tensors[name] = np.ones(shape, np.float32) if len(shape) == 1 and "bias" not in name else values
    folder = tmp_path_factory.mktemp("codec")
    save_file(tensors, folder / CODEC)
    opened = open_source(locate(str(pico)))
    room = replace(opened.checkpoint, architecture=replace(opened.architecture, card=2048))
    return replace(opened, checkpoint=room, location=replace(opened.location, folder=folder))


def tone(seconds, rate, pitch=220):
    return np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate).astype(np.float32) * 0.3


def encoded(source, samples):
    """What rustymimi itself makes of samples."""
    tokenizer = rustymimi.Tokenizer(str(source.location.folder / CODEC), num_codebooks=8)
    return np.asarray(tokenizer.encode(samples[None, None]))[0]


def test_one_channel_is_the_user_and_the_agent_is_silent(source, tmp_path):
    samples = tone(1.0, RATE)
    soundfile.write(tmp_path / "mono.wav", samples, RATE, subtype="FLOAT")
    material = read_audio(tmp_path / "mono.wav", source, None)
    assert material.description == {"kind": "audio", "file": "mono.wav", "sequences": 1, "frames": 12}
    expected = encoded(source, samples[: 12 * FRAME])
    targets = material.targets[0]
    np.testing.assert_array_equal(targets[9], expected[0])  # codebook 0 has no delay
    np.testing.assert_array_equal(targets[10:, 1:], expected[1:, :-1])
    assert (targets[0] == source.architecture.text_padding).all()
    assert (targets[1] == SILENCE[0]).all()
    assert len(np.unique(expected)) > 3


def test_two_channels_are_agent_and_user_at_any_rate(source, tmp_path):
    rate = 16000
    samples = np.stack([tone(0.8, rate, 150), tone(0.8, rate, 330)], 1)
    soundfile.write(tmp_path / "stereo.wav", samples, rate)
    material = read_audio(tmp_path / "stereo.wav", source, 5)
    assert material.tokens.shape == (1, 17, 5)
    alone = []
    for channel in (0, 1):
        soundfile.write(tmp_path / "one.wav", samples[:, channel], rate)
        alone.append(read_audio(tmp_path / "one.wav", source, 5).targets[0, 9:])
    np.testing.assert_array_equal(material.targets[0, 1:9], alone[0])
    np.testing.assert_array_equal(material.targets[0, 9:], alone[1])
    assert (alone[0] != alone[1]).any()


def test_what_is_no_recording_is_refused(source, pico, tmp_path):
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(UserError, match="not audio that can be read"):
        read_audio(tmp_path / "text.wav", source, None)
    soundfile.write(tmp_path / "short.wav", tone(0.05, RATE), RATE)
    with pytest.raises(UserError, match="shorter than a frame"):
        read_audio(tmp_path / "short.wav", source, None)
    soundfile.write(tmp_path / "mono.wav", tone(1.0, RATE), RATE)
    small = replace(source, checkpoint=open_source(locate(str(pico))).checkpoint)
    with pytest.raises(UserError, match="tokens that this model does not have"):
        read_audio(tmp_path / "mono.wav", small, None)
    with pytest.raises(UserError, match="not a codec that rustymimi loads"):
        read_audio(tmp_path / "mono.wav", open_source(locate(str(pico))), None)
