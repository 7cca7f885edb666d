"""The PyTorch reference against what NVIDIA's code put out for the same weights and tokens."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import assert_near, assert_same_session, recorded, session
from ppx.convert.source.source import Source, locate, open_source
from ppx.convert.tensorfile import TensorFile
from ppx.model.blocks import blocks_of
from ppx.model.forward import KVCache
from ppx.model.reference import reference_of
from ppx.model.weights import each_once, sorted_rows, source_weights
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def source(pico: Path) -> Iterator[Source]:
    with open_source(locate(str(pico))) as opened:
        yield opened


def test_every_recorded_tensor_in_float32(source, pico):
    golden = load_file(pico / "golden" / "forward_float32.safetensors")
    assert golden["tokens"].min() == -1
    assert golden["tokens"].max() == source.architecture.text_card  # an initial token
    found = recorded(reference_of(source.checkpoint), source.architecture, golden["tokens"].numpy())
    assert_near(found, golden, 1e-5)


def test_every_recorded_tensor_in_bfloat16(source, pico):
    golden = load_file(pico / "golden" / "forward_bfloat16.safetensors")
    exact = load_file(pico / "golden" / "forward_float32.safetensors")
    found = recorded(reference_of(source.checkpoint, torch.bfloat16), source.architecture, golden["tokens"].numpy())
    for name, array in found.items():
        first, second, third = array, golden[name].float().numpy(), exact[name].numpy()
        noise = np.linalg.norm(second - third)  # what bfloat16 costs the reference itself
        assert np.linalg.norm(first - second) <= 1.5 * noise + 1e-6 * np.linalg.norm(third), name
        assert np.linalg.norm(first - third) <= 1.2 * noise + 1e-6 * np.linalg.norm(third), name


def test_a_greedy_session_token_for_token(source, pico):
    steps, golden = session(source, reference_of(source.checkpoint), pico)
    assert_same_session(steps, golden, 1e-5)


def test_frames_in_one_pass_and_one_by_one(source, pico):
    """More frames than the context, so that what falls out of it is forgotten in both."""
    model, tokens = (
        reference_of(source.checkpoint),
        load_file(pico / "golden" / "forward_float32.safetensors")["tokens"],
    )
    x = model.embed(tokens.numpy())
    kv_cache: KVCache = {}
    whole, pieces = x, []
    for block in blocks_of(source.architecture, "temporal"):
        _, whole = model.block(block, whole)
    for first, last in ((0, 5), (5, 6), (6, 20), (20, x.shape[1])):
        part = x[:, first:last]
        for block in blocks_of(source.architecture, "temporal"):
            _, part = model.block(block, part, kv_cache, first)
        pieces.append(part)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5 * np.abs(whole).max())


def test_steps_of_the_depformer_see_all_before_them_and_none_after(source):
    model, a = reference_of(source.checkpoint), source.architecture
    block = blocks_of(a, "depformer")[0]
    x = np.random.default_rng(0).standard_normal((2, a.steps, a.depformer_dim), np.float32)
    _, before = model.block(block, x)
    for changed in (0, 7, a.steps - 1):
        other = x.copy()
        other[:, changed] += 1
        differs = (model.block(block, other)[1] != before).any(axis=(0, 2))
        assert differs.tolist() == [step >= changed for step in range(a.steps)]


@pytest.mark.parametrize("near", [1, 3, 32])
def test_rows_of_a_table_are_those_of_the_whole_table(source, near, monkeypatch):
    monkeypatch.setattr("ppx.model.weights._NEAR", near)
    monkeypatch.setattr("ppx.model.weights._AT_ONCE", 16)
    name, read = "text_emb.weight", []
    file = source.checkpoint.file

    def counted(tensor, first, last, once=False):
        read.append(last - first)
        return TensorFile.read(file, tensor, first, last, once)

    monkeypatch.setattr(file, "read", counted)
    tokens = np.array([[0, 5, 5, 6], [9, 40, 14, 15], [16, 47, 48, 0]])
    rows = each_once(sorted_rows(source.checkpoint), "cpu")(name, tokens)
    assert max(read) <= 16
    assert sum(read) <= {1: 10, 3: 14, 32: 49}[near]
    assert torch.equal(rows, source_weights(source.checkpoint)(name, None)[torch.from_numpy(tokens)])
