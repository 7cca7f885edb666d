"""A voice from the codec tokens of a recording, step by step as the reference's voice prompt makes one.

The agent's codebooks are the recording's tokens, the text is padding, the user's codebooks are a tone. The reference
steps over these frames, keeps the summed input embeddings of each temporal step, and its ring of tokens as the last
step leaves it. Both follow from the tokens alone: every stream is given, so nothing that the model predicts gets into
them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..convert.source.architecture import Architecture
from ..convert.source.checkpoint import Checkpoint
from ..convert.source.recorded_voice import check_codes, table_names
from ..convert.source.voices import Voice
from ..quant.affine import BFLOAT16
from .session import SINE, UNKNOWN

# Name of an embedding table and row numbers -> its rows ``[rows, dim]``, in any float dtype.
EmbeddingRows = Callable[[str, NDArray[np.int64]], NDArray[Any]]
_MORE_SLOTS = 3  # of the ring of tokens, above the longest delay


def make_voice(name: str, codes: NDArray[Any], architecture: Architecture, rows: EmbeddingRows) -> Voice:
    """Return the voice of a recording's tokens ``[codebooks, frames]``, over the embedding tables that ``rows`` reads.

    Its embeddings are those of frames - 1 steps: the first frame only fills the ring. Raises ValueError for tokens that
    this model does not have.
    """
    check_codes(codes, architecture)
    frames = _frames(codes, architecture)
    columns = _columns(frames, architecture)
    vectors = embedding_sums(columns[:, :-1], architecture, rows)
    return Voice(name, vectors[:, None, None], _ring(frames, architecture))


def embedding_sums(columns: NDArray[np.int64], architecture: Architecture, rows: EmbeddingRows) -> NDArray[Any]:
    """Return the summed embeddings ``[columns, dim]`` of columns of tokens ``[streams, columns]``, in bfloat16.

    Codebook after codebook, then the text: in 16 bit the order makes a difference. Token -1 adds nothing.
    """
    text, *audio = table_names(architecture)
    total: NDArray[Any] | None = None
    for name, tokens in zip((*audio, text), (*columns[1:], columns[0]), strict=True):
        used, places = np.unique(np.maximum(tokens, 0), return_inverse=True)
        vectors = rows(name, used).astype(BFLOAT16)[places.reshape(-1)]
        vectors[tokens < 0] = 0
        total = vectors if total is None else total + vectors
    if total is None:
        raise ValueError("no stream to embed")
    return total


def rows_of(checkpoint: Checkpoint) -> EmbeddingRows:
    """Return what reads rows of a checkpoint's embedding tables."""

    def rows(name: str, numbers: NDArray[np.int64]) -> NDArray[Any]:
        return np.concatenate([checkpoint.read(name, number, number + 1) for number in numbers.tolist()])

    return rows


def _frames(codes: NDArray[Any], architecture: Architecture) -> NDArray[np.int64]:
    """Return the tokens of all streams ``[streams, frames]``, without delays."""
    half, count = architecture.n_q // 2, codes.shape[1]
    frames = np.empty((1 + architecture.n_q, count), np.int64)
    frames[0] = architecture.text_padding
    frames[1 : 1 + half] = codes
    frames[1 + half :] = np.array([token % architecture.card for token in SINE[:half]])[:, None]
    return frames


def _columns(frames: NDArray[np.int64], architecture: Architecture) -> NDArray[np.int64]:
    """Return the delayed columns that the steps complete ``[streams, frames]``, initial tokens in front."""
    count = frames.shape[1]
    columns = np.empty_like(frames)
    for stream, delay in enumerate(architecture.delays):
        columns[stream, : delay + 1] = architecture.card if stream else architecture.text_card
        columns[stream, delay + 1 :] = frames[stream, 1 : max(count - delay, 1)]
    return columns


def _ring(frames: NDArray[np.int64], architecture: Architecture) -> NDArray[np.int64]:
    """Return the ring of tokens after the last frame, ``[1, streams, slots]``.

    Slot n holds the newest column whose number is n modulo the slots. A delayed stream is a column ahead of the others.
    """
    count, slots = frames.shape[1], max(architecture.delays) + _MORE_SLOTS
    ring = np.full((1, len(frames), slots), UNKNOWN, np.int64)
    for stream, delay in enumerate(architecture.delays):
        initial = architecture.card if stream else architecture.text_card
        for column in range(max(count + delay - slots, 0), count + delay):
            begins = column <= min(delay, count - 1)
            ring[0, stream, column % slots] = initial if begins else frames[stream, column - delay]
    return ring
