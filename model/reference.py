"""PersonaPlex's forward pass in PyTorch, over whichever weights it is given.

Over a checkpoint in float32 it is the reference; over the same in 16 bit it gives the noise floor, and over a bundle's
dequantized weights the local error of a block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..convert.source.architecture import Architecture
from ..convert.source.checkpoint import Checkpoint
from .blocks import Block
from .forward import EPSILON, Floats, KVCache, Tokens
from .kept_frames import KeptFrames
from .walk import each_block
from .weights import Rows, Weights, each_once, kept_by, rows_of, sorted_rows, source_weights

# Name and step of a matrix, and its input [..., columns]; what it returns, if anything, is taken for the product.
InputHook = Callable[[str, int | None, Tensor], Tensor | None]


@dataclass(frozen=True)
class TorchModel:
    """The model over ``weights`` and embedding ``rows``; see ``Model`` for what its methods take and return.

    dtype: of activations and matrices; norms and rotations are computed in float32, as published. A CPU multiplies in
    float32 and rounds the result: 16-bit products sum in float32 everywhere, and are slow on older CPUs. context: how
    many frames, its own included, a frame attends to. steps_seen: the same for depformer steps. input_hook: called with
    the input of every matrix.
    """

    architecture: Architecture
    weights: Weights
    rows: Rows
    dtype: torch.dtype
    context: int
    steps_seen: int
    device: str = "cpu"
    input_hook: InputHook | None = None

    def embed(self, tokens: Tokens, vectors: Floats | None = None) -> Floats:
        """Sum the embeddings of all streams."""
        return self._out(self.embedded(tokens, vectors))

    def embedded(self, tokens: Tokens, vectors: Floats | None = None) -> Tensor:
        """Sum the embeddings of all streams, as ``embed`` does, on the device."""
        total: Tensor | None = None
        for stream in [*range(1, tokens.shape[1]), 0]:  # text last: sums in 16 bit depend on the order
            part = self._look_up(f"emb.{stream - 1}.weight" if stream else "text_emb.weight", tokens[:, stream])
            total = part if total is None else total + part
        if total is None:
            raise ValueError("no stream to embed")
        return total if vectors is None else total + self._in(vectors)

    def block(self, block: Block, x: Floats, kv_cache: KVCache | None = None, first: int = 0) -> tuple[Floats, Floats]:
        """Compute one attention or MLP."""
        stream = self._in(x)
        added = self.added(block, stream, kv_cache, first)
        return self._out(added), self._out(stream + added)

    def added(self, block: Block, x: Tensor, kv_cache: KVCache | None = None, first: int = 0) -> Tensor:
        """Return what a block computes, as ``block`` does, on tensors that stay where they are."""
        steps = range(first, first + x.shape[1]) if block.component == "depformer" else None
        if block.sublayer == "attention":
            return self._attention(block, x, kv_cache, first, steps)
        return self._mlp(block, x, steps)

    def advance(self, block: Block, x: Tensor) -> None:
        """Take a stream through a block in place, on a tensor that stays where it is."""
        for rows in block.batches(x.shape):
            x[rows] += self.added(block, x[rows])

    def out_norm(self, x: Floats) -> Floats:
        """Normalize the last layer's output."""
        return self._out(self.hidden_states(self._in(x)))

    def hidden_states(self, x: Tensor) -> Tensor:
        """Normalize the last layer's output, as ``out_norm`` does, on tensors that stay where they are."""
        return self._norm(self._alpha("out_norm.alpha", None), x)

    def text_logits(self, hidden: Floats) -> Floats:
        """Apply the text head."""
        return self._out(self._linear("text_linear.weight", None, self._in(hidden)))

    def step_input(self, step: int, hidden: Floats, previous: Tokens) -> Floats:
        """Project the hidden state and add the previous token's embedding."""
        return self._out(self._step_input(step, self._in(hidden), previous))

    def step_inputs(self, hidden: Tensor, previous: Tokens, steps: int) -> Tensor:
        """Return what the first ``steps`` depformer steps read, ``[rows, steps, depformer_dim]``, on the device.

        hidden: ``[rows, dim]``. previous: the rows' tokens, ``[rows, streams]``: step k reads that of stream k.
        """
        return torch.stack([self._step_input(step, hidden, previous[:, step]) for step in range(steps)], 1)

    def audio_logits(self, step: int, x: Floats) -> Floats:
        """Apply a codebook's head."""
        return self._out(self._linear(f"linears.{step}.weight", None, self._in(x)))

    def product(self, name: str, step: int | None, x: Tensor) -> Tensor:
        """Apply one matrix to inputs ``[..., columns]`` that a hook was called with."""
        return self._linear(name, step, x)

    def logits(
        self,
        tokens: Tokens,
        targets: Tokens,
        steps: int | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return differentiable logits: of the text, and of the first ``steps`` codebooks.

        tokens, targets: ``[batch, streams, frames]``, what the temporal transformer and the depformer read. Of shapes
        ``[batch, frames, text_card]`` and ``[batch, frames, steps, card]``. recompute: compute
        blocks again in the backward pass (activation checkpointing), which takes less memory.
        """

        def compute(block: Block, x: Tensor) -> Tensor:
            return x + (checkpoint(self.added, block, x, use_reentrant=False) if recompute else self.added(block, x))

        count = self.architecture.steps if steps is None else steps
        x = each_block(self.architecture, "temporal", self.embedded(tokens), compute)
        hidden = self.hidden_states(x)
        text = self._linear("text_linear.weight", None, hidden)
        rows = hidden.flatten(0, 1)
        known = targets.transpose(0, 2, 1).reshape(len(rows), -1)
        x = each_block(self.architecture, "depformer", self.step_inputs(rows, known, count), compute)
        audio = torch.stack([self._linear(f"linears.{step}.weight", None, x[:, step]) for step in range(count)], 1)
        return text, audio.reshape(*hidden.shape[:2], count, -1)

    def _in(self, x: Floats) -> Tensor:
        return torch.from_numpy(x).to(self.device, self.dtype)

    def _out(self, x: Tensor) -> Floats:
        array: Floats = x.float().cpu().numpy()
        return array

    def _step_input(self, step: int, hidden: Tensor, previous: Tokens) -> Tensor:
        name = f"depformer_emb.{step - 1}.weight" if step else "depformer_text_emb.weight"
        return self._linear(f"depformer_in.{step}.weight", None, hidden) + self._look_up(name, previous)

    def _alpha(self, name: str, step: int | None) -> Tensor:
        return self.weights(name, step).to(self.device, torch.float32).reshape(-1)

    def _linear(self, name: str, step: int | None, x: Tensor) -> Tensor:
        if self.input_hook and (product := self.input_hook(name, step, x)) is not None:
            return product
        weight = self.weights(name, step)
        if x.device.type == "cpu" and x.dtype.itemsize < torch.float32.itemsize:
            return (x.float() @ weight.float().T).to(x.dtype)
        return x @ weight.to(self.device, self.dtype).T

    def _look_up(self, name: str, tokens: Tokens) -> Tensor:
        rows = self.rows(name, np.maximum(tokens, 0)).to(self.device, self.dtype)
        known = torch.from_numpy(tokens >= 0).to(self.device)[..., None]
        return torch.where(known, rows, torch.zeros_like(rows))

    def _norm(self, alpha: Tensor, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (alpha * torch.rsqrt(EPSILON + wide.square().mean(-1, keepdim=True)))).to(x.dtype)

    def _attention(self, block: Block, x: Tensor, kv_cache: KVCache | None, first: int, steps: range | None) -> Tensor:
        """Attend from each frame or depformer step to those before it and itself."""
        batch, length, dim = x.shape
        packed, joined = f"{block.prefix}.self_attn.in_proj_weight", f"{block.prefix}.self_attn.out_proj.weight"
        heads = self.architecture.num_heads if steps is None else self.architecture.depformer_num_heads
        context = self.context if steps is None else self.steps_seen
        x = self._norm(self._alphas(f"{block.prefix}.norm1.alpha", steps), x)
        q, k, v = self._each(packed, x, steps).reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        positions = torch.arange(first, first + length, device=self.device)
        if steps is None:
            q, k = (_rotate(part, positions, self.architecture.max_period) for part in (q, k))
        if kv_cache is not None:
            if not first:
                kv_cache[block] = (KeptFrames(context), KeptFrames(context))
            k, v = (frames.extended(part) for frames, part in zip(kv_cache[block], (k, v), strict=True))
        seen = torch.arange(first + length - k.shape[2], first + length, device=self.device)
        distance = positions[:, None] - seen[None]
        attended = _attend(q, k, v, (distance >= 0) & (distance < context))
        return self._each(joined, attended.transpose(1, 2).reshape(batch, length, dim), steps)

    def _mlp(self, block: Block, x: Tensor, steps: range | None) -> Tensor:
        """Apply SwiGLU; a depformer step has its own."""
        norm, gating = f"{block.prefix}.norm2.alpha", f"{block.prefix}.gating"
        x = self._norm(self._alphas(norm, steps), x)
        if steps is None:
            return self._gated(gating, x)
        return torch.stack([self._gated(f"{gating}.{step}", x[:, index]) for index, step in enumerate(steps)], 1)

    def _gated(self, prefix: str, x: Tensor) -> Tensor:
        gate, up = self._linear(f"{prefix}.linear_in.weight", None, x).chunk(2, -1)
        return self._linear(f"{prefix}.linear_out.weight", None, functional.silu(gate) * up)

    def _alphas(self, name: str, steps: range | None) -> Tensor:
        if steps is None:
            return self._alpha(name, None)
        return torch.stack([self._alpha(name, step) for step in steps])

    def _each(self, name: str, x: Tensor, steps: range | None) -> Tensor:
        """Apply a matrix, each depformer step its own."""
        if steps is None:
            return self._linear(name, None, x)
        return torch.stack([self._linear(name, step, x[:, index]) for index, step in enumerate(steps)], 1)


def _rotate(x: Tensor, positions: Tensor, max_period: int) -> Tensor:
    """Rotate interleaved pairs of ``[batch, heads, frames, head]`` by their position (RoPE), in float32."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32)
    angles = positions[:, None].float() * torch.exp(exponents * (-math.log(max_period) / half))
    real, imaginary = x.float().reshape(*x.shape[:-1], half, 2).unbind(-1)
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return softmax attention ``[batch, heads, frames, head]`` of queries, keys and values, in float32 on a CPU.

    PyTorch's 16-bit kernel ends in an error on processors whose vector units it is told not to use
    (``ATEN_CPU_CAPABILITY``); it sums in float32, too.
    """
    if q.device.type == "cpu":
        return functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def kept_whole(model: TorchModel) -> TorchModel:
    """Return a model whose weights are read once, and kept on its device in its dtype."""
    weights = kept_by({}, model.weights, model.device, model.dtype)
    return replace(model, weights=weights, rows=rows_of(weights))


def reference_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TorchModel:
    """Return the reference over a checkpoint, as it is trained and evaluated: whole sequences, all steps visible."""
    a = checkpoint.architecture
    return TorchModel(
        a, source_weights(checkpoint), each_once(sorted_rows(checkpoint), device), dtype, a.context, a.steps, device
    )
