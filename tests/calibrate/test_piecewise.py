"""Weights that are read some rows at a time."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ppx.calibrate import piecewise
from ppx.calibrate.piecewise import PiecewiseReader
from ppx.convert.source.source import locate, open_source
from ppx.model.weights import source_weights

NAMES = [
    ("text_linear.weight", None),
    ("depformer.layers.1.self_attn.in_proj_weight", 3),  # stacked
    ("transformer.layers.0.norm1.alpha", None),
    ("transformer.layers.1.gating.linear_in.weight", None),
]
DEVICES = [None, "cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("piece", [1, 5000, 8 << 20])
def test_pieces_are_the_whole(pico, where, piece, monkeypatch):
    monkeypatch.setattr(piecewise, "_PIECE", piece)
    with open_source(locate(str(pico))) as source:
        read = PiecewiseReader(source.checkpoint, where and torch.device(where))
        expected = source_weights(source.checkpoint)
        with ThreadPoolExecutor(2) as threads:
            for (name, step), values in zip(NAMES, threads.map(lambda key: read(*key), NAMES), strict=True):
                assert values.dtype == torch.bfloat16
                assert values.device.type == (where or "cpu")
                assert values.is_pinned() == (where is None and torch.cuda.is_available())
                assert torch.equal(values.cpu(), expected(name, step))


def test_pieces_of_merged_tensors_are_the_whole(pico, monkeypatch):
    monkeypatch.setattr(piecewise, "_PIECE", 5000)
    name = "transformer.layers.0.self_attn.out_proj.weight"

    def merge(_: str, first: int, weights: np.ndarray) -> np.ndarray:
        return weights.astype(np.float32) + np.arange(first, first + len(weights), dtype=np.float32)[:, None]

    with open_source(locate(str(pico))) as source:
        merged = source.checkpoint.with_adapter(merge, [name], source.checkpoint.file)
        values = PiecewiseReader(merged, None)(name, None)
        assert values.dtype == torch.float32
        assert torch.equal(values, source_weights(merged)(name, None))
