"""The store that is written in a thread, from tensors of a GPU too."""

import numpy as np
import pytest
import torch
from ppx.calibrate import store_writer
from ppx.calibrate.store_writer import StoreWriter
from ppx.convert.bundle.quantized_store import QuantizedStore
from ppx.quant.affine import FLOAT32, QuantizationConfig, Quantized, quantize
from ppx.quant.packed_matrix import PackedMatrix, packed_matrix

FORM = QuantizationConfig(4, 64)


def matrices(count: int) -> dict[tuple[str, int], Quantized]:
    """Some quantized matrices."""
    random = np.random.default_rng(0)
    return {("m", n): quantize(random.normal(size=(8, 128)).astype(np.float32), FORM) for n in range(count)}


def assert_stored(store: QuantizedStore, made: dict[tuple[str, int], Quantized]) -> None:
    """Compare what a store holds."""
    assert set(store.files) == set(made)
    for key, expected in made.items():
        found = store.read(key, 0, store.rows(key), FLOAT32)
        for name in ("weight", "scales", "biases"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_what_is_added_is_in_the_store(tmp_path):
    made = matrices(3)
    with QuantizedStore(tmp_path / "store", "x") as store, StoreWriter(store) as writer:
        for key, matrix in made.items():
            writer.add(f"block {key[1]}", {key: packed_matrix(matrix)}, {})
        writer.finish()
        assert_stored(store, made)


def test_what_writing_raises_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(QuantizedStore, "add", broken)
    with QuantizedStore(tmp_path / "store", "x") as store, StoreWriter(store) as writer:
        writer.add("a block", {("m", 0): packed_matrix(matrices(1)["m", 0])}, {})
        with pytest.raises(OSError, match="no space left"):
            writer.finish()


def test_tensors_are_copied_where_no_memory_can_be_pinned(monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("cannot pin")

    monkeypatch.setattr(torch, "empty_like", refused)
    values = torch.arange(3)
    assert torch.equal(store_writer._on_host(values), values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_tensors_of_a_gpu_are_stored_beside_those_of_the_processor(tmp_path):
    made = matrices(2)
    (first, here), (second, there) = made.items()
    on_gpu = PackedMatrix(*(part.cuda() for part in vars(packed_matrix(there)).values()))
    with QuantizedStore(tmp_path / "store", "x") as store, StoreWriter(store) as writer:
        for number in range(3):  # the stream is used again
            writer.add(f"block {number}", {first: packed_matrix(here), second: on_gpu}, {})
        writer.finish()
        assert_stored(store, made)
