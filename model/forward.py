"""What the PyTorch reference and the MLX model have in common: the same steps, with numpy float32 in between."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .blocks import Block

EPSILON = 1e-8  # of RMSNorm
Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]
KVCache = dict[Block, Any]  # keys and values of what came before, by attention block; each model's own


class Model(Protocol):
    """A forward pass in pieces, so that two models can go through their layers side by side.

    A model reads the weights of a piece when it is called, and keeps none. Arrays in and out are float32, which holds
    every value of a model that computes in 16 bit.
    """

    def embed(self, tokens: Tokens, vectors: Floats | None = None) -> Floats:
        """Return ``[batch, frames, dim]`` for tokens ``[batch, streams, frames]``; token -1 adds nothing.

        vectors: ``[batch, frames, dim]``, added as they are: the embeddings of a voice.
        """

    def block(self, block: Block, x: Floats, kv_cache: KVCache | None = None, first: int = 0) -> tuple[Floats, Floats]:
        """Return what a block computes, and the stream ``x`` with it added.

        x: ``[batch, frames, dim]`` in the temporal transformer, ``[rows, steps, depformer_dim]`` in the depformer.
        first: the frame or step that ``x`` begins with. kv_cache: where attention keeps keys and values for later
        calls, and finds those of the frames or steps before ``first``.
        """

    def out_norm(self, x: Floats) -> Floats:
        """Return the temporal transformer's output, which the text head and all depformer steps read."""

    def text_logits(self, hidden: Floats) -> Floats:
        """Return ``[rows, text_card]`` for hidden states ``[rows, dim]``."""

    def step_input(self, step: int, hidden: Floats, previous: Tokens) -> Floats:
        """Return what a depformer step reads, ``[rows, depformer_dim]``.

        hidden: ``[rows, dim]``. previous: ``[rows]``, the text token for step 0, else the token of codebook step - 1.
        """

    def audio_logits(self, step: int, x: Floats) -> Floats:
        """Return ``[rows, card]`` of a step's codebook for the depformer's output ``[rows, depformer_dim]``."""
