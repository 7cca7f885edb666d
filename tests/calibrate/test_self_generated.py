"""Self-generated calibration tokens."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import streaming
from ppx.calibrate import self_generated
from ppx.calibrate.self_generated import KeptSessions
from ppx.convert.errors import UserError
from ppx.convert.source.source import Source, locate, open_source
from ppx.model import torch_device as devices
from ppx.model.forward import Floats, Tokens
from ppx.model.prompt import PROMPT
from ppx.model.reference import TorchModel, reference_of
from ppx.model.session import Frame, greedy, sessions, system_prompt, top1
from ppx.model.tokens import SELF_GENERATED, from_tokens, read_tokens
from ppx.model.weights import kept_by, rows_of
from safetensors.numpy import load_file
from stopping import Moment


@pytest.fixture(scope="module")
def source(pico: Path) -> Iterator[Source]:
    with open_source(locate(str(pico))) as opened:
        yield opened


def held_model(source: Source) -> TorchModel:
    model = streaming(reference_of(source.checkpoint))
    held = kept_by({}, model.weights, "cpu")
    return replace(model, weights=held, rows=rows_of(held))


def test_sessions_side_by_side_are_those_one_by_one(source):
    """Greedy, of two voices of one length and two prompts, with other users."""
    a, model = source.architecture, held_model(source)
    length = len(source.voices[0].embeddings)
    voices = [voice for voice in source.voices if len(voice.embeddings) == length][:2]
    assert len(voices) == 2
    users = np.random.default_rng(1).integers(0, a.card, (2, 9, a.n_q // 2))
    scripts = [
        [*system_prompt(a, [7 + index, 8, 9]), *(Frame(user=list(user)) for user in users[index])] for index in range(2)
    ]
    with torch.inference_mode():
        together = list(sessions(model, a, voices, zip(*scripts, strict=True), top1))
        for index, voice in enumerate(voices):
            for both, alone in zip(together, greedy(model, a, voice, scripts[index]), strict=True):
                assert (both[index].tokens == alone.tokens).all()
                assert np.allclose(both[index].text_logits, alone.text_logits, atol=1e-4)
                assert np.allclose(both[index].audio_logits, alone.audio_logits, atol=1e-4)


def loss(source: Source, tokens: Tokens) -> Floats:
    """Negative log-likelihood of all streams of sessions, as the model reads them."""
    a = source.architecture
    token_set = from_tokens(tokens, a)
    with torch.inference_mode():
        text, audio = held_model(source).logits(token_set.tokens, token_set.targets)
    losses = []
    for stream in range(1 + a.n_q):
        logits = audio[:, :, stream - 1] if stream else text
        target = torch.from_numpy(token_set.targets[:, stream].astype(np.int64)).clamp(0, logits.shape[-1] - 1)
        found = -logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
        losses.append(float(found[torch.from_numpy(token_set.counted[:, stream])].mean()))
    return np.array(losses)


def test_what_is_spoken_is_likely_and_comes_again(source):
    tokens = self_generated.generate(source, 60, 4, quiet=True)
    assert tokens.shape == (4, 17, 60)
    assert (tokens >= 0).all()
    assert (tokens[:, 1:] < source.architecture.card).all()
    assert (self_generated.generate(source, 60, 4, quiet=True) == tokens).all()
    assert len({session.tobytes() for session in tokens}) == 4
    shuffled = np.random.default_rng(0).permuted(tokens, axis=2)
    apart = loss(source, shuffled) - loss(source, tokens)
    assert (apart[1:] > 0.2).all()


def test_what_begins_with_nothing_is_as_likely_as_what_was_recorded(source, pico):
    """Drawn from the model's own distribution: as surprising to it as its training data, give or take."""
    tokens = self_generated.generate(source, 100, 16, quiet=True)[:8]  # those of no voice come first
    recorded = load_file(pico / "heldout_tokens.safetensors")["tokens"][:8, :, :100].astype(np.int32)
    apart = loss(source, tokens) - loss(source, recorded)
    assert abs(apart[1:].mean()) < 0.3
    assert abs(apart[0]) < 0.3


