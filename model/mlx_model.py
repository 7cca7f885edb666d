"""The model as a runtime on Apple Silicon computes it: MLX, ``quantized_matmul`` on the packed weights of a bundle."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import numpy as np

from ..convert.bundle.reader import Bundle
from ..convert.source.architecture import Architecture
from .blocks import Block
from .forward import EPSILON, Floats, KVCache, Tokens
from .kernel_test import default_matmul
from .matmul import FLOAT_DTYPES, QuantizedMatmul, shares
from .mlx_device import on_gpu, streams
from .mlx_weights import Matrix, joined, read_by_name, read_matrix

Read = Callable[[str, int | None], Matrix]  # name in the checkpoint and depformer step -> what the bundle stores


@dataclass(frozen=True)
class MlxModel:
    """The model over ``read``; see ``Model`` for what its methods take and return.

    dtype: of activations. context: how many frames, its own included, a frame attends to. steps_seen: the same for
    depformer steps. streams: where matrix products run. matmul: how packed weights are multiplied.
    """

    architecture: Architecture
    read: Read
    lookup: Callable[[str, Tokens], Matrix]
    dtype: mx.Dtype
    context: int
    steps_seen: int
    streams: tuple[mx.Stream, ...]
    matmul: QuantizedMatmul = field(default_factory=default_matmul)

    def embed(self, tokens: Tokens, vectors: Floats | None = None) -> Floats:
        """Sum the embeddings of all streams."""
        total = self._look_up("text_emb.weight", tokens[:, 0])
        for stream in range(1, tokens.shape[1]):
            total = total + self._look_up(f"emb.{stream - 1}.weight", tokens[:, stream])
        return _out(total if vectors is None else total + self._in(vectors))

    def block(self, block: Block, x: Floats, kv_cache: KVCache | None = None, first: int = 0) -> tuple[Floats, Floats]:
        """Compute one attention or MLP."""
        stream = self._in(x)
        steps = range(first, first + x.shape[1]) if block.component == "depformer" else None
        attention = block.sublayer == "attention"
        added = self._attention(block, stream, kv_cache, first, steps) if attention else self._mlp(block, stream, steps)
        total = stream + added
        mx.eval(added, total)
        return _out(added), _out(total)

    def out_norm(self, x: Floats) -> Floats:
        """Normalize the last layer's output."""
        return _out(self._norm("out_norm.alpha", self._in(x), None))

    def text_logits(self, hidden: Floats) -> Floats:
        """Apply the text head."""
        return _out(self._linear("text_linear.weight", None, self._in(hidden)))

    def step_input(self, step: int, hidden: Floats, previous: Tokens) -> Floats:
        """Project the hidden state and add the previous token's embedding."""
        name = f"depformer_emb.{step - 1}.weight" if step else "depformer_text_emb.weight"
        return _out(self._linear(f"depformer_in.{step}.weight", None, self._in(hidden)) + self._look_up(name, previous))

    def audio_logits(self, step: int, x: Floats) -> Floats:
        """Apply a codebook's head."""
        return _out(self._linear(f"linears.{step}.weight", None, self._in(x)))

    def _in(self, x: Floats) -> mx.array:
        return mx.array(x).astype(self.dtype)

    def _look_up(self, name: str, tokens: Tokens) -> mx.array:
        rows = self.lookup(name, np.maximum(tokens, 0)).float32().astype(self.dtype)
        rows = rows.reshape(*tokens.shape, -1)
        return mx.where(mx.array(tokens >= 0)[..., None], rows, mx.zeros_like(rows))

    def _linear(self, name: str, step: int | None, x: mx.array) -> mx.array:
        """Apply a matrix to the last axis, its rows shared out over the streams."""
        matrix = self.read(name, step)
        flat = x.reshape(-1, x.shape[-1])
        height = matrix.weight.shape[0]
        among = zip(shares(height, len(self.streams)), self.streams, strict=True)
        parts = [self.matmul(flat, matrix.take(rows), stream) for rows, stream in among]
        result = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        mx.eval(result)  # so that only this matrix is in memory
        return result.reshape(*x.shape[:-1], height)

    def _norm(self, name: str, x: mx.array, steps: range | None) -> mx.array:
        """Normalize in float32; each depformer step by the weights that the bundle stores for it."""
        stored = [self.read(name, step).weight.reshape(-1) for step in steps or [None]]
        alpha = (stored[0] if steps is None else mx.stack(stored)).astype(mx.float32)
        wide = x.astype(mx.float32)
        scale = mx.rsqrt(EPSILON + wide.square().mean(-1, keepdims=True))
        return (wide * (alpha * scale)).astype(x.dtype)

    def _attention(
        self, block: Block, x: mx.array, kv_cache: KVCache | None, first: int, steps: range | None
    ) -> mx.array:
        """Attend from each frame or depformer step to those before it and itself."""
        batch, length, dim = x.shape
        packed, joined = f"{block.prefix}.self_attn.in_proj_weight", f"{block.prefix}.self_attn.out_proj.weight"
        heads = self.architecture.num_heads if steps is None else self.architecture.depformer_num_heads
        context = self.context if steps is None else self.steps_seen
        x = self._norm(f"{block.prefix}.norm1.alpha", x, steps)
        q, k, v = self._each(packed, x, steps).reshape(batch, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
        if steps is None:
            q, k = (
                mx.fast.rope(
                    part,
                    part.shape[-1],
                    traditional=True,
                    base=self.architecture.max_period,
                    scale=1.0,
                    offset=first,
                )
                for part in (q, k)
            )
        if kv_cache is not None:
            if first:
                k, v = (mx.concatenate(list(pair), axis=2) for pair in zip(kv_cache[block], (k, v), strict=True))
            mx.eval(k, v)
            kv_cache[block] = (k[:, :, -context:], v[:, :, -context:])
        distance = mx.arange(first, first + length)[:, None] - mx.arange(first + length - k.shape[2], first + length)
        attended = mx.fast.scaled_dot_product_attention(
            q, k, v, scale=q.shape[-1] ** -0.5, mask=(distance >= 0) & (distance < context)
        )
        return self._each(joined, attended.transpose(0, 2, 1, 3).reshape(batch, length, dim), steps)

    def _mlp(self, block: Block, x: mx.array, steps: range | None) -> mx.array:
        """Apply SwiGLU; a depformer step has its own."""
        gating = f"{block.prefix}.gating"
        x = self._norm(f"{block.prefix}.norm2.alpha", x, steps)
        if steps is None:
            return self._gated(gating, x)
        return mx.stack([self._gated(f"{gating}.{step}", x[:, index]) for index, step in enumerate(steps)], 1)

    def _gated(self, prefix: str, x: mx.array) -> mx.array:
        gate, up = mx.split(self._linear(f"{prefix}.linear_in.weight", None, x), 2, axis=-1)
        return self._linear(f"{prefix}.linear_out.weight", None, gate * mx.sigmoid(gate) * up)

    def _each(self, name: str, x: mx.array, steps: range | None) -> mx.array:
        """Apply a matrix, each depformer step its own."""
        if steps is None:
            return self._linear(name, None, x)
        return mx.stack([self._linear(name, step, x[:, index]) for index, step in enumerate(steps)], 1)


def _out(x: mx.array) -> Floats:
    return np.array(x.astype(mx.float32))


def arithmetic_of(asked: str | None, dtype: str) -> str:
    """Return the dtype of activations: float32, or a bundle's own; on processors, where that is slow, float32."""
    if asked is None:
        asked = "bundle" if on_gpu() else "float32"
    return dtype if asked == "bundle" else asked


def model_of(bundle: Bundle, dtype: str = "float32", matmul: QuantizedMatmul | None = None) -> MlxModel:
    """Return the model over an open bundle, on the current device; its context is that of the bundle's config.json.

    matmul: how packed weights are multiplied; None for MLX's own.
    """

    def lookup(name: str, tokens: Tokens) -> Matrix:
        output = bundle.output(name)
        ids, inverse = np.unique(tokens, return_inverse=True)
        rows = [read_matrix(bundle, output, int(row), int(row) + 1) for row in ids]
        where = mx.array(inverse.reshape(-1).astype(np.int32))
        return joined(rows).take(where)

    context, steps_seen = bundle.attention_spans()
    how = matmul or default_matmul()
    return MlxModel(
        bundle.architecture,
        partial(read_by_name, bundle),
        lookup,
        FLOAT_DTYPES[dtype],
        context,
        steps_seen,
        streams(),
        how,
    )
