"""Quantizing a model layer by layer on what its layers really get: the outputs of the quantized layers before them.

The original and the quantized model go through the calibration material side by side, as in a comparison. What a block
has to quantize is solved (``quant.gptq``) before the streams go on through it. No more than one block's weights and
moments are held, and the two streams. What is solved is on the disk, and a killed run only goes through it again.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.quantized_store import Part, QuantizedStore, quantizations_of
from ..convert.bundle.records import Adjustment
from ..convert.errors import UserError
from ..convert.progress import bar
from ..convert.source.source import Source
from ..convert.tensorfile import DTYPES
from ..model import torch_device as devices
from ..model.blocks import Block, blocks_of
from ..model.forward import Floats, Tokens
from ..model.reference import Rows, TorchModel, Weights, kept_by, reference_of, source_rows, source_weights
from ..model.tokens import TokenSet, evenly_spaced
from ..quant.affine import DATA_DRIVEN, QuantizationConfig, Quantized, dequantize
from ..quant.gptq import FALLBACK, Moments, Outcome, gptq_with_retries
from . import weight_only
from .block_tuning import tune_block
from .moments import block_moments, moments_of
from .parameters import begin

_STREAM = 1 << 29  # bytes of a stream, at most: of that many frames, evenly spread, a solution is made
FINE_TUNED = "refined.safetensors"  # where a solution holds what was tuned as a whole
Streams = tuple[Floats, Floats]  # of the original and of the quantized model


@dataclass(frozen=True)
class BlockTuning:
    """How long each block is tuned. on_block: called with a block before it is."""

    steps: int = 0
    on_block: Callable[[Block], None] | None = None


def _adjusted(outcome: Outcome) -> Adjustment:
    """Return what a manifest records of a matrix for which the usual damping of GPTQ was not enough."""
    return Adjustment(outcome.reason, FALLBACK if outcome.damping is None else None, outcome.damping)


def _told(outcome: Outcome) -> str:
    how = f"by its weights alone ({FALLBACK})" if outcome.damping is None else f"with damping {outcome.damping:g}"
    return f"{outcome.reason}: quantized {how}"


@dataclass(frozen=True)
class Walk:
    """Both models under way.

    forms: how each part is quantized, and the dtype of its scales. tuning: of each block when it is solved.
    """

    source: Source
    quantizations: dict[Part, tuple[QuantizationConfig, str]]
    store: QuantizedStore
    original: TorchModel
    quantized: TorchModel
    kept: list[dict[Part, Tensor]]
    tuning: BlockTuning
    bar: "tqdm[Any]"

    def wanted(self, names: Sequence[str]) -> list[Part]:
        """Return the parts of these tensors that are to be solved."""
        return [
            part
            for part in self.quantizations
            if part[0] in names and self.quantizations[part][0].method in DATA_DRIVEN
        ]

    def forget(self) -> None:
        """Drop the weights that are kept."""
        for kept in self.kept:
            kept.clear()

    def tune(self, place: Block, parts: list[Part], streams: Streams) -> None:
        """Tune a block's solved matrices, and keep them."""
        label = f"{place.prefix}.{place.part}.tuned"
        if not (self.tuning.steps and parts) or self.store.files[parts[0]] in (f"{label}.safetensors", FINE_TUNED):
            return
        if self.tuning.on_block:
            self.tuning.on_block(place)
        device, read = self.original.device, source_weights(self.source.checkpoint)
        tuned = {part: begin(part, *self.quantizations[part], self.store, device) for part in parts}
        tune_block(self.original, self.quantized, place, tuned, streams, self.tuning.steps)
        self.store.add(label, {part: one.finished(read(*part)) for part, one in tuned.items()})
        for part in parts:
            self.kept[1].pop(part, None)

    def solve(self, block: str, found: dict[Part, Moments]) -> None:
        """Quantize parts by their inputs' moments, and keep them."""
        self.forget()  # solving needs the room; reading a block again takes little of its time
        made: dict[Part, Quantized] = {}
        adjusted: dict[Part, Adjustment] = {}
        read = source_weights(self.source.checkpoint)
        for part, moments in found.items():
            quantization, dtype = self.quantizations[part]
            try:
                outcome = gptq_with_retries(read(*part), moments, quantization, DTYPES[dtype])
            except ValueError as error:
                raise UserError(f"{part[0]}: {error}: give a recipe that keeps it float") from None
            made[part] = outcome.made
            if outcome.reason:
                adjusted[part] = _adjusted(outcome)
                stacked = self.source.checkpoint.tensors[part[0]].role.stacked > 1
                step = f" step {part[1]}" if stacked else ""
                self.bar.write(f"{part[0]}{step}: {_told(outcome)}", file=sys.stderr)
            self.bar.update(1)
        self.store.add(block, made, adjusted)


def quantize_model(
    source: Source,
    outputs: list[Output],
    token_set: TokenSet,
    store: QuantizedStore,
    tuning: BlockTuning | None = None,
    quiet: bool = False,
) -> None:
    """Solve everything that a plan's outputs want solved, and leave it in ``solution``; tune each block if asked to.

    PyTorch computes on a GPU where there is one. A matrix whose inputs are not finite, or which GPTQ with its usual
    damping cannot quantize, is named on standard error and in ``solution.adjusted``.
    """
    device = devices.device()
    quantizations = quantizations_of(outputs)
    kept: list[dict[Part, Tensor]] = [{}, {}]
    original = reference_of(source.checkpoint, device=device)
    read = quantized_weights(source, quantizations, store)
    quantized = replace(original, weights=kept_by(kept[1], read, device), rows=quantized_rows(source, quantizations))
    original = replace(original, weights=kept_by(kept[0], original.weights, device))
    count = sum(quantization.method in DATA_DRIVEN for quantization, _ in quantizations.values())
    with bar("solving", count, "matrix", quiet) as progress, torch.no_grad():
        walk = Walk(source, quantizations, store, original, quantized, kept, tuning or BlockTuning(), progress)
        progress.update(len(store.files))
        fitting = token_set.chosen(_fitting(len(token_set.tokens), token_set.tokens.shape[2] * source.architecture.dim))
        _audio(walk, fitting, _temporal(walk, fitting))


