"""Matrices, layers, embedding tables and depformer steps in memory."""

from dataclasses import dataclass, field

import mlx.core as mx

from ..model.forward import EPSILON
from ..model.matmul import QuantizedMatmul
from ..model.mlx_weights import Matrix


@dataclass(frozen=True)
class Linear:
    """A matrix in memory, in the dtype of activations, its rows split over streams, and how it is multiplied."""

    parts: tuple[tuple[Matrix, mx.Stream | None], ...]
    matmul: QuantizedMatmul = field(default_factory=QuantizedMatmul)

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``x @ matrix.T`` for ``x [..., columns]``."""
        flat = x.reshape(-1, x.shape[-1])
        outputs = [self.matmul(flat, matrix, stream) for matrix, stream in self.parts]
        result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)
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
        """Return queries, keys and values of a frame ``[1, dim]`` below each other: ``[1, 3 * heads, 1, width]``."""
        return self.in_proj(mx.fast.rms_norm(x, self.norm1, EPSILON)).reshape(1, 3 * count, 1, -1)

    def rest(self, x: mx.array, attended: mx.array) -> mx.array:
        """Return the stream after the layer, from the output of its attention, ``[batch, heads, length, width]``.

        x: ``[batch, length, dim]``, or ``[1, dim]`` for a frame alone, which takes fewer operations.
        """
        joined = attended if x.ndim == 2 else attended.transpose(0, 2, 1, 3)
        x = x + self.out_proj(joined.reshape(x.shape))
        gate, up = mx.split(self.linear_in(mx.fast.rms_norm(x, self.norm2, EPSILON)), 2, axis=-1)
        return x + self.linear_out(_gated(gate, up))


@dataclass(frozen=True)
class Table:
    """Embedding tables of one quantization, stacked. first: the first row of each stream's table, by stream."""

    rows: Matrix
    first: dict[int, int]

    def __call__(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        """Sum the embeddings of ``tokens [streams, frames]``; -1 adds nothing. Returns ``[frames, dim]``."""
        ids = tokens[mx.array(list(self.first))]
        rows = mx.maximum(ids, 0) + mx.array(list(self.first.values()))[:, None]
        embeddings = self.rows.take(rows.reshape(-1)).float32().astype(dtype).reshape(*ids.shape, -1)
        return mx.where((ids >= 0)[..., None], embeddings, mx.zeros_like(embeddings)).sum(0)


@dataclass(frozen=True)
class DepformerStep:
    """One depformer step: the hidden state's projection, the previous token's embeddings, layers and head."""

    project: Linear
    table: Matrix
    layers: tuple[Layer, ...]
    head: Linear


def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def arrays(matrix: Matrix) -> list[mx.array]:
    """Return the arrays that store a matrix."""
    packing = matrix.packing
    return [matrix.weight] + ([packing.scales, packing.biases] if packing else [])
