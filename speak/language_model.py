"""The model as a conversation runs it: weights in memory, one evaluation a frame, keys and values in a ring.

What predicts the user's codebooks is left out: in a conversation they are given.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..convert.source.architecture import Architecture
from ..model.forward import EPSILON, Floats, Tokens
from ..model.matmul import QuantizedMatmul
from ..model.mlx_device import on_gpu
from ..model.mlx_weights import Matrix
from ..model.session import UNKNOWN
from .kv_cache import RotatingKVCache
from .sampling import Sampling, draw

_FIRST_ROOM = 256  # frames that a ring holds before it grows
_CHUNK = 256  # frames of a prompt that go through the model together


@dataclass(frozen=True)
class Linear:
    """A matrix in memory, in the dtype of activations, its rows shared out over streams, and how it is multiplied."""

    parts: tuple[tuple[Matrix, mx.Stream | None], ...]
    matmul: QuantizedMatmul = field(default_factory=QuantizedMatmul)

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``x @ matrix.T`` for ``x [..., columns]``."""
        flat = x.reshape(-1, x.shape[-1])
        found = [self.matmul(flat, matrix, stream) for matrix, stream in self.parts]
        result = found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)
        return result.reshape(*x.shape[:-1], -1)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(sum(array.nbytes for array in arrays(matrix)) for matrix, _ in self.parts)


@dataclass(frozen=True)
class Layer:
    """A layer of the temporal transformer, or one step's share of a depformer layer; norms ``[dim]``."""

    norm1: mx.array
    in_proj: Linear
    out_proj: Linear
    norm2: mx.array
    linear_in: Linear
    linear_out: Linear

    def linears(self) -> tuple[Linear, ...]:
        """Return its matrices."""
        return self.in_proj, self.out_proj, self.linear_in, self.linear_out

    def heads(self, x: mx.array, count: int) -> mx.array:
        """Return queries, keys and values ``[3, batch, heads, length, width]`` of ``x [batch, length, dim]``."""
        packed = self.in_proj(mx.fast.rms_norm(x, self.norm1, EPSILON))
        return packed.reshape(*x.shape[:2], 3, count, -1).transpose(2, 0, 3, 1, 4)

    def packed(self, x: mx.array, count: int) -> mx.array:
        """Return queries, keys and values of one frame below each other: ``[1, 3 * heads, 1, width]``, no copy."""
        return self.in_proj(mx.fast.rms_norm(x, self.norm1, EPSILON)).reshape(1, 3 * count, 1, -1)

    def rest(self, x: mx.array, attended: mx.array) -> mx.array:
        """Return the stream after the layer, given what its heads found, ``[batch, heads, length, width]``."""
        x = x + self.out_proj(attended.transpose(0, 2, 1, 3).reshape(x.shape))
        gate, up = mx.split(self.linear_in(mx.fast.rms_norm(x, self.norm2, EPSILON)), 2, axis=-1)
        return x + self.linear_out(_gated(gate, up))


