"""Voices of recordings, bit for bit: against the reference's steps, written here a second time in PyTorch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ppx.convert.source.source import locate, open_source
from ppx.convert.source.voices import check
from ppx.model.forward import Model
from ppx.model.reference import reference_of
from ppx.model.session import SINE, Columns, Frame, greedy, system_prompt
from ppx.model.voice_prompt import embedding_sums, make_voice, rows_of
from ppx.quant.affine import BFLOAT16
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def source(pico):
    with open_source(locate(str(pico))) as opened:
        yield opened


def codes_of(architecture, frames, seed=0):
    return np.random.default_rng(seed).integers(0, architecture.card, (architecture.n_q // 2, frames))


class ReferenceSteps:
    """What NVIDIA's LMGen does in a voice prompt, with its ring, offset and flags, one frame a call.

    Written after the published steps (moshi/models/lm.py), not after our arithmetic: the columns are never spelled out.
    """

    def __init__(self, checkpoint):
        a = self.a = checkpoint.architecture
        self.tables = [
            torch.from_numpy(
                checkpoint.read(name, 0, rows + 1).astype(np.float32),
            ).bfloat16()
            for name, rows in [("text_emb.weight", a.text_card), *((f"emb.{n}.weight", a.card) for n in range(a.n_q))]
        ]
        self.slots = max(a.delays) + 3
        self.cache = torch.full((1, 1 + a.n_q, self.slots), -2)
        self.initial = torch.tensor([a.text_card] + [a.card] * a.n_q)
        self.offset, self.saved = 0, []

    def step(self, agent):
        a = self.a
        given = {0: a.text_padding}
        given |= {1 + k: int(token) for k, token in enumerate(agent)}
        given |= {1 + a.n_q // 2 + k: token % a.card for k, token in enumerate(SINE)}
        for stream, token in given.items():
            self.cache[0, stream, (self.offset + a.delays[stream]) % self.slots] = token
        for stream, delay in enumerate(a.delays):
            if self.offset <= delay:
                self.cache[0, stream, self.offset % self.slots] = self.initial[stream]
        if self.offset == 0:
            self.cache[0, :, 0] = self.initial
            self.offset = 1
            return
        column = self.cache[:, :, (self.offset - 1) % self.slots]
        embedding = torch.nn.functional.embedding
        total = embedding(column[:, 1], self.tables[1])
        for codebook in range(1, a.n_q):
            total = total + embedding(column[:, 1 + codebook], self.tables[1 + codebook])
        self.saved.append(total + embedding(column[:, 0], self.tables[0]))
        self.offset += 1


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 9, 30])
def test_embeddings_and_cache_are_the_references_to_the_bit(source, frames):
    codes = codes_of(source.architecture, frames)
    steps = ReferenceSteps(source.checkpoint)
    for frame in codes.T:
        steps.step(frame)
    voice = make_voice("mine", codes, source.architecture, rows_of(source.checkpoint))
    expected = torch.stack(steps.saved)[:, None]
    assert voice.embeddings.dtype == BFLOAT16
    assert voice.embeddings.shape == tuple(expected.shape) == (frames - 1, 1, 1, source.architecture.dim)
    np.testing.assert_array_equal(voice.embeddings.view(np.uint16), expected.view(torch.uint16).numpy())
    assert voice.cache.dtype == np.int64
    np.testing.assert_array_equal(voice.cache, steps.cache.numpy())
    check(voice, source.architecture)


def test_the_ring_of_four_columns(source):
    """By hand: frames 0 to 4 were given; delayed streams are a column ahead, in slot 5 % 4."""
    a = source.architecture
    codes = codes_of(a, 5)
    cache = make_voice("mine", codes, a, rows_of(source.checkpoint)).cache
    assert cache.shape == (1, 17, 4)
    assert (cache[0, 0] == 3).all()
    assert cache[0, 1].tolist() == [codes[0, 4], codes[0, 1], codes[0, 2], codes[0, 3]]
    assert cache[0, 2].tolist() == [codes[1, 3], codes[1, 4], codes[1, 1], codes[1, 2]]
    assert cache[0, 9:, 0].tolist() == [token % a.card for token in SINE]


def test_sums_are_those_of_the_references_bfloat16_model(source, pico):
    """The golden file has -1 among its tokens, and initial ones."""
    golden = load_file(pico / "golden" / "forward_bfloat16.safetensors")
    for tokens, expected in zip(golden["tokens"].numpy(), golden["temporal.embed"], strict=True):
        vectors = embedding_sums(tokens.astype(np.int64), source.architecture, rows_of(source.checkpoint))
        np.testing.assert_array_equal(vectors.astype(np.float32), expected.float().numpy())


def test_the_last_columns_of_a_preset_are_sums_of_the_same_tables(source):
    """The presets of the test data are sums rounded once, so they agree up to the rounding of 16 additions."""
    for preset in source.voices:
        columns = preset.cache[0, :, :3]
        vectors = embedding_sums(columns, source.architecture, rows_of(source.checkpoint)).astype(np.float32)
        stored = preset.embeddings[-3:].reshape(3, -1).astype(np.float32)
        assert np.linalg.norm(vectors - stored) < 0.01 * np.linalg.norm(stored)
        assert np.linalg.norm(vectors[::-1] - stored) > 0.1 * np.linalg.norm(stored)


def replayed(model: Model, architecture, voice, codes, frames):
    """A session whose voice is given as tokens, frame by frame, from the initial column on."""
    empty = replace(
        voice,
        embeddings=np.zeros((0, 1, 1, architecture.dim), np.float32),
        cache=np.full((1, 17, 4), -2, np.int64),
    )
    empty.cache[0, :, 0] = [architecture.text_card] + [architecture.card] * architecture.n_q
    empty.cache[0, [s for s, delay in enumerate(architecture.delays) if delay], 1] = architecture.card
    sine = [token % architecture.card for token in SINE]
    given = [Frame(architecture.text_padding, column.tolist(), sine) for column in codes.T[1:]]
    return list(greedy(model, architecture, empty, [*given, *frames]))[len(given) :]


def test_a_session_from_our_voice_is_that_of_its_tokens(source):
    """Same state: the columns under way, and what the model predicts from there on.

    Float32 sums here, so that the voice's rounding to bfloat16 is all that differs; it changes no top-1 token.
    """
    a = replace(source.architecture, context=64)  # nothing drops out of the rotating KV cache
    checkpoint = replace(source.checkpoint, architecture=a)
    codes = codes_of(a, 12, seed=3)
    voice = make_voice("mine", codes, a, rows_of(checkpoint))
    frames = [*system_prompt(a, [7, 8]), *[Frame()] * 8]
    frames = [replace(frame, user=[token % a.card for token in SINE]) for frame in frames]
    model = reference_of(checkpoint)
    ours, tokens = list(greedy(model, a, voice, frames)), replayed(model, a, voice, codes, frames)
    assert len(ours) == len(tokens) == len(frames)
    for number, (mine, other) in enumerate(zip(ours, tokens, strict=True)):
        assert mine.tokens.tolist() == other.tokens.tolist(), number
        scale = np.linalg.norm(other.audio_logits)
        assert np.linalg.norm(mine.audio_logits - other.audio_logits) < 0.02 * scale
        assert np.linalg.norm(mine.text_logits - other.text_logits) < 0.02 * np.linalg.norm(other.text_logits)


def test_columns_under_way_after_a_voice(source):
    a = source.architecture
    codes = codes_of(a, 9)
    columns = Columns(a, make_voice("mine", codes, a, rows_of(source.checkpoint)))
    assert columns.next == 9
    assert columns.tokens[8][1:9].tolist() == [codes[0, 8], *codes[1:, 7]]
    assert columns.tokens[9][2:9].tolist() == codes[1:, 8].tolist()
    assert columns.given[9] == {stream for stream, delay in enumerate(a.delays) if delay}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes[:7], r"shape \[7, 5\]"),
        (lambda codes: codes[:, :1], r"shape \[8, 1\]"),
        (lambda codes: np.repeat(codes, 200, 1), "shape"),
        (lambda codes: codes + 128, "from 0 to 127"),
        (lambda codes: codes - 128, "from 0 to 127"),
    ],
)
def test_tokens_that_the_model_does_not_have(source, change, message):
    with pytest.raises(ValueError, match=message):
        make_voice("mine", change(codes_of(source.architecture, 5)), source.architecture, rows_of(source.checkpoint))
