"""Quantizing a model layer by layer on what its layers really get: the outputs of the quantized layers before them.

The original and the quantized model go through the calibration material side by side, as in a comparison. What a block
has to quantize is solved (``quant.gptq``) before the streams go on through it. No more than one block's weights and
moments are held, and the two streams. What is solved is on the disk, and a killed run only goes through it again.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore, quantizations_of
from ..convert.bundle.records import Adjustment
from ..convert.errors import UserError
from ..convert.progress import bar
from ..convert.source.source import Source
from ..convert.tensorfile import DTYPES
from ..model import torch_device as devices
from ..model.blocks import Block
from ..model.forward import Floats, Tokens
from ..model.reference import Rows, TorchModel, Weights, kept_by, reference_of, source_rows, source_weights
from ..model.tokens import TokenSet, evenly_spaced
from ..model.walk import step_inputs, walk
from ..quant.affine import DATA_DRIVEN, QuantizationConfig, Quantized, dequantize
from ..quant.gptq import FALLBACK, Moments, Outcome, gptq_with_retries
from . import weight_only
from .block_tuning import tune_block
from .moments import block_moments, moments_of
from .parameters import begin

_STREAM = 1 << 29  # bytes of a stream, at most: of that many frames, evenly spread, a solution is made
FINE_TUNED = "refined.safetensors"  # where a solution holds what was tuned as a whole
Streams = dict[str, Floats]  # of the models called original and quantized


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
class LayerwiseRun:
    """The original and the quantized model, and what is known of the matrices to quantize.

    quantizations: how each matrix is quantized, and the dtype of its scales. models, kept: ``original`` and
    ``quantized``, and the matrices that each keeps of a block. tuning: of each block after its matrices are quantized.
    """

    source: Source
    quantizations: dict[MatrixKey, tuple[QuantizationConfig, str]]
    store: QuantizedStore
    models: dict[str, TorchModel]
    kept: dict[str, dict[MatrixKey, Tensor]]
    tuning: BlockTuning
    bar: "tqdm[Any]"

    def wanted(self, names: Sequence[str]) -> list[MatrixKey]:
        """Return the parts of these tensors that are to be solved."""
        return [
            part
            for part in self.quantizations
            if part[0] in names and self.quantizations[part][0].method in DATA_DRIVEN
        ]

    def forget(self) -> None:
        """Drop the weights that are kept."""
        for kept in self.kept.values():
            kept.clear()

    @contextmanager
    def at_block(self, block: Block, streams: Streams) -> Iterator[Streams]:
        """Quantize a block's matrices before the streams go through it.

        Those that read the block's input come before those that read what these make of it.
        """
        matrices = _matrices(block, self.source.architecture.steps)
        for names in matrices:
            parts = [part for part in self.wanted(names) if part not in self.store.files]
            if parts:
                label = names[0].removesuffix("weight").rstrip("._")
                self.solve(label, block_moments(self.models, block, parts, streams))
        self.tune(block, self.wanted([name for names in matrices for name in names]), streams)
        yield {}
        self.forget()

    def tune(self, block: Block, parts: list[MatrixKey], streams: Streams) -> None:
        """Tune a block's solved matrices, and keep them."""
        label = f"{block.prefix}.{block.sublayer}.tuned"
        if not (self.tuning.steps and parts) or self.store.files[parts[0]] in (f"{label}.safetensors", FINE_TUNED):
            return
        if self.tuning.on_block:
            self.tuning.on_block(block)
        device, read = self.models["original"].device, source_weights(self.source.checkpoint)
        tuned = {part: begin(part, *self.quantizations[part], self.store, device) for part in parts}
        tune_block(self.models, block, tuned, streams, self.tuning.steps)
        self.store.add(label, {part: one.finished(read(*part)) for part, one in tuned.items()})
        for part in parts:
            self.kept["quantized"].pop(part, None)

    def solve(self, block: str, found: dict[MatrixKey, Moments]) -> None:
        """Quantize parts by their inputs' moments, and keep them."""
        self.forget()  # solving needs the room; reading a block again takes little of its time
        made: dict[MatrixKey, Quantized] = {}
        adjusted: dict[MatrixKey, Adjustment] = {}
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