@dataclass(frozen=True)
class Table:
    """Embedding tables of one form below each other. first: the row at which each stream's begins, by the stream."""

    rows: Matrix
    first: dict[int, int]

    def __call__(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        """Sum the embeddings of ``tokens [streams, frames]``; -1 adds nothing. Returns ``[frames, dim]``."""
        held = tokens[mx.array(list(self.first))]
        rows = mx.maximum(held, 0) + mx.array(list(self.first.values()))[:, None]
        found = self.rows.take(rows.reshape(-1)).float32().astype(dtype).reshape(*held.shape, -1)
        return mx.where((held >= 0)[..., None], found, mx.zeros_like(found)).sum(0)


@dataclass(frozen=True)
class DepformerStep:
    """One depformer step: the hidden state's projection, the previous token's embeddings, layers and head."""

    project: Linear
    table: Matrix
    layers: tuple[Layer, ...]
    head: Linear


def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


Temporal = Callable[[mx.array, mx.array, list[mx.array], list[mx.array]], tuple[Any, ...]]
Depformer = Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Runtime:
    """A bundle's model in memory.

    reach: frames that a frame attends to, its own included. steps: the agent's. projections: those of all steps below
    each other, where they are multiplied at once.
    """

    architecture: Architecture
    dtype: mx.Dtype
    reach: int
    tables: tuple[Table, ...]
    layers: tuple[Layer, ...]
    out_norm: mx.array
    text_head: Linear
    steps: tuple[DepformerStep, ...]
    projections: Linear | None = None

    @property
    def matmul(self) -> QuantizedMatmul:
        """How its packed weights are multiplied."""
        return self.text_head.matmul

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of weights that a frame reads, by component."""
        temporal = sum(linear.nbytes for layer in self.layers for linear in layer.linears())
        row = sum(sum(array[:1].nbytes for array in arrays(table.rows)) * len(table.first) for table in self.tables)
        depformer = 0
        for step in self.steps:
            linears = [step.project, step.head, *(linear for layer in step.layers for linear in layer.linears())]
            depformer += sum(linear.nbytes for linear in linears)
        return {"temporal": temporal + row + self.text_head.nbytes, "depformer": depformer}

    def embed(self, tokens: mx.array) -> mx.array:
        """Sum the embeddings of ``tokens [streams, frames]``; returns ``[frames, dim]``."""
        found = [table(tokens, self.dtype) for table in self.tables]
        return sum(found[1:], start=found[0])

    def prefill(self, columns: Tokens, vectors: Floats | None = None) -> RotatingKVCache:
        """Go through what is given, many frames at a time; return what later frames attend to.

        vectors: of a voice, ``[frames, dim]``, before the first column. columns: ``[streams, frames]``.
        """
        parts = [] if vectors is None else [mx.array(vectors).astype(self.dtype)]
        for first in range(0, columns.shape[1], _CHUNK):
            parts.append(self.embed(mx.array(columns[:, first : first + _CHUNK])))
            mx.eval(parts[-1])
        shape = (1, self.architecture.num_heads, 0, self.architecture.dim // self.architecture.num_heads)
        kept = [(mx.zeros(shape, self.dtype), mx.zeros(shape, self.dtype)) for _ in self.layers]
        x = mx.concatenate(parts) if parts else mx.zeros((0, self.architecture.dim), self.dtype)
        for first in range(0, len(x), _CHUNK):
            kept = self._several(x[first : first + _CHUNK][None], kept, first)
            mx.eval(kept)
        return self._ring(kept, len(x))

    def _several(
        self, x: mx.array, kept: list[tuple[mx.array, mx.array]], first: int
    ) -> list[tuple[mx.array, mx.array]]:
        """Go through the layers with frames ``[1, frames, dim]``; return their keys and values, oldest first."""
        found = []
        for layer, (old_keys, old_values) in zip(self.layers, kept, strict=True):
            q, k, v = layer.heads(x, self.architecture.num_heads)
            q, k = (self._turned(part, first) for part in (q, k))
            k, v = (mx.concatenate(list(pair), axis=2) for pair in ((old_keys, k), (old_values, v)))
            last = first + x.shape[1]
            distance = mx.arange(first, last)[:, None] - mx.arange(last - k.shape[2], last)
            mask = (distance >= 0) & (distance < self.reach)
            x = layer.rest(x, mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask))
            found.append((k[:, :, -self.reach :], v[:, :, -self.reach :]))
        return found

    def _ring(self, kept: list[tuple[mx.array, mx.array]], frames: int) -> RotatingKVCache:
        room = min(self.reach, max(_FIRST_ROOM, 2 * frames))
        held = []
        for side in range(2):
            rows = []
            for pair in kept:
                part = pair[side][:, :, -room:]
                empty = mx.zeros((*part.shape[:2], room - part.shape[2], part.shape[3]), part.dtype)
                rows.append(mx.roll(mx.concatenate([part, empty], axis=2), max(frames - room, 0) % room, 2))
            held.append(rows)
        mx.eval(held)
        return RotatingKVCache(held[0], held[1], self.reach, frames)

    def _turned(self, x: mx.array, first: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x, x.shape[-1], traditional=True, base=self.architecture.max_period, scale=1.0, offset=first
        )

    def temporal(self, sliced: bool | None = None) -> Temporal:
        """Return the function of a frame that is compiled once: a column ``[streams]`` and its number, keys, values.

        It returns the hidden state ``[1, 1, dim]``, text logits ``[text_card]``, and the keys and values with the
        frame's own in place. sliced: to compute uncompiled, keys and values being slices; None for on a GPU only.
        """

        if on_gpu() if sliced is None else sliced:
            return self._frame

        def step(column: mx.array, number: mx.array, keys: list[mx.array], values: list[mx.array]) -> tuple[Any, ...]:
            x = self.embed(column[:, None])[None]
            room = keys[0].shape[2]
            slot, seen = number % room, (mx.arange(room) <= number)[None]
            new_keys, new_values = [], []
            for layer, old_keys, old_values in zip(self.layers, keys, values, strict=True):
                q, k, v = layer.heads(x, self.architecture.num_heads)
                q, k = (self._turned(part, number) for part in (q, k))
                held = [mx.slice_update(old, new, slot[None], (2,)) for old, new in ((old_keys, k), (old_values, v))]
                found = mx.fast.scaled_dot_product_attention(q, *held, scale=q.shape[-1] ** -0.5, mask=seen)
                x = layer.rest(x, found)
                new_keys.append(held[0])
                new_values.append(held[1])
            hidden = mx.fast.rms_norm(x, self.out_norm, EPSILON)
            return hidden, self.text_head(hidden)[0, 0], new_keys, new_values

        return mx.compile(step)

    def _frame(
        self, column: mx.array, number: mx.array, keys: list[mx.array], values: list[mx.array]
    ) -> tuple[Any, ...]:
        """Compute the same uncompiled: a GPU's attention takes no mask for one frame, so what is seen is a slice."""
        heads, frame = self.architecture.num_heads, int(number)
        x = self.embed(column[:, None])[None]
        slot, seen = frame % keys[0].shape[2], min(frame + 1, keys[0].shape[2])
        for index, layer in enumerate(self.layers):
            packed = layer.packed(x, heads)
            turned = self._turned(packed[:, : 2 * heads], number)
            keys[index][:, :, slot : slot + 1] = turned[:, heads:]
            values[index][:, :, slot : slot + 1] = packed[:, 2 * heads :]
            k, v = keys[index][:, :, :seen], values[index][:, :, :seen]
            q = turned[:, :heads]
            x = layer.rest(x, mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5))
        hidden = mx.fast.rms_norm(x, self.out_norm, EPSILON)
        return hidden, self.text_head(hidden)[0, 0], keys, values

    def depformer(self, sampling: Sampling) -> Depformer:
        """Return the function of a frame that is compiled once: it says the text and the agent's codebooks.

        It takes the hidden state, text logits, what is given ``[1 + steps]`` (UNKNOWN where nothing is) and a random
        key; it returns tokens ``[1 + steps]`` and logits ``[steps, card]``.
        """

        def step(hidden: mx.array, text: mx.array, given: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
            keys = mx.random.split(key, 1 + len(self.steps))
            tokens = [_said(text, given[0], sampling.text_temperature, sampling.text_top_k, keys[0])]
            found: list[mx.array] = []
            heads = self.architecture.depformer_num_heads
            past: list[mx.array | None] = [None] * self.architecture.depformer_num_layers  # keys, and values below them
            projected = self._projected(hidden)
            for number, one in enumerate(self.steps):
                x = projected[number] + self._previous(one, tokens[-1])
                for index, layer in enumerate(one.layers):
                    packed = layer.packed(x, heads)
                    q, new, seen = packed[:, :heads], packed[:, heads:], past[index]
                    if seen is None:  # what the first step sees alone has all its attention
                        attended, seen = new[:, heads:], mx.pad(new, [(0, 0), (0, 0), (0, len(self.steps) - 1), (0, 0)])
                    else:
                        seen[:, :, number : number + 1] = new
                        k, v = seen[:, :heads, : number + 1], seen[:, heads:, : number + 1]
                        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
                    past[index] = seen
                    x = layer.rest(x, attended)
                found.append(one.head(x)[0, 0])
                top = sampling.audio_top_k
                tokens.append(_said(found[-1], given[number + 1], sampling.audio_temperature, top, keys[number + 1]))
            return mx.stack(tokens), mx.stack(found)

        return mx.compile(step)

    def _projected(self, hidden: mx.array) -> list[mx.array]:
        """Return what each step's projection makes of the hidden state, ``[1, 1, dim]`` each."""
        if self.projections is None:
            return [step.project(hidden) for step in self.steps]
        return list(mx.split(self.projections(hidden), len(self.steps), axis=-1))

    def _previous(self, step: DepformerStep, token: mx.array) -> mx.array:
        """Look the last token up, ``[1, 1, dim]``; -1 adds nothing."""
        found = step.table.take(mx.maximum(token, 0)[None]).float32().astype(self.dtype)[None]
        return mx.where(token >= 0, found, mx.zeros_like(found))


def _said(logits: mx.array, given: mx.array, temperature: float, top_k: int, key: mx.array) -> mx.array:
    return mx.where(given == UNKNOWN, draw(logits, temperature, top_k, key), given)


def arrays(matrix: Matrix) -> list[mx.array]:
    """Return what a matrix is stored in."""
    packing = matrix.packing
    return [matrix.weight] + ([packing.scales, packing.biases] if packing else [])
