"""The traversal: order of blocks, streams in place, what happens at a block, batches of rows."""

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from ppx.convert.source.architecture import Architecture
from ppx.model.blocks import SUBLAYERS, Block
from ppx.model.walk import advance, forward_blocks, run_block, step_inputs, walk

ARCHITECTURE = Architecture(num_layers=2, depformer_num_layers=1)
BLOCKS = [Block("temporal", layer, sublayer) for layer in (0, 1) for sublayer in SUBLAYERS]


class Doubling:
    """Each block doubles the stream and adds its place in the order; notes how much goes through it at a time."""

    def __init__(self):
        self.batches = []

    def block(self, block, x, kv_cache=None, first=0):
        del kv_cache, first
        self.batches.append((block, len(x)))
        added = x + np.float32(BLOCKS.index(block))
        return added, x + added

    def step_input(self, step, hidden, previous):
        return hidden * step + previous[:, None]


def doubling() -> Any:  # which has what blocks need of a Model
    return Doubling()


def by(*models):
    """What takes a stream through a block: the models of the streams called a, b, ..."""
    return lambda name, block, x: advance(models["ab".find(name)], block, x)


def through(x, blocks):
    for block in blocks:
        x = 2 * x + BLOCKS.index(block)
    return x


def streams_of(*names):
    return {name: np.full((3, 1024, 1), index, np.float32) for index, name in enumerate(names, 1)}


@contextmanager
def nothing(_block, _streams):
    yield {}


def test_streams_go_through_all_blocks_in_order_and_in_place():
    streams, model = streams_of("a", "b"), doubling()
    held, called = dict(streams), list[int]()
    walk(ARCHITECTURE, "temporal", streams, by(model, model), nothing, called.append)
    for index, name in enumerate("ab", 1):
        assert streams[name] is held[name]  # nothing the size of a stream is kept beside it
        assert (streams[name] == through(index, BLOCKS)).all()
    assert model.batches == [(block, rows) for block in BLOCKS for _ in "ab" for rows in (2, 1)]  # 2048 frames each
    assert len(called) == 2 * len(BLOCKS)


def test_a_stream_that_begins_at_a_block_goes_through_those_behind_it():
    streams, model, seen = streams_of("a"), doubling(), []

    @contextmanager
    def at_block(block, streams):
        before = streams["a"].copy()
        yield {"new": 5 * before} if block == BLOCKS[1] else {}
        seen.append((block, float(streams["a"].flat[0]), float(before.flat[0])))

    walk(ARCHITECTURE, "temporal", streams, by(model), at_block)
    assert (streams["new"] == through(5 * through(1, BLOCKS[:1]), BLOCKS[2:])).all()
    expected = [through(1, BLOCKS[:count]) for count in range(len(BLOCKS) + 1)]
    assert seen == [(block, expected[count + 1], expected[count]) for count, block in enumerate(BLOCKS)]


def test_a_stream_that_is_computed_at_a_block_is_not_computed_again():
    streams, model = streams_of("a", "b"), doubling()

    @contextmanager
    def at_block(block, streams):
        yield {"a": run_block(model, block, streams["a"])[1]}

    walk(ARCHITECTURE, "temporal", streams, by(None, model), at_block)
    assert (streams["a"] == through(1, BLOCKS)).all()
    assert (streams["b"] == through(2, BLOCKS)).all()


def test_an_error_at_a_block_is_raised():
    @contextmanager
    def at_block(_block, _streams):
        yield {}
        raise OverflowError

    with pytest.raises(OverflowError):
        walk(ARCHITECTURE, "temporal", streams_of("a"), by(doubling()), at_block)


def test_one_stream_at_once_and_a_block_in_batches():
    x = streams_of("a")["a"]
    assert (forward_blocks(doubling(), ARCHITECTURE, "temporal", x) == through(1, BLOCKS)).all()
    added, after = run_block(doubling(), BLOCKS[3], x)
    assert (x == 1).all()
    assert (added == 4).all()
    assert (after == 5).all()
    assert added.shape == after.shape == x.shape


def test_inputs_of_steps():
    hidden, previous = np.ones((4, 2), np.float32), np.arange(12, dtype=np.int32).reshape(4, 3)
    x = step_inputs(doubling(), hidden, previous, 2)
    assert x.shape == (4, 2, 2)
    assert x[:, :, 0].tolist() == [[3.0 * row, 3.0 * row + 2] for row in range(4)]