def _matrices(block: Block, steps: int) -> tuple[list[str], list[str]]:
    """Return the names of a block's matrices: those that read its input, and those that read what these make of it."""
    if block.sublayer == "attention":
        stems, first, second = [f"{block.prefix}.self_attn"], "in_proj_weight", "out_proj.weight"
    else:
        gates = [f".{step}" for step in range(steps)] if block.component == "depformer" else [""]
        stems, first, second = [f"{block.prefix}.gating{s}" for s in gates], "linear_in.weight", "linear_out.weight"
    return [f"{stem}.{first}" for stem in stems], [f"{stem}.{second}" for stem in stems]


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
    kept: dict[str, dict[MatrixKey, Tensor]] = {"original": {}, "quantized": {}}
    model = reference_of(source.checkpoint, device=device)
    weights = kept_by(kept["quantized"], quantized_weights(source, quantizations, store), device)
    models = {
        "original": replace(model, weights=kept_by(kept["original"], model.weights, device)),
        "quantized": replace(model, weights=weights, rows=quantized_rows(source, quantizations)),
    }
    count = sum(quantization.method in DATA_DRIVEN for quantization, _ in quantizations.values())
    with bar("solving", count, "matrix", quiet) as progress, torch.no_grad():
        run = LayerwiseRun(source, quantizations, store, models, kept, tuning or BlockTuning(), progress)
        progress.update(len(store.files))
        fitting = token_set.chosen(_fitting(len(token_set.tokens), token_set.tokens.shape[2] * source.architecture.dim))
        _audio(run, fitting, _temporal(run, fitting))


def quantized_weights(
    source: Source, quantizations: dict[MatrixKey, tuple[QuantizationConfig, str]], store: QuantizedStore
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


def quantized_rows(source: Source, quantizations: dict[MatrixKey, tuple[QuantizationConfig, str]]) -> Rows:
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


def _temporal(run: LayerwiseRun, token_set: TokenSet) -> Streams:
    """Quantize the temporal transformer; return its normalized outputs ``[sequences, frames, dim]``."""
    streams = {name: model.embed(token_set.tokens) for name, model in run.models.items()}
    walk(run.source.architecture, "temporal", streams, run.models.__getitem__, run.at_block)
    outputs = {name: model.out_norm(streams[name]) for name, model in run.models.items()}
    _quantize_read(run, "text_linear", run.wanted(["text_linear.weight"]), outputs)
    return outputs


def _audio(run: LayerwiseRun, token_set: TokenSet, hidden: Streams) -> None:
    """Quantize the depformer."""
    arch = run.source.architecture
    known = token_set.counted[:, 1 : arch.steps + 1].any(1)
    targets = token_set.targets.transpose(0, 2, 1)[known]
    rows = _fitting(len(targets), arch.steps * arch.depformer_dim)
    targets, states = targets[rows], {name: array[known][rows] for name, array in hidden.items()}
    _quantize_read(
        run, "depformer_in", run.wanted([f"depformer_in.{step}.weight" for step in range(arch.steps)]), states
    )
    streams = {name: step_inputs(model, states[name], targets, arch.steps) for name, model in run.models.items()}
    run.forget()
    walk(arch, "depformer", streams, run.models.__getitem__, run.at_block)
    for step in range(arch.steps):
        name, outputs = f"linears.{step}", {name: array[:, step] for name, array in streams.items()}
        _quantize_read(run, name, run.wanted([f"{name}.weight"]), outputs)


def _fitting(count: int, floats: int) -> NDArray[np.int64]:
    """Return which of ``count`` sequences or rows, of so many floats each, fit into a stream."""
    return evenly_spaced(count, max(1, _STREAM // (4 * floats)))


def _quantize_read(run: LayerwiseRun, block: str, parts: list[MatrixKey], inputs: Streams) -> None:
    """Quantize matrices that all read the same input, which is at hand."""
    parts = [part for part in parts if part not in run.store.files]
    if parts:
        run.solve(block, dict.fromkeys(parts, moments_of(inputs, run.models["original"].device)))
