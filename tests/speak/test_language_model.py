"""Conversations as users run them, against the reference's golden session and against the slow models."""

import io
from contextlib import closing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from ppx.convert.bundle.reader import Bundle, layout_of
from ppx.convert.errors import UserError
from ppx.model.mlx_model import model_of
from ppx.model.session import Columns, Frame, greedy, system_prompt
from ppx.speak import language_model, loader
from ppx.speak.generation import Conversation
from ppx.speak.sampling import GREEDY, Sampling, draw, sampling_of
from safetensors.numpy import load_file

FLOAT = {
    "speech-swift": ("--no-quantize", "--dtype", "bfloat16"),
    "moshi-mlx": ("--no-quantize", "--target", "moshi-mlx"),
    "mlx": ("--no-quantize", "--target", "mlx"),
}
QUANTIZED = {
    "speech-swift": ("--bits", "4", "--group-size", "64"),
    "moshi-mlx": ("--recipe", "moshi-q4", "--method", "rtn"),
    "mlx": ("--recipe", str(Path(__file__).parent.parent / "data" / "uneven.toml")),
    "mlx, 8 steps": ("--recipe", "mixed"),
}


@pytest.fixture(autouse=True)
def on_the_cpu():
    with mx.stream(mx.cpu):
        yield


@pytest.fixture(scope="module")
def golden(pico):
    return load_file(pico / "golden" / "generate_greedy.safetensors")


@pytest.fixture(scope="module")
def opened(bundle):
    """A bundle's model in memory and its voices."""
    made = {}

    def get(*options):
        if options not in made:
            folder = bundle(*options)
            with closing(Bundle(folder, *layout_of(folder))) as held:
                made[options] = loader.load(held, "float32"), {voice.name: voice for voice in held.voices()}
        return made[options]

    return get


def test_frames_are_attended_to_as_by_the_reference(opened):
    assert opened(*FLOAT["mlx"])[0].context == opened(*FLOAT["mlx"])[0].architecture.context - 1


@pytest.mark.parametrize("target", FLOAT)
def test_a_greedy_session_is_the_references(opened, golden, target):
    model, voices = opened(*FLOAT[target])
    prompt = system_prompt(model.architecture, golden["text_prompt"].tolist())
    session = Conversation(model, voices["NATF2"], prompt, GREEDY)
    assert len(voices["NATF2"].embeddings) + len(prompt) > model.context  # its ring has wrapped around
    for frame, user in enumerate(golden["user_tokens"]):
        text, agent = session.step(user)
        if frame:  # the text is of this frame, the newest whole frame of the agent is the one before
            assert golden["tokens"][frame][1:9].tolist() == agent.tolist()
        for found, name in ((session.text_logits, "text_logits"), (session.audio_logits, "audio_logits")):
            expected = golden[name][frame][: len(found)] if name == "audio_logits" else golden[name][frame]
            np.testing.assert_allclose(np.array(found), expected, atol=2e-4)
        assert text == golden["text_logits"][frame].argmax()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_session_is_that_of_the_model_that_is_verified(bundle, opened, golden, kind):
    model, voices = opened(*QUANTIZED[kind])
    a = model.architecture
    prompt = system_prompt(a, golden["text_prompt"].tolist())
    heard = golden["user_tokens"][:10].tolist()
    users = [Frame(user=tokens) for tokens in heard]
    folder = bundle(*QUANTIZED[kind])
    with closing(Bundle(folder, *layout_of(folder))) as held:
        slow = replace(model_of(held), context=model.context)
        expected = list(greedy(slow, a, voices["NATF2"], [*prompt, *users]))[len(prompt) :]
    session = Conversation(model, voices["NATF2"], prompt, GREEDY)
    assert len(model.steps) == 8
    for user, step in zip(heard, expected, strict=True):
        text, agent = session.step(user)
        assert agent.tolist() == step.tokens[1:9].tolist()
        np.testing.assert_allclose(np.array(session.text_logits), step.text_logits, atol=2e-4)
        np.testing.assert_allclose(np.array(session.audio_logits), step.audio_logits[:8], atol=2e-4)
        assert text == step.text_logits.argmax()