def quantized_weights(
    source: Source, quantizations: dict[Part, tuple[QuantizationConfig, str]], store: QuantizedStore
) -> Weights:
    """Return a way to read the quantized model's matrices: solved ones, others by their method, else the source's.

    A matrix that is still to be solved is read as it is: what is asked for comes before it.
    """
    original = source_weights(source.checkpoint)

    def read(name: str, step: int | None) -> Tensor:
        part, weight = (name, step or 0), original(name, step)
        if part not in quantizations:
            return weight
        quantization, dtype = quantizations[part]
        if quantization.method not in DATA_DRIVEN:
            made = weight_only.quantized(
                name, np.ascontiguousarray(weight.float().numpy()), quantization, DTYPES[dtype]
            )
        elif part in store.files:
            made = store.read(part, 0, len(weight), DTYPES[dtype])
        else:
            return weight
        return torch.from_numpy(dequantize(made, quantization))

    return read


def quantized_rows(source: Source, quantizations: dict[Part, tuple[QuantizationConfig, str]]) -> Rows:
    """Return a way to read rows of embedding tables as they will be."""
    original = source_rows(source.checkpoint)

    def read(name: str, tokens: Tokens) -> Tensor:
        found = original(name, tokens)
        if (name, 0) not in quantizations:
            return found
        quantization, dtype = quantizations[name, 0]
        flat = np.ascontiguousarray(found.float().numpy().reshape(-1, found.shape[-1]))
        made = weight_only.quantized(name, flat, quantization, DTYPES[dtype])
        return torch.from_numpy(dequantize(made, quantization)).reshape(found.shape)

    return read


def _temporal(walk: Walk, token_set: TokenSet) -> Streams:
    """Go through the temporal transformer; return its normalized outputs ``[sequences, frames, dim]``."""
    arch = walk.source.architecture
    streams = (walk.original.embed(token_set.tokens), walk.quantized.embed(token_set.tokens))
    for place in blocks_of(arch, "temporal"):
        streams = _block(walk, place, streams)
    outputs = (walk.original.out_norm(streams[0]), walk.quantized.out_norm(streams[1]))
    _quantize_read(walk, "text_linear", walk.wanted(["text_linear.weight"]), outputs)
    return outputs


def _audio(walk: Walk, token_set: TokenSet, hidden: Streams) -> None:
    """Go through the depformer."""
    arch = walk.source.architecture
    known = token_set.counted[:, 1 : arch.steps + 1].any(1)
    targets = token_set.targets.transpose(0, 2, 1)[known]
    rows = _fitting(len(targets), arch.steps * arch.depformer_dim)
    targets, states = targets[rows], tuple(array[known][rows] for array in hidden)
    inputs = [f"depformer_in.{step}.weight" for step in range(arch.steps)]
    _quantize_read(walk, "depformer_in", walk.wanted(inputs), (states[0], states[1]))
    pair = []
    for model, state in zip((walk.original, walk.quantized), states, strict=True):
        x = np.empty((len(targets), arch.steps, arch.depformer_dim), np.float32)
        for step in range(arch.steps):
            x[:, step] = model.step_input(step, state, targets[:, step])
        pair.append(x)
    walk.forget()
    streams = (pair[0], pair[1])
    for place in blocks_of(arch, "depformer"):
        streams = _block(walk, place, streams)
    for step in range(arch.steps):
        name = f"linears.{step}"
        _quantize_read(walk, name, walk.wanted([f"{name}.weight"]), (streams[0][:, step], streams[1][:, step]))


def _fitting(count: int, floats: int) -> NDArray[np.int64]:
    """Return which of ``count`` sequences or rows, of so many floats each, fit into a stream."""
    return evenly_spaced(count, max(1, _STREAM // (4 * floats)))


def _quantize_read(walk: Walk, block: str, parts: list[Part], inputs: Streams) -> None:
    """Solve matrices that all read the same input, which is at hand."""
    parts = [part for part in parts if part not in walk.store.files]
    if parts:
        walk.solve(block, dict.fromkeys(parts, moments_of(inputs, walk.original.device)))


def _block(walk: Walk, place: Block, streams: Streams) -> Streams:
    """Solve a block's matrices, those that read its input before those that read what they make; then go through it.

    The streams are changed in place.
    """
    stacked = [f".{step}" for step in range(walk.source.architecture.steps)] if place.component == "depformer" else [""]
    orders = (
        (["self_attn.in_proj_weight"], ["self_attn.out_proj.weight"])
        if place.part == "attention"
        else ([f"gating{s}.linear_in.weight" for s in stacked], [f"gating{s}.linear_out.weight" for s in stacked])
    )
    for names in orders:
        parts = walk.wanted([f"{place.prefix}.{name}" for name in names])
        parts = [part for part in parts if part not in walk.store.files]
        if parts:
            label = f"{place.prefix}.{names[0].removesuffix('weight').rstrip('._')}"
            walk.solve(label, block_moments(walk.original, walk.quantized, place, parts, streams))
    walk.tune(place, walk.wanted([f"{place.prefix}.{name}" for names in orders for name in names]), streams)
    for model, x in zip((walk.original, walk.quantized), streams, strict=True):
        for rows in place.pieces(x):
            x[rows] = model.block(place, x[rows])[1]
    walk.forget()
    return streams
