"""Layer-wise GPTQ: each layer is quantized on the inputs that it gets from the quantized layers before it.

The original and the quantized model go through the calibration tokens side by side, as in a comparison. A block's
matrices are quantized (``quant.gptq``) before the streams go through it. Memory holds the two streams, and the weights
and moments of one block. Quantized matrices are on the disk: a killed run resumes from them, and only computes the
streams again.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore, quantizations_of
from ..convert.bundle.records import Adjustment
from ..convert.errors import UserError
from ..convert.progress import Progress, bar, keeping
from ..convert.source.source import Source
from ..convert.tensorfile import DTYPES
from ..model import torch_device as devices
from ..model.blocks import Block
from ..model.forward import Floats
from ..model.reference import TorchModel, kept_by, reference_of, source_weights
from ..model.tokens import TokenSet, evenly_spaced
from ..model.walk import step_inputs, walk
from ..quant.affine import DATA_DRIVEN, QuantizationConfig, Quantized
from ..quant.gptq import FALLBACK, Inputs, Moments, Outcome, Prepared, gptq_with_retries
from .block_tuning import tune_block
from .gradients import output_gradients
from .moments import added_to, block_inputs, block_moments, moments_of
from .parameters import trainable_matrix
from .quantized_model import quantized_rows, quantized_weights
from .work import STREAM_BYTES, TensorWork, Work, gradients_work, inputs_are_kept, operations, tensor_works

FINE_TUNED = "refined.safetensors"  # in a quantized-weight store: the matrices that were fine-tuned together
Streams = dict[str, Floats]  # of the models called original and quantized


@dataclass(frozen=True)
class BlockTuning:
    """Steps of fine-tuning for each block. on_block: called with a block before it is fine-tuned."""

    steps: int = 0
    on_block: Callable[[Block], None] | None = None


def _adjusted(outcome: Outcome) -> Adjustment:
    """Return what a manifest records of a matrix for which the usual damping of GPTQ was not enough."""
    return Adjustment(outcome.reason, FALLBACK if outcome.damping is None else None, outcome.damping)


def _warning(outcome: Outcome) -> str:
    how = f"by its weights alone ({FALLBACK})" if outcome.damping is None else f"with damping {outcome.damping:g}"
    return f"{outcome.reason}: quantized {how}"


@dataclass(frozen=True)
class LayerwiseRun:
    """The original and the quantized model, and the matrices to quantize.

    quantizations: of each matrix, with the dtype of its scales. models: ``original`` and ``quantized``. kept: the
    weights of a block that each of them has read. tuning: of each block, after its matrices are quantized. works: of
    each source tensor, which the bar counts, in whatever ``weigh`` makes of them. gradients: at the outputs of
    matrices, see ``gradients.output_gradients``.
    """

    source: Source
    quantizations: dict[MatrixKey, tuple[QuantizationConfig, str]]
    store: QuantizedStore
    models: dict[str, TorchModel]
    kept: dict[str, dict[MatrixKey, Tensor]]
    tuning: BlockTuning
    bar: Progress
    works: dict[str, TensorWork]
    weigh: Callable[[Work], float]
    gradients: dict[MatrixKey, Tensor] = field(default_factory=dict)

    def data_driven(self, names: Sequence[str]) -> list[MatrixKey]:
        """Return the matrices of these tensors that are quantized by their inputs."""
        return [
            key
            for key, (quantization, _) in self.quantizations.items()
            if key[0] in names and quantization.method in DATA_DRIVEN
        ]

    @property
    def count(self) -> int:
        """How many matrices are quantized by their inputs, in all."""
        return sum(quantization.method in DATA_DRIVEN for quantization, _ in self.quantizations.values())

    def release_weights(self) -> None:
        """Drop the weights that are kept."""
        for weights in self.kept.values():
            weights.clear()

    @contextmanager
    def at_block(self, block: Block, streams: Streams) -> Iterator[Streams]:
        """Quantize a block's matrices before the streams go through it.

        Those that read the block's input come before those that read what these make of it.
        """
        first, second = _matrices(block, self.source.architecture.steps)
        if keys := self.missing(first):
            moments = block_moments(self.models, block, keys, streams)
            self.count_forward(first, 0.5)
            self.quantize(_label(first), moments)
        else:
            self.count_forward(first, 0.5)
        self.count_forward(second, 0.5)
        computed: Streams = {}
        if keys := self.missing(second):
            if not self.tuning.steps and self.can_keep_inputs(block, keys, streams):
                computed = self.quantize_last(_label(second), block, keys, streams)
            else:
                self.quantize(_label(second), block_moments(self.models, block, keys, streams))
        self.fine_tune(block, self.data_driven([*first, *second]), streams)
        yield computed
        self.release_weights()
        self.count_forward([*first, *second], 0.5)

    def count_forward(self, names: Sequence[str], share: float) -> None:
        """Count a share of the passes of both models through these tensors."""
        self.bar.update(sum(share * self.weigh(self.works[name].forward) for name in names if name in self.works))

    def missing(self, names: Sequence[str]) -> list[MatrixKey]:
        """Return the matrices of these tensors that are still to be quantized."""
        return [key for key in self.data_driven(names) if key not in self.store.files]

    def can_keep_inputs(self, block: Block, keys: list[MatrixKey], streams: Streams) -> bool:
        """Tell whether these are all of a block's last matrices, and their inputs are small enough to be kept."""
        a, shape = self.source.architecture, streams["original"].shape
        frames, count = (shape[0] * shape[1], 1) if block.component == "temporal" else (shape[0], a.steps)
        columns = sum(self.source.checkpoint.tensors[name].spec.columns for name, _ in keys)
        return len(keys) == count and inputs_are_kept(frames, columns)

    def quantize_last(self, label: str, block: Block, keys: list[MatrixKey], streams: Streams) -> Streams:
        """Quantize a block's last matrices; return the streams behind it, in place.

        What the matrices read is computed once and kept, so that nothing before them is computed again.
        """
        device = self.models["original"].device
        inputs = {name: block_inputs(model, block, keys, streams[name]) for name, model in self.models.items()}
        moments = {
            key: moments_of(inputs["original"][key], inputs["quantized"][key], device, added_to(block, key, streams))
            for key in keys
        }
        self.quantize(label, moments)
        for name, model in self.models.items():
            stream = streams[name]
            for rows in block.batches(stream):  # as ``walk`` takes them: a resumed run comes to the same bytes
                for step, (key, x) in enumerate(inputs[name].items()):
                    some = x.reshape(len(stream), -1, x.shape[-1])[rows]
                    added = model.product(key[0], key[1], some).cpu().numpy()
                    part = stream[rows] if block.component == "temporal" else stream[rows, step : step + 1]
                    part += added
        return streams

    def fine_tune(self, block: Block, keys: list[MatrixKey], streams: Streams) -> None:
        """Fine-tune a block's quantized matrices, and store them."""
        label = f"{block.prefix}.{block.sublayer}.tuned"
        if not (self.tuning.steps and keys) or self.store.files[keys[0]] in (f"{label}.safetensors", FINE_TUNED):
            return
        if self.tuning.on_block:
            self.tuning.on_block(block)
        device, read = self.models["original"].device, source_weights(self.source.checkpoint)
        matrices = {key: trainable_matrix(key, *self.quantizations[key], self.store, device) for key in keys}
        tune_block(self.models, block, matrices, streams, self.tuning.steps)
        self.store.add(label, {key: matrix.quantized(read(*key)) for key, matrix in matrices.items()})
        for key in keys:
            self.kept["quantized"].pop(key, None)

    def quantize(self, label: str, moments: dict[MatrixKey, Moments | Inputs]) -> None:
        """Quantize matrices by the moments of their inputs, and store them."""
        self.release_weights()  # GPTQ needs the memory; reading a block again takes little of its time
        matrices: dict[MatrixKey, Quantized] = {}
        adjusted: dict[MatrixKey, Adjustment] = {}
        read = source_weights(self.source.checkpoint)
        previous, prepared = None, dict[float, Prepared]()
        for key, of_inputs in moments.items():
            quantization, dtype = self.quantizations[key]
            if of_inputs is not previous:  # depformer_in: 16 matrices read the same
                previous, prepared = of_inputs, {}
            try:
                outcome = gptq_with_retries(
                    read(*key), of_inputs, quantization, DTYPES[dtype], prepared, self.gradients.get(key)
                )
            except ValueError as error:
                raise UserError(f"{key[0]}: {error}: give a recipe that keeps it float") from None
            matrices[key] = outcome.quantized
            if outcome.reason:
                adjusted[key] = _adjusted(outcome)
                step = f" step {key[1]}" if self.source.checkpoint.tensors[key[0]].role.stacked > 1 else ""
                self.bar.write(f"{key[0]}{step}: {_warning(outcome)}", file=sys.stderr)
            self.bar.update(self.weigh(self.works[key[0]].matrices[key[1]]))
            done = len(self.store.files) + len(matrices)
            self.bar.set_postfix_str(f"{done} of {self.count} matrices", refresh=False)
        self.store.add(label, matrices, adjusted)

    def quantize_readers(self, label: str, names: Sequence[str], inputs: Streams) -> None:
        """Quantize matrices that all read the same inputs."""
        if keys := self.missing(names):
            original, quantized = (
                torch.from_numpy(np.ascontiguousarray(inputs[name])).flatten(0, -2)
                for name in ("original", "quantized")
            )
            of_all = moments_of(original, quantized, self.models["original"].device)
            self.quantize(label, dict.fromkeys(keys, of_all))
        self.count_forward(names, 1)


