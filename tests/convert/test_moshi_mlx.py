"""Bundles for moshi-mlx, in the real moshi_mlx 0.3.0 beside the current mlx, through their own config.json."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from moshi_mlx import models as moshi_models
from moshi_mlx.utils import Sampler
from safetensors.numpy import load_file

QUANTIZED = {"moshi-q4": (4, 32), "moshi-q8": (8, 64), "bf16": None}
FRAMES = 16  # moshi_mlx attends to one key too many beyond pico's context of 16


@pytest.fixture(autouse=True)
def on_the_cpu():
    with mx.stream(mx.cpu):
        yield


def load(folder: Path) -> moshi_models.Lm:
    """Load a bundle as moshi_mlx's own programs do."""
    config = json.loads((folder / "config.json").read_text())
    name = config["moshi_name"]
    model = moshi_models.Lm(moshi_models.LmConfig.from_config_dict(config))
    model.set_dtype(mx.bfloat16)
    for end, (bits, size) in {".q4.safetensors": (4, 32), ".q8.safetensors": (8, 64)}.items():
        if name.endswith(end):
            nn.quantize(model, bits=bits, group_size=size)
    model.load_weights(str(folder / name), strict=True)
    return model


def embed(table: Callable[[mx.array], mx.array], tokens: mx.array) -> mx.array:
    """Look tokens up; -1 gives zeros (nn.QuantizedEmbedding, which replaces moshi's own class, does not know it)."""
    found = table(mx.maximum(tokens, 0))
    return mx.where((tokens >= 0)[..., None], found, mx.zeros_like(found))


def logits(model: moshi_models.Lm, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """Text logits [B, T, card] and audio logits [B, steps, T, card], teacher-forced: step k reads codebook k - 1."""
    frames = embed(model.text_emb, tokens[:, 0])
    for stream, table in enumerate(model.audio_embs, 1):
        frames = frames + embed(table, tokens[:, stream])
    hidden = []
    for cache in model.transformer_cache:
        cache.reset()
    for t in range(tokens.shape[2]):
        hidden.append(model.transformer(frames[:, t : t + 1], cache=model.transformer_cache))
    hidden = model.out_norm(mx.concatenate(hidden, axis=1))
    audio = []
    rows = hidden.reshape(-1, 1, hidden.shape[-1])
    for cache in model.depformer_cache:
        cache.reset()
    for step, piece in enumerate(model.depformer.slices):
        read = embed(piece.emb, tokens[:, step].reshape(-1, 1))
        xs = piece.transformer(piece.linear_in(rows) + read, cache=model.depformer_cache)
        audio.append(piece.linear_out(xs).reshape(tokens.shape[0], tokens.shape[2], -1))
    return model.text_linear(hidden), mx.stack(audio, axis=1)


def divergence(reference: mx.array, other: mx.array) -> float:
    """Mean Kullback-Leibler divergence, in nats."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (reference, other))
    return float(np.array((mx.exp(p) * (p - q)).sum(-1).mean()))


@pytest.fixture(scope="module")
def golden(pico):
    held = load_file(pico / "golden" / "forward_float32.safetensors")
    return {
        "tokens": mx.array(held["tokens"][:, :, :FRAMES]),
        "text": mx.array(held["text_logits"][:, :FRAMES]),
        "audio": mx.array(held["audio_logits"][:, :, :FRAMES]),
    }


# Bounds in nats, a few times what quantization costs this model; one wrong name, order or scale costs over 1.
# In float32: the rounding of bfloat16 arithmetic alone costs as much as 8-bit weights do.
@pytest.mark.parametrize(("recipe", "text_bound", "audio_bound"), [("moshi-q4", 0.02, 0.15), ("moshi-q8", 2e-4, 1e-3)])
def test_quantized_bundles_load_strictly_and_predict_as_the_reference_does(
    recipe, text_bound, audio_bound, bundle, golden
):
    model = load(bundle("--recipe", recipe))
    model.set_dtype(mx.float32)
    text, audio = logits(model, golden["tokens"])
    assert divergence(golden["text"], text) < text_bound
    assert divergence(golden["audio"], audio) < audio_bound


def test_the_bf16_bundle_in_float32_gives_the_golden_logits(bundle, golden):
    model = load(bundle("--recipe", "bf16"))
    model.set_dtype(mx.float32)
    for ours, reference in zip(logits(model, golden["tokens"]), (golden["text"], golden["audio"]), strict=True):
        expected = np.array(reference)
        np.testing.assert_allclose(np.array(ours), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_the_runtimes_own_step_gives_tokens(recipe, bundle):
    model = load(bundle("--recipe", recipe))
    start = mx.array([[model.cfg.text_out_vocab_size]])
    silence = [mx.array([[0]])] * model.cfg.audio_codebooks
    text, audio = model.sample(start, silence, Sampler(), Sampler())
    assert 0 <= np.array(text).item() < 400
    tokens = np.array(audio)
    assert tokens.size == 16
    assert 0 <= tokens.min() <= tokens.max() < 128


@pytest.mark.parametrize("recipe", ["moshi-q4", "bf16"])
def test_the_first_8_depformer_steps_alone_say_the_same(recipe, bundle, golden):
    """What predicts the user's codebooks changes nothing of the agent's: not one bit of a logit, and no token."""
    whole, half = load(bundle("--recipe", recipe)), load(bundle("--recipe", recipe, "--depformer-steps", "8"))
    assert (len(whole.depformer.slices), len(half.depformer.slices)) == (16, 8)
    (text, audio), (half_text, half_audio) = (logits(model, golden["tokens"]) for model in (whole, half))
    assert mx.array_equal(text, half_text).item()
    assert mx.array_equal(audio[:, :8], half_audio).item()
    said = []
    for model in (whole, half):
        greedy = Sampler(temp=0.0)
        token, heard, frames = mx.array([[model.cfg.text_out_vocab_size]]), [mx.array([[0]])] * 16, []
        for cache in (*model.transformer_cache, *model.depformer_cache):
            cache.reset()
        for frame in range(FRAMES):
            token, codes = model.sample(token, heard, greedy, greedy)
            assert codes is not None
            frames.append([np.array(token).item(), *np.array(codes).reshape(-1)[:8].tolist()])
            agent, user = frames[-1][1:], [(7 * frame + k) % 128 for k in range(8)]
            heard = [mx.array([[code]]) for code in (*agent, *user)]
            token = token.reshape(1, 1)
        said.append(frames)
    assert said[0] == said[1]
    assert len({tuple(frame) for frame in said[0]}) > 3


def test_the_user_s_steps_are_accounted_for(bundle):
    whole, half = bundle("--recipe", "moshi-q4"), bundle("--recipe", "moshi-q4", "--depformer-steps", "8")
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, half)]
    assert manifests[1]["parameters"] < manifests[0]["parameters"]
    assert manifests[1]["files"]["model.q4.safetensors"]["size"] < manifests[0]["files"]["model.q4.safetensors"]["size"]
    gone = {entry["source"] for entry in manifests[0]["tensors"]} - {
        entry["source"] for entry in manifests[1]["tensors"]
    }
    dropped = set(manifests[1]["dropped"])
    assert gone <= dropped
    layers = manifests[0]["architecture"]["depformer_num_layers"]
    assert sum(" rows " in name for name in dropped) == 2 * layers
    config = json.loads((half / "config.json").read_text())
    assert (config["dep_q"], config["depformer_context"], config["n_q"]) == (8, 8, 16)
