"""Weights that are read while others are computed with."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ppx.calibrate import read_ahead
from ppx.calibrate.read_ahead import ReadAhead, keys_of
from ppx.convert.source.source import Source, locate, open_source
from ppx.model.blocks import blocks_of
from ppx.model.reference import reference_of
from ppx.model.weights import kept_by

Read = list[tuple[str, int, bool]]  # name, step, and whether the main thread did


@pytest.fixture
def source(pico) -> Iterator[Source]:
    with open_source(locate(str(pico))) as source:
        yield source


def compute(source: Source, component: str, backward: bool, active: bool) -> Read:
    """Take a stream through a component's blocks with a model that reads ahead; return what was read."""
    model, read, a = reference_of(source.checkpoint), [], source.architecture

    def weights(name: str, step: int | None) -> torch.Tensor:
        read.append((name, step or 0, threading.current_thread() is threading.main_thread()))
        return model.weights(name, step)

    blocks = blocks_of(a, component)[:: -1 if backward else 1]
    x = torch.zeros(2, 3, a.dim if component == "temporal" else a.depformer_dim)  # of three frames or steps
    with ReadAhead(weights, a, active=active) as ahead:
        ahead.follow(blocks, 3)
        for block in blocks:
            ahead.at(block)
            replace(model, weights=kept_by({}, ahead.weights, "cpu")).added(block, x)
        ahead.weights("out_norm.alpha", None)
    return read


@pytest.mark.parametrize("component", ["temporal", "depformer"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
def test_all_that_blocks_read_is_read_once_and_ahead(blocks, source, component, backward, monkeypatch):
    monkeypatch.setattr(read_ahead, "_BLOCKS", blocks)
    read = compute(source, component, backward, active=True)
    assert len(read) == len({key[:2] for key in read})
    assert [name for name, _, in_main in read if in_main] == ["out_norm.alpha"]


def test_no_more_blocks_are_read_ahead_than_there_is_memory_for(source, monkeypatch):
    monkeypatch.setattr(read_ahead, "_BLOCKS", 2)
    blocks = blocks_of(source.architecture, "temporal")
    expected = [keys_of(block, 16) for block in blocks]
    with ReadAhead(reference_of(source.checkpoint).weights, source.architecture) as ahead:
        ahead.follow(blocks)
        assert list(ahead._ahead) == [*expected[0], *expected[1]]
        ahead.at(blocks[0])
        assert list(ahead._ahead) == [*expected[0], *expected[1], *expected[2]]


def test_nothing_is_read_ahead_unless_it_is_active(source):
    read = compute(source, "temporal", backward=False, active=False)
    assert read
    assert all(in_main for *_, in_main in read)


def test_an_error_of_reading_is_raised_where_the_matrix_is_asked_for(source):
    def broken(name: str, step: int | None) -> torch.Tensor:
        raise OSError(f"{name} {step}")

    blocks = blocks_of(source.architecture, "temporal")
    with ReadAhead(broken, source.architecture) as ahead:
        ahead.follow(blocks)
        with pytest.raises(OSError, match="in_proj"):
            ahead.weights(blocks[0].matrices(1)[0][0], None)