def _label(names: Sequence[str]) -> str:
    """Return what the file of matrices is called in a store, without its ending."""
    return names[0].removesuffix("weight").rstrip("._")


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
    weigh: Callable[[Work], float] = operations,
) -> None:
    """Quantize all matrices of a plan's outputs whose method needs data, into ``store``; fine-tune blocks if asked to.

    weigh: what a piece of work counts in the progress, seconds on this machine for instance.
    PyTorch computes on a GPU where there is one. A matrix whose inputs are not finite, or which GPTQ with its usual
    damping cannot quantize, is named on standard error and in ``store.adjusted``.
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
    fitting = token_set.chosen(_fitting(len(token_set.tokens), token_set.tokens.shape[2] * source.architecture.dim))
    sequences, _, frames = token_set.tokens.shape
    works = tensor_works(source.architecture, outputs, sequences, frames, store.files)
    passes = gradients_work(source.architecture, works, sequences, frames)
    total = weigh(passes) + sum(weigh(work) for one in works.values() for work in (one.forward, *one.matrices.values()))
    with bar("layer-wise GPTQ", total, "", quiet) as progress, torch.no_grad():
        run = LayerwiseRun(source, quantizations, store, models, kept, tuning or BlockTuning(), progress, works, weigh)
        with keeping(lambda: f"{len(store.files)} of {run.count} matrices are kept" if store.files else ""):
            if passes != Work():
                run.gradients.update(
                    output_gradients(model, token_set, lambda share: progress.update(share * weigh(passes)))
                )
            _audio(run, fitting, _temporal(run, fitting))


def _temporal(run: LayerwiseRun, token_set: TokenSet) -> Streams:
    """Quantize the temporal transformer; return its normalized outputs ``[sequences, frames, dim]``."""
    streams = {name: model.embed(token_set.tokens) for name, model in run.models.items()}
    walk(run.source.architecture, "temporal", streams, run.models.__getitem__, run.at_block)
    outputs = {name: model.out_norm(streams[name]) for name, model in run.models.items()}
    run.quantize_readers("text_linear", ["text_linear.weight"], outputs)
    return outputs


def _audio(run: LayerwiseRun, token_set: TokenSet, hidden: Streams) -> None:
    """Quantize the depformer."""
    arch = run.source.architecture
    known = token_set.counted[:, 1 : arch.steps + 1].any(1)
    targets = token_set.targets.transpose(0, 2, 1)[known]
    rows = _fitting(len(targets), arch.steps * arch.depformer_dim)
    targets, states = targets[rows], {name: array[known][rows] for name, array in hidden.items()}
    run.quantize_readers("depformer_in", [f"depformer_in.{step}.weight" for step in range(arch.steps)], states)
    streams = {name: step_inputs(model, states[name], targets, arch.steps) for name, model in run.models.items()}
    run.release_weights()
    walk(arch, "depformer", streams, run.models.__getitem__, run.at_block)
    for step in range(arch.steps):
        outputs = {name: array[:, step] for name, array in streams.items()}
        run.quantize_readers(f"linears.{step}", [f"linears.{step}.weight"], outputs)


def _fitting(count: int, floats: int) -> NDArray[np.int64]:
    """Return which of ``count`` sequences or rows, of so many floats each, fit into a stream."""
    return evenly_spaced(count, max(1, STREAM_BYTES // (4 * floats)))