def test_frames_together_are_the_same_as_one_by_one(opened, golden, monkeypatch):
    monkeypatch.setattr(language_model, "_CHUNK", 7)
    model, voices = opened(*QUANTIZED["speech-swift"])
    voice = voices["NATF2"]
    columns, steps = Columns(model.architecture, voice), []
    for frame in system_prompt(model.architecture, golden["text_prompt"].tolist()):
        steps.append(columns.give(frame)[0].copy())
        columns.advance()
    read = np.stack(steps, 1)
    vectors = voice.embeddings.reshape(len(voice.embeddings), -1).astype(np.float32)
    together, alone = model.prefill(read, vectors), model.prefill(read[:, :0], vectors)
    step = model.temporal()
    for column in read.T:
        alone.grow()
        _, _, alone.keys, alone.values = step(mx.array(column), mx.array(alone.frames), alone.keys, alone.values)
        alone.frames += 1
    assert together.frames == alone.frames == len(vectors) + read.shape[1]
    for first, second in zip(together.keys + together.values, alone.keys + alone.values, strict=True):
        np.testing.assert_allclose(np.array(first), np.array(second), atol=1e-4)


def test_a_ring_that_grows_and_wraps_around_forgets_only_what_is_too_old(opened, monkeypatch):
    model, _ = opened(*FLOAT["mlx"])
    random = np.random.default_rng(0)
    columns = random.integers(0, model.architecture.card, (17, 40)).astype(np.int32)
    monkeypatch.setattr(language_model, "_INITIAL_CAPACITY", 4)
    kv_cache, step, rooms, found = model.prefill(columns[:, :0]), model.temporal(), set(), []
    for column in columns.T:
        kv_cache.grow()
        rooms.add(kv_cache.capacity)
        hidden, _, kv_cache.keys, kv_cache.values = step(
            mx.array(column), mx.array(kv_cache.frames), kv_cache.keys, kv_cache.values
        )
        kv_cache.frames += 1
        found.append(np.array(hidden[0, 0]))
    assert rooms == {4, 8, 15}
    whole = mx.array(columns)
    x = model.embed(whole)[None]
    for layer in model.layers:  # the same in one go, each frame seeing the 15 newest
        q, k, v = layer.heads(x, model.architecture.num_heads)
        q, k = (mx.fast.rope(p, p.shape[-1], traditional=True, base=10000, scale=1.0, offset=0) for p in (q, k))
        distance = mx.arange(40)[:, None] - mx.arange(40)
        mask = (distance >= 0) & (distance < 15)
        x = layer.rest(x, mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask))
    expected = np.array(mx.fast.rms_norm(x, model.out_norm, 1e-8)[0])
    np.testing.assert_allclose(np.stack(found), expected, atol=2e-4)


def self_generated(model, voices, users, sampling, seed):
    session = Conversation(model, voices["NATF0"], system_prompt(model.architecture, [5]), sampling, seed)
    return [(text, *agent.tolist()) for text, agent in map(session.step, users)]


