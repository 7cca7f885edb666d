"""Which calibration sequences, and which of their frames, go through the two models: as many as fit into a stream."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..convert.source.architecture import Architecture
from ..model.forward import Tokens
from ..model.tokens import TokenSet, evenly_spaced
from .work import STREAM_BYTES
from .workers import Workers


def fitting_sequences(token_set: TokenSet, a: Architecture) -> TokenSet:
    """Return the sequences that go through the temporal transformer, of all workers."""
    count, _, frames = token_set.tokens.shape
    return token_set.chosen(_fitting(count, frames * a.dim))


def most_workers(token_set: TokenSet, a: Architecture) -> int:
    """Return how many workers there can be: each needs a sequence in which audio is known."""
    return int(fitting_sequences(token_set, a).counted[:, 1 : a.steps + 1].any((1, 2)).sum())


def depformer_rows(
    fitting: TokenSet, hidden: dict[str, Tensor], a: Architecture, workers: Workers
) -> tuple[dict[str, Tensor], Tokens]:
    """Return the hidden states ``[rows, dim]`` and tokens ``[rows, streams]`` that a worker's depformer reads.

    hidden: ``[sequences, frames, dim]`` by model, of the worker's own sequences. Frames in which audio is known are
    divided evenly between workers, whichever sequences they belong to.
    """
    frames, streams = fitting.tokens.shape[2], fitting.tokens.shape[1]
    known = np.flatnonzero(fitting.counted[:, 1 : a.steps + 1].any(1))
    rows = known[_fitting(len(known), a.steps * a.depformer_dim)]
    own = workers.share(len(fitting.tokens))
    here = rows[(rows >= own.start * frames) & (rows < own.stop * frames)] - own.start * frames
    share = workers.share(len(rows))
    states = {}
    for name, x in hidden.items():
        chosen = x.flatten(0, 1)[torch.from_numpy(here).to(x.device)]
        states[name] = workers.concatenated(chosen)[0][share]
    return states, fitting.targets.transpose(0, 2, 1).reshape(-1, streams)[rows[share]]


def _fitting(count: int, floats: int) -> NDArray[np.int64]:
    """Return which of ``count`` sequences or rows, of so many floats each, fit into a stream."""
    return evenly_spaced(count, max(1, STREAM_BYTES // (4 * floats)))
