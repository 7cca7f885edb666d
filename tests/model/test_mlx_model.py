"""The MLX model of a bundle against the same golden files, for all three targets."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from golden import assert_near, assert_same_session, recorded, session
from ppx.convert.bundle.reader import Bundle, layout_of
from ppx.convert.source.source import locate, open_source
from ppx.model.blocks import blocks_of
from ppx.model.forward import KVCache, Tokens
from ppx.model.mlx_model import model_of
from ppx.model.mlx_weights import read_by_name
from ppx.model.reference import TorchModel
from ppx.model.weights import to_torch
from safetensors.torch import load_file

UNEVEN = str(Path(__file__).parent.parent / "data" / "uneven.toml")
FLOAT = {
    "speech-swift": ("--no-quantize", "--target", "speech-swift", "--dtype", "bfloat16"),
    "moshi-mlx": ("--recipe", "bf16"),
    "mlx": ("--no-quantize", "--target", "mlx"),
}
QUANTIZED = {
    "speech-swift": ("--recipe", "4bit"),
    "moshi-mlx": ("--recipe", "moshi-q4"),
    "mlx": ("--recipe", UNEVEN),
}


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def opened(folder: Path) -> closing[Bundle]:
    return closing(Bundle(folder, *layout_of(folder)))


@pytest.mark.parametrize("target", FLOAT)
def test_every_recorded_tensor(target, bundle, pico):
    golden = load_file(pico / "golden" / "forward_float32.safetensors")
    with opened(bundle(*FLOAT[target])) as held:
        found = recorded(model_of(held), held.architecture, golden["tokens"].numpy())
    assert_near(found, golden, 1e-5)


@pytest.mark.parametrize("target", FLOAT)
def test_a_greedy_session_token_for_token(target, bundle, pico):
    with open_source(locate(str(pico))) as source, opened(bundle(*FLOAT[target])) as held:
        voices = {voice.name: voice for voice in held.voices()}
        assert len(voices) == 18
        own = type(source)(source.location, source.checkpoint, list(voices.values()), [])  # the bundle's own voices
        steps, golden = session(own, model_of(held), pico)
    assert_same_session(steps, golden, 1e-5)


@pytest.mark.parametrize("target", QUANTIZED)
def test_packed_weights_compute_what_their_values_compute(target, bundle, pico):
    """MLX on packed weights, and PyTorch on the values that mx.dequantize makes of them: the same to float32."""
    golden = load_file(pico / "golden" / "forward_float32.safetensors")
    tokens = golden["tokens"].numpy()
    with opened(bundle(*QUANTIZED[target])) as held:
        assert any(output.quantization for output in held.layout.every())
        a = held.architecture

        def weights(name: str, step: int | None) -> torch.Tensor:
            return to_torch(np.array(read_by_name(held, name, step).float32()))

        def rows(name: str, ids: Tokens) -> torch.Tensor:
            return weights(name, None)[torch.from_numpy(ids).long()]

        plain = TorchModel(a, weights, rows, torch.float32, a.context, a.steps)
        expected = recorded(plain, a, tokens)
        found = recorded(model_of(held), a, tokens)
    for name, array in found.items():
        assert np.abs(array - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max(), name
        assert not np.allclose(array, golden[name].numpy(), rtol=1e-3) or name == "temporal.embed"


def test_frames_in_one_pass_and_one_by_one(bundle, pico):
    tokens = load_file(pico / "golden" / "forward_float32.safetensors")["tokens"].numpy()
    with opened(bundle(*QUANTIZED["speech-swift"])) as held:
        model = model_of(held)
        kv_cache: KVCache = {}
        whole = model.embed(tokens)
        pieces = [whole[:, first : first + 1] for first in range(whole.shape[1])]
        for block in blocks_of(held.architecture, "temporal"):
            _, whole = model.block(block, whole)
            pieces = [model.block(block, piece, kv_cache, first)[1] for first, piece in enumerate(pieces)]
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("target", FLOAT)
def test_it_attends_as_far_as_the_bundles_config_says(target, bundle, tmp_path):
    shutil.copytree(bundle(*FLOAT[target]), tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    for place in (config, config.get("temporal", {}), config.get("depformer", {})):
        for key, value in (("context", 9), ("depformer_context", 5)):
            place |= {key: value} if key in place else {}
    if target == "speech-swift":
        config["depformer"]["context"] = 5
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    with opened(tmp_path / "mine") as held:
        assert held.attention_spans() == (9, 5)
        model = model_of(held)
        assert (model.context, model.steps_seen) == (9, 5)
        x = np.random.default_rng(0).standard_normal((1, 20, held.architecture.dim), np.float32)
        other = x.copy()
        other[:, 4] += 1
        block = blocks_of(held.architecture, "temporal")[0]
        differs = (model.block(block, other)[1] != model.block(block, x)[1]).any(axis=(0, 2))
    assert differs.tolist() == [4 <= frame < 13 for frame in range(20)]