def test_a_seed_tells_what_is_drawn(opened):
    model, voices = opened(*QUANTIZED["speech-swift"])
    users = np.random.default_rng(1).integers(0, model.architecture.card, (12, 8))
    first, again, other = (self_generated(model, voices, users, Sampling(), seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({frame[1] for frame in first}) > 1


def test_tokens_are_drawn_from_the_likeliest_by_their_probability():
    logits = mx.array([0.0, 3.0, 2.0, 1.0, 2.5])
    keys = mx.random.split(mx.random.key(3), 4000)
    drawn = np.array(mx.stack([draw(logits, 0.5, 3, key) for key in keys]))
    assert set(drawn) == {1, 2, 4}
    weights = np.exp(np.array([3.0, 2.0, 2.5]) / 0.5)
    found = np.array([(drawn == token).mean() for token in (1, 2, 4)])
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.03)
    assert set(np.array(mx.stack([draw(logits, 1.0, 0, key) for key in keys]))) == {0, 1, 2, 3, 4}
    assert draw(logits, 0.0, 3, keys[0]).item() == 1


def test_sampling_is_what_the_config_says():
    assert sampling_of({}) == Sampling(0.8, 250, 0.7, 25)
    assert sampling_of({"sampling": {"audio_temp": 0.5, "text_top_k": 3}}) == Sampling(0.5, 250, 0.7, 3)
    for wrong in (
        {"audio_temp": "hot"},
        {"text_top_k": 2.5},
        {"audio_temp": -1},
        {"audio_top_k": True},
        {"text_temp": float("nan")},
        [1],
    ):
        with pytest.raises(UserError, match=r"config\.json: sampling"):
            sampling_of({"sampling": wrong})
    with pytest.raises(UserError, match="a temperature is nan"):
        Sampling(text_temperature=float("nan"))


def test_what_a_frame_reads_is_counted(opened):
    model, _ = opened(*QUANTIZED["speech-swift"])
    a = model.architecture
    hidden, deep = a.hidden, a.depformer_hidden
    per_weight = 0.5 + 2 * 4 / 64  # codes, and float32 scales and biases of each group
    temporal = a.num_layers * (4 * a.dim**2 + 3 * a.dim * hidden) * per_weight
    temporal += 4 * a.text_card * a.dim + 2 * (1 + a.n_q) * a.dim  # the head in float32, a row of each table
    assert model.weights["temporal"] == temporal
    layer = (4 * a.depformer_dim**2 + 3 * a.depformer_dim * deep) * per_weight
    step = a.depformer_num_layers * layer + a.depformer_dim * a.dim * per_weight + 4 * a.card * a.depformer_dim
    assert model.weights["depformer"] == 8 * step


@pytest.mark.parametrize("kind", ["speech-swift", "moshi-mlx"])
def test_the_gpus_way_says_the_same(bundle, opened, golden, kind):
    """Keys and values as slices, projections joined, tables decoded: the same tokens, also once the ring is full."""
    folder = bundle(*QUANTIZED[kind])
    plain, voices = opened(*QUANTIZED[kind])
    with closing(Bundle(folder, *layout_of(folder))) as held:
        few = loader.load(held, "float32", few=True)
    assert few.projections is not None
    prompt = system_prompt(plain.architecture, golden["text_prompt"].tolist())
    said = []
    for model, sliced in ((plain, False), (few, True)):
        session = Conversation(model, voices["NATF2"], prompt, Sampling(), seed=3)
        session._temporal = model.temporal(sliced)
        said.append([(text, *agent.tolist()) for text, agent in map(session.step, golden["user_tokens"][:12])])
    assert said[0] == said[1]


def test_the_gpus_way_forgets_only_what_is_too_old(opened, monkeypatch):
    model, _ = opened(*FLOAT["mlx"])
    columns = np.random.default_rng(0).integers(0, model.architecture.card, (17, 24)).astype(np.int32)
    monkeypatch.setattr(language_model, "_INITIAL_CAPACITY", 4)
    found = []
    for sliced in (False, True):
        kv_cache, step, states = model.prefill(columns[:, :0]), model.temporal(sliced), []
        for column in columns.T:
            kv_cache.grow()
            hidden, _, kv_cache.keys, kv_cache.values = step(
                mx.array(column), mx.array(kv_cache.frames), kv_cache.keys, kv_cache.values
            )
            kv_cache.frames += 1
            states.append(np.array(hidden[0, 0]))
        found.append(np.stack(states))
    np.testing.assert_allclose(found[1], found[0], atol=2e-4)


def arrays_in(value):
    """Yield every array that a model holds."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from arrays_in(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from arrays_in(getattr(value, field.name))


@pytest.mark.parametrize("few", [False, True])
def test_a_loaded_model_has_nothing_left_to_compute(bundle, few):
    """What a compiled function finds unevaluated becomes part of it, and is computed again in each frame."""
    folder = bundle(*QUANTIZED["moshi-mlx"])
    with closing(Bundle(folder, *layout_of(folder))) as held:
        model = loader.load(held, "bfloat16", few=few)
    found = list(arrays_in(model))
    assert len(found) > 300
    for array in found:
        graph = io.StringIO()
        mx.export_to_dot(graph, array)
        assert "rectangle" not in graph.getvalue()  # an operation


@pytest.mark.parametrize("sliced", [False, True])
def test_compiling_ahead_changes_nothing_that_is_said(bundle, golden, monkeypatch, sliced):
    """Also where the cache is full, and the forgotten frame is written over the oldest."""
    folder = bundle(*QUANTIZED["moshi-mlx"])
    with closing(Bundle(folder, *layout_of(folder))) as held:
        model, voice = loader.load(held, "float32"), held.voices()[0]
    monkeypatch.setattr(language_model, "on_gpu", lambda: sliced)
    prompt = system_prompt(model.architecture, golden["text_prompt"].tolist())
    said = []
    for ahead in (False, True):
        session = Conversation(model, voice, prompt, Sampling(), seed=3)
        assert session.kv_cache.frames > session.kv_cache.capacity
        frames = []
        for user in golden["user_tokens"][:6]:
            if ahead:
                session.compile()
            text, agent = session.step(user)
            frames.append((text, *agent.tolist()))
        said.append(frames)
    assert said[0] == said[1]


def test_a_depformer_is_the_same_operations_whatever_is_still_in_use(opened):
    """A slice is written in place or into a copy, as it happens: a GPU's graphs would differ from frame to frame."""
    model, _ = opened(*QUANTIZED["moshi-mlx"])
    hidden = mx.zeros((1, 1, model.architecture.dim))
    text = mx.zeros(model.architecture.text_card)
    given = mx.full(1 + len(model.steps), -2, mx.int32)
    graph = io.StringIO()
    mx.export_to_dot(graph, model.depformer(GREEDY)(hidden, text, given, mx.random.key(0))[0])
    assert "QuantizedMatmul" in graph.getvalue()
    assert "SliceUpdate" not in graph.getvalue()
