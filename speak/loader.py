"""Reading a bundle's model into memory, as a conversation wants it."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..convert.bundle.reader import Bundle
from ..convert.source.tensors import COMPONENTS
from ..model.blocks import Block, blocks_of
from ..model.matmul import FLOAT_DTYPES, shares
from ..model.mlx_device import on_gpu, streams
from ..model.mlx_weights import Matrix, Packing, joined, read_by_name
from .language_model import Runtime
from .layers import DepformerStep, Layer, Linear, Table

_SHARED = 1 << 18  # weights from which on a CPU's processors share a matrix: smaller ones cost more to hand out


def context_of(bundle: Bundle) -> int:
    """Return how many frames are attended to: as in the reference while it streams, whose ring masks its oldest."""
    return max(bundle.attention_spans()[0] - 1, 1)


def load(bundle: Bundle, dtype: str, few: bool | None = None) -> Runtime:
    """Read a bundle's model into memory, for activations of a dtype (float32, bfloat16, float16).

    few: to hold it for as few operations a frame as it goes, in a little more memory; None for on a GPU only.
    """
    a = bundle.architecture
    kind, shared = FLOAT_DTYPES[dtype], streams()

    def linear(name: str, step: int | None = None) -> Linear:
        matrix = _cast(read_by_name(bundle, name, step), kind)
        height = matrix.weight.shape[0]
        among = shared if len(shared) > 1 and height * bundle.output(name).role.shape[-1] >= _SHARED else (None,)
        parts = [matrix.take(rows) for rows in shares(height, len(among))]
        parts = [_owned(part) for part in parts] if len(parts) > 1 else parts
        return Linear(tuple(zip(parts, among, strict=True)))

    def norm(name: str, step: int | None = None) -> mx.array:
        weight = read_by_name(bundle, name, step).weight.reshape(-1).astype(kind)
        return _owned(Matrix(weight)).weight  # what is not yet computed would be computed again in each frame

    def layer(block: Block, step: int | None = None) -> Layer:
        prefix, gating = block.prefix, f"{block.prefix}.gating" + ("" if step is None else f".{step}")
        return Layer(
            norm(f"{prefix}.norm1.alpha", step),
            linear(f"{prefix}.self_attn.in_proj_weight", step),
            linear(f"{prefix}.self_attn.out_proj.weight", step),
            norm(f"{prefix}.norm2.alpha", step),
            linear(f"{gating}.linear_in.weight"),
            linear(f"{gating}.linear_out.weight"),
        )

    steps, few = [], on_gpu() if few is None else few
    temporal, depformer = (
        [block for block in blocks_of(a, name) if block.sublayer == "mlp"] for name in COMPONENTS[:2]
    )
    for step in range(min(a.steps, a.n_q // 2)):
        table = read_by_name(bundle, f"depformer_emb.{step - 1}.weight" if step else "depformer_text_emb.weight")
        # decoded, it takes one look-up in place of codes', scales' and biases'
        table = _owned(Matrix(table.float32().astype(kind)) if few else table)
        layers = tuple(layer(block, step) for block in depformer)
        steps.append(
            DepformerStep(linear(f"depformer_in.{step}.weight"), table, layers, linear(f"linears.{step}.weight"))
        )
    return Runtime(
        a,
        kind,
        context_of(bundle),
        _tables(bundle),
        tuple(layer(block) for block in temporal),
        norm("out_norm.alpha"),
        linear("text_linear.weight"),
        tuple(steps),
        _projections(steps) if few else None,
    )


def _projections(steps: Sequence[DepformerStep]) -> Linear | None:
    """Join the steps' projections of the hidden state, if they are quantized alike."""
    parts = [part for step in steps for part, _ in step.project.parts]
    if len({part.packing and part.packing.quantization for part in parts}) > 1:
        return None
    return Linear(((_owned(joined(parts)), None),))


def _tables(bundle: Bundle) -> tuple[Table, ...]:
    """Read the temporal transformer's embeddings, those of one form as one table."""
    names = {0: "text_emb.weight"} | {
        stream: f"emb.{stream - 1}.weight" for stream in range(1, bundle.architecture.n_q + 1)
    }
    by_form: dict[Any, list[int]] = {}
    for stream, name in names.items():
        by_form.setdefault(bundle.output(name).quantization, []).append(stream)
    found = []
    for held in by_form.values():
        parts = [read_by_name(bundle, names[stream]) for stream in held]
        first = np.cumsum([0] + [part.weight.shape[0] for part in parts[:-1]]).tolist()
        found.append(Table(_owned(joined(parts)), dict(zip(held, first, strict=True))))
    return tuple(found)


def _cast(matrix: Matrix, dtype: mx.Dtype) -> Matrix:
    """Return a matrix whose floats, or scales and biases, have a dtype."""
    packing = matrix.packing
    if packing is None:
        return _owned(Matrix(matrix.weight.astype(dtype)))
    scales, biases = packing.scales.astype(dtype), packing.biases.astype(dtype)
    return _owned(Matrix(matrix.weight, Packing(scales, biases, packing.quantization)))


def _owned(matrix: Matrix) -> Matrix:
    """Return a matrix computed and in memory of its own, so that what it came from can go."""
    packing = matrix.packing
    weight = mx.contiguous(matrix.weight)
    if packing is None:
        mx.eval(weight)
        return Matrix(weight)
    scales, biases = mx.contiguous(packing.scales), mx.contiguous(packing.biases)
    mx.eval(weight, scales, biases)
    return Matrix(weight, Packing(scales, biases, packing.quantization))