def test_a_model_that_does_not_fit_is_read_as_it_goes(source, monkeypatch):
    """In bfloat16, from the disk for every frame, few sessions at a time."""
    monkeypatch.setattr(devices, "memory", lambda: 1 << 20)
    model = self_generated._model(source)
    assert model.dtype is torch.bfloat16
    tokens = self_generated.generate(source, 6, 3, quiet=True)
    assert tokens.shape == (3, 17, 6)


def test_prompts_are_others_than_those_of_a_verification():
    assert PROMPT not in self_generated.PROMPTS


def test_a_file_of_them_is_made_once_and_not_taken_for_another(source, pico, tmp_path, monkeypatch):
    path = tmp_path / "x.spoken.safetensors"
    monkeypatch.setattr(self_generated, "CALIBRATION_FRAMES", 5)
    self_generated.self_generated(source, path, 2, quiet=True)
    assert load_file(path)["tokens"].shape == (2, 17, 5)
    assert read_tokens(path, source.architecture, None, None).description.kind == SELF_GENERATED
    monkeypatch.setattr(self_generated, "generate", lambda *_: 1 / 0)
    assert self_generated.self_generated(source, path, 2, quiet=True) == path
    shutil.copy(pico / "calibration_tokens.safetensors", path)
    with pytest.raises(UserError, match="was generated by another source"):
        self_generated.self_generated(source, path, 2, quiet=True)


def test_the_programs_speak_where_nothing_is_given(program, pico, tmp_path):
    self_generated = ("ppx-calibrate", pico, "--sessions", "3", "--frames", "20", "-o", "own.safetensors")
    done = program(*self_generated, cwd=tmp_path)
    assert done.stdout.startswith("own.safetensors: 3 sequences, 60 frames")
    convert = ("ppx-convert", pico, "--method", "gptq", "--bits", "3", "-o", "out", "--calibration", "own.safetensors")
    program(*convert, cwd=tmp_path)
    assert SELF_GENERATED in (tmp_path / "out" / "README.md").read_text()


def test_generation_that_is_killed_resumes(program, pico, tmp_path):
    options = ("ppx-calibrate", pico, "--sessions", "6", "--frames", "12")
    program(*options, "-o", "whole.safetensors", cwd=tmp_path)
    unfinished = "own.safetensors.unfinished"

    def stop(number, signal_number, status):
        moment = Moment("os.rename", unfinished, number, after=True)
        return program(*options, "-o", "own.safetensors", cwd=tmp_path, status=status, stop=(moment, signal_number))

    stopped = stop(1, signal.SIGINT, 130)
    assert "generated conversations are kept; run the same command again to resume" in stopped.stderr
    kept = len(load_file(tmp_path / unfinished)["tokens"])
    stop(1, signal.SIGKILL, -signal.SIGKILL)
    assert len(load_file(tmp_path / unfinished)["tokens"]) > kept
    program(*options, "-o", "own.safetensors", cwd=tmp_path)
    assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"own.safetensors", "whole.safetensors"}


def test_what_is_kept_of_other_sessions_is_not_used(source, tmp_path):
    a, sizes = source.architecture, [2, 1, 3]
    tokens = np.arange(3 * 17 * 5, dtype=np.int32).reshape(3, 17, 5) % 30
    kept = KeptSessions(tmp_path / "x.unfinished", "mark")
    assert kept.read(sizes, 5, a) == []
    kept.write([tokens[:2], tokens[2:]], sizes)
    first, second = kept.read(sizes, 5, a)
    assert (first == tokens[:2]).all()
    assert (second == tokens[2:]).all()
    assert KeptSessions(kept.path, "other").read(sizes, 5, a) == []
    assert kept.read([1, 2, 3], 5, a) == []
    assert kept.read(sizes, 6, a) == []
    assert kept.read(sizes, 5, replace(a, card=20)) == []
    kept.path.write_bytes(kept.path.read_bytes()[:-50])
    assert kept.read(sizes, 5, a) == []


def test_its_progress_counts_all_that_is_computed(source, monkeypatch):
    counted = []

    class Bar:
        def __init__(self, total):
            self.total = total

        def update(self, more):
            counted.append(more)

        def set_postfix_str(self, text, **_):
            assert text.endswith("conversations")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert sum(counted) == self.total

    monkeypatch.setattr(self_generated, "bar", lambda _label, total, _unit, _quiet: Bar(total))
    self_generated.generate(source, 4, 3, True)
    assert counted
