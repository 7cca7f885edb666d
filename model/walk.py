"""The one traversal of PersonaPlex's blocks: of one stream, or of several side by side.

A stream is what a model has computed so far: ``[sequences, frames, dim]`` in the temporal transformer, ``[rows, steps,
depformer_dim]`` in the depformer. Comparison, sensitivity measurement and layer-wise GPTQ take several streams through
the same blocks (``walk``) and say what happens at each of them; sessions take one, with a KV cache
(``forward_blocks``); the reference's differentiable forward pass takes a tensor (``each_block``). Streams are arrays,
or tensors that stay on their device.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np

from ..convert.source.architecture import Architecture
from .blocks import Block, blocks_of
from .forward import Floats, KVCache, Model, Tokens

X = TypeVar("X")
Key = TypeVar("Key")
# Entered in front of a block with all streams, left behind it. Gives the streams that it computed itself: those replace
# what goes through the block, or begin behind it.
AtBlock = Callable[[Block, dict[Key, X]], AbstractContextManager[Mapping[Key, X]]]


def each_block(architecture: Architecture, component: str, x: X, compute: Callable[[Block, X], X]) -> X:
    """Return what ``compute`` makes of ``x``, block after block of a component."""
    for block in blocks_of(architecture, component):
        x = compute(block, x)
    return x


def forward_blocks(
    model: Model, architecture: Architecture, component: str, x: Floats, kv_cache: KVCache | None = None, first: int = 0
) -> Floats:
    """Take one stream through a component at once; see ``Model.block`` for ``kv_cache`` and ``first``."""
    return each_block(architecture, component, x, lambda block, x: model.block(block, x, kv_cache, first)[1])


def walk(
    architecture: Architecture,
    component: str,
    streams: dict[Key, X],
    through: Callable[[Key, Block, X], object],
    at_block: AtBlock[Key, X],
    progress: Callable[[int], Any] = lambda _: None,
) -> dict[Key, X]:
    """Take several streams through a component side by side; return them, changed in place by ``through``.

    Holds the streams, what a model needs for a batch of rows, and what ``at_block`` holds: models read the weights of a
    block when it is computed. progress: called with 1 after each stream and block that is computed here.
    """

    def compute(block: Block, streams: dict[Key, X]) -> dict[Key, X]:
        with at_block(block, streams) as computed:
            for key, x in streams.items():
                if key not in computed:
                    through(key, block, x)
                    progress(1)
            streams |= computed
        return streams

    return each_block(architecture, component, streams, compute)


def advance(model: Model, block: Block, x: Floats) -> None:
    """Take a stream through a block, in place."""
    for rows in block.batches(x.shape):
        x[rows] = model.block(block, x[rows])[1]


def run_block(model: Model, block: Block, x: Floats) -> tuple[Floats, Floats]:
    """Return what a block computes for a whole stream, and the stream with it added; ``x`` stays as it is."""
    batches = [model.block(block, x[rows]) for rows in block.batches(x.shape)]
    if len(batches) == 1:
        return batches[0]
    return np.concatenate([added for added, _ in batches]), np.concatenate([after for _, after in batches])


def step_inputs(model: Model, hidden: Floats, previous: Tokens, steps: int) -> Floats:
    """Return what the first ``steps`` depformer steps read, ``[rows, steps, depformer_dim]``.

    hidden: ``[rows, dim]``. previous: the rows' tokens, ``[rows, streams]``: step k reads that of stream k.
    """
    first = model.step_input(0, hidden, previous[:, 0])
    x = np.empty((len(first), steps, first.shape[1]), np.float32)
    for step in range(steps):
        x[:, step] = model.step_input(step, hidden, previous[:, step]) if step else first
    return x
