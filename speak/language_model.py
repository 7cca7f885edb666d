"""The model as a conversation runs it: weights in memory, one evaluation per frame, a rotating KV cache.

The depformer steps of the user's codebooks are left out: in a conversation these codebooks are given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx

from ..convert.source.architecture import Architecture
from ..model.forward import EPSILON, Floats, Tokens
from ..model.matmul import QuantizedMatmul
from ..model.mlx_device import on_gpu
from ..model.session import UNKNOWN
from .kv_cache import RotatingKVCache
from .layers import DepformerStep, Layer, Linear, Table, arrays
from .sampling import Sampling, draw

_INITIAL_CAPACITY = 256  # frames of the KV cache before it grows
_CHUNK = 256  # frames of a prompt that go through the model together


Temporal = Callable[[mx.array, mx.array, list[mx.array], list[mx.array]], tuple[Any, ...]]
Depformer = Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Runtime:
    """A bundle's model in memory.

    context: frames that a frame attends to, itself included. steps: of the agent's codebooks. projections: those of all
    steps, stacked, where they are multiplied at once.
    """

    architecture: Architecture
    dtype: mx.Dtype
    context: int
    tables: tuple[Table, ...]
    layers: tuple[Layer, ...]
    out_norm: mx.array
    text_head: Linear
    steps: tuple[DepformerStep, ...]
    projections: Linear | None = None

    @property
    def matmul(self) -> QuantizedMatmul:
        """How packed weights are multiplied."""
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
        embeddings = [table(tokens, self.dtype) for table in self.tables]
        return sum(embeddings[1:], start=embeddings[0])

    def prefill(self, columns: Tokens, vectors: Floats | None = None) -> RotatingKVCache:
        """Run given frames, many at a time; return the KV cache.

        vectors: embeddings of a voice, ``[frames, dim]``, before the first column. columns: ``[streams, frames]``.
        """
        parts = [] if vectors is None else [mx.array(vectors).astype(self.dtype)]
        for first in range(0, columns.shape[1], _CHUNK):
            parts.append(self.embed(mx.array(columns[:, first : first + _CHUNK])))
            mx.eval(parts[-1])
        shape = (1, self.architecture.num_heads, 0, self.architecture.dim // self.architecture.num_heads)
        kept = [(mx.zeros(shape, self.dtype), mx.zeros(shape, self.dtype)) for _ in self.layers]
        x = mx.concatenate(parts) if parts else mx.zeros((0, self.architecture.dim), self.dtype)
        for first in range(0, len(x), _CHUNK):
            kept = self._prefill_chunk(x[first : first + _CHUNK][None], kept, first)
            mx.eval(kept)
        return self._cache_of(kept, len(x))

    def _prefill_chunk(
        self, x: mx.array, kept: list[tuple[mx.array, mx.array]], first: int
    ) -> list[tuple[mx.array, mx.array]]:
        """Run frames ``[1, frames, dim]`` through the layers; return keys and values, oldest first."""
        pairs = []
        for layer, (old_keys, old_values) in zip(self.layers, kept, strict=True):
            q, k, v = layer.heads(x, self.architecture.num_heads)
            q, k = (self._rotated(part, first) for part in (q, k))
            k, v = (mx.concatenate(list(pair), axis=2) for pair in ((old_keys, k), (old_values, v)))
            last = first + x.shape[1]
            distance = mx.arange(first, last)[:, None] - mx.arange(last - k.shape[2], last)
            mask = (distance >= 0) & (distance < self.context)
            x = layer.rest(x, mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask))
            pairs.append((k[:, :, -self.context :], v[:, :, -self.context :]))
        return pairs

    def _cache_of(self, kept: list[tuple[mx.array, mx.array]], frames: int) -> RotatingKVCache:
        capacity = min(self.context, max(_INITIAL_CAPACITY, 2 * frames))
        keys_and_values = []
        for side in range(2):
            rows = []
            for pair in kept:
                part = pair[side][:, :, -capacity:]
                empty = mx.zeros((*part.shape[:2], capacity - part.shape[2], part.shape[3]), part.dtype)
                rows.append(mx.roll(mx.concatenate([part, empty], axis=2), max(frames - capacity, 0) % capacity, 2))
            keys_and_values.append(rows)
        mx.eval(keys_and_values)
        return RotatingKVCache(keys_and_values[0], keys_and_values[1], self.context, frames)

    def _rotated(self, x: mx.array, first: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x, x.shape[-1], traditional=True, base=self.architecture.max_period, scale=1.0, offset=first
        )

    def temporal(self, sliced: bool | None = None) -> Temporal:
        """Return the temporal step, compiled once: a function of a column ``[streams]``, its number, keys and values.

        It returns the hidden state ``[1, 1, dim]``, text logits ``[text_card]``, and the updated keys and values.
        sliced: compile it in parts, with slices of keys and values; None for on a GPU only.
        """
        if on_gpu() if sliced is None else sliced:
            return self._sliced()

        def step(column: mx.array, number: mx.array, keys: list[mx.array], values: list[mx.array]) -> tuple[Any, ...]:
            x = self.embed(column[:, None])[None]
            capacity = keys[0].shape[2]
            slot, mask = number % capacity, (mx.arange(capacity) <= number)[None]
            new_keys, new_values = [], []
            for layer, old_keys, old_values in zip(self.layers, keys, values, strict=True):
                q, k, v = layer.heads(x, self.architecture.num_heads)
                q, k = (self._rotated(part, number) for part in (q, k))
                pair = [mx.slice_update(old, new, slot[None], (2,)) for old, new in ((old_keys, k), (old_values, v))]
                attended = mx.fast.scaled_dot_product_attention(q, *pair, scale=q.shape[-1] ** -0.5, mask=mask)
                x = layer.rest(x, attended)
                new_keys.append(pair[0])
                new_values.append(pair[1])
            hidden = mx.fast.rms_norm(x, self.out_norm, EPSILON)
            return hidden, self.text_head(hidden)[0, 0], new_keys, new_values

        return mx.compile(step)

    def _sliced(self) -> Temporal:
        """Return the same in parts: attention on a GPU takes no mask for one frame, so keys and values are slices.

        The operations between two attentions are compiled together; slices have another length in each frame.
        """
        heads = self.architecture.num_heads

        def projected(layer: Layer, x: mx.array, number: mx.array) -> list[mx.array]:
            packed = layer.packed(x, heads)
            rotated = self._rotated(packed[:, : 2 * heads], number)
            return [x, rotated[:, :heads], rotated[:, heads:], packed[:, 2 * heads :]]

        def begin(column: mx.array, number: mx.array) -> list[mx.array]:
            return projected(self.layers[0], self.embed(column[:, None]), number)

        def between(one: Layer, other: Layer) -> Callable[[mx.array, mx.array, mx.array], list[mx.array]]:
            return mx.compile(lambda x, attended, number: projected(other, one.rest(x, attended), number))

        def end(x: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
            hidden = mx.fast.rms_norm(self.layers[-1].rest(x, attended), self.out_norm, EPSILON)
            return hidden[None], self.text_head(hidden).reshape(-1)

        first, last = mx.compile(begin), mx.compile(end)
        others = [between(*pair) for pair in pairwise(self.layers)]

        def step(column: mx.array, number: mx.array, keys: list[mx.array], values: list[mx.array]) -> tuple[Any, ...]:
            frame, capacity = int(number), keys[0].shape[2]
            slot, length = frame % capacity, min(frame + 1, capacity)
            x, q, k, v = first(column, number)
            for index in range(len(self.layers)):
                keys[index][:, :, slot : slot + 1] = k
                values[index][:, :, slot : slot + 1] = v
                pair = keys[index][:, :, :length], values[index][:, :, :length]
                attended = mx.fast.scaled_dot_product_attention(q, *pair, scale=q.shape[-1] ** -0.5)
                if index < len(others):
                    x, q, k, v = others[index](x, attended, number)
            return *last(x, attended), keys, values

        return step

    def depformer(self, sampling: Sampling) -> Depformer:
        """Return the depformer steps of a frame, compiled once: they sample the text and the agent's codebooks.

        It takes the hidden state, text logits, given tokens ``[1 + steps]`` (UNKNOWN where none is given) and a random
        key; it returns tokens ``[1 + steps]`` and logits ``[steps, card]``.
        """

        count, heads = len(self.steps), self.architecture.depformer_num_heads
        # arrays: a number would become part of a kernel's source, and each would be compiled for itself
        places = [mx.array([[place == number] for place in range(count)]) for number in range(count)]

        def step(hidden: mx.array, text: mx.array, given: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
            keys = [one.reshape(-1) for one in mx.split(mx.random.split(key, 1 + count), 1 + count)]
            fixed = mx.split(given, 1 + count)
            tokens = [_sampled(text, fixed[0], sampling.text_temperature, sampling.text_top_k, keys[0])]
            logits: list[mx.array] = []
            past: list[mx.array | None] = [None] * self.architecture.depformer_num_layers  # keys, and values below them
            projected = self._projected(hidden.reshape(1, -1))
            for number, one in enumerate(self.steps):
                x = projected[number] + self._previous(one, tokens[-1])
                for index, layer in enumerate(one.layers):
                    packed = layer.packed(x, heads)
                    q, new, seen = packed[:, :heads], packed[:, heads:], past[index]
                    if seen is None:  # what the first step sees alone has all its attention
                        attended, past[index] = new[:, heads:], new
                    else:  # slices would be written in place or not, as it happens; this is one operation each time
                        seen = past[index] = mx.where(places[number], new, seen)
                        k, v = seen[:, :heads, : number + 1], seen[:, heads:, : number + 1]
                        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
                    x = layer.rest(x, attended)
                logits.append(one.head(x).reshape(-1))
                top = sampling.audio_top_k
                tokens.append(
                    _sampled(logits[-1], fixed[number + 1], sampling.audio_temperature, top, keys[number + 1])
                )
            return mx.concatenate(tokens), mx.stack(logits)

        return mx.compile(step)

    def _projected(self, hidden: mx.array) -> list[mx.array]:
        """Return the hidden state projected for each step, ``[1, dim]`` each."""
        if self.projections is None:
            return [step.project(hidden) for step in self.steps]
        return list(mx.split(self.projections(hidden), len(self.steps), axis=-1))

    def _previous(self, step: DepformerStep, token: mx.array) -> mx.array:
        """Look the last token ``[1]`` up, ``[1, dim]``; -1 adds nothing."""
        embedding = step.table.take(mx.maximum(token, 0)).float32().astype(self.dtype)
        return mx.where(token >= 0, embedding, mx.zeros_like(embedding))


def _sampled(logits: mx.array, given: mx.array, temperature: float, top_k: int, key: mx.array) -> mx.array:
    return mx.where(given == UNKNOWN, draw(logits, temperature, top_k, key), given)
