"""Layer-wise GPTQ: each layer is quantized on the inputs that it gets from the quantized layers before it.

The original and the quantized model go through the calibration tokens side by side, as in a comparison. A block's
matrices are quantized (``quant.gptq``) before the streams go through it. Memory holds the two streams, and the weights
and moments of one block. Quantized matrices are on the disk: a killed run resumes from them, and only computes the
streams again.

Several workers take some of the calibration sequences each, add up their moments, and quantize some of the matrices,
or rows of them. What they decide by is the same on all.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore, quantizations_of
from ..convert.progress import Progress, bar, keeping
from ..convert.source.source import Source
from ..model import torch_device as devices
from ..model.blocks import Block, blocks_of
from ..model.reference import TorchModel, reference_of
from ..model.tokens import TokenSet
from ..model.walk import walk
from ..model.weights import kept_by, source_weights
from ..quant.affine import DATA_DRIVEN, QuantizationConfig
from ..quant.gptq import Inputs, Moments
from ..quant.rounding import compiling
from .block_tuning import BlockTuning, tune_block
from .gradients import output_gradients
from .matrix_parts import Rounding, adjustment_of, joined_outcomes, parts_of, warning_of
from .moments import added_to, block_inputs, block_moments, moments_of
from .parameters import trainable_matrix
from .quantized_model import quantized_rows, quantized_weights
from .read_ahead import ROOM, ReadAhead, reading_ahead
from .store_writer import StoreWriter, data_driven_count, kept_text, label_of
from .stream_rows import depformer_rows, fitting_sequences
from .work import TensorWork, Work, gradients_work, inputs_are_kept, operations, tensor_works
from .workers import Workers

FINE_TUNED = "refined.safetensors"  # in a quantized-weight store: the matrices that were fine-tuned together
_ALONE = Workers()
Streams = dict[str, Tensor]  # of the models called original and quantized, on their device


@dataclass(frozen=True)
class LayerwiseRun:
    """The original and the quantized model, and the matrices to quantize.

    quantizations: of each matrix, with the dtype of its scales. writer: to the store, which only the worker that leads
    uses. ahead: what the original reads its weights with. models: ``original`` and ``quantized``. kept: the weights of
    a block that each of them has read. tuning: of each block, after its matrices are quantized. works: of each source
    tensor, which the bar counts, in whatever ``weigh`` makes of them. gradients: at the outputs of matrices, see
    ``gradients.output_gradients``.
    """

    source: Source
    quantizations: dict[MatrixKey, tuple[QuantizationConfig, str]]
    store: QuantizedStore
    writer: StoreWriter
    ahead: ReadAhead
    models: dict[str, TorchModel]
    kept: dict[str, dict[MatrixKey, Tensor]]
    tuning: BlockTuning
    bar: Progress
    works: dict[str, TensorWork]
    weigh: Callable[[Work], float]
    workers: Workers = field(default_factory=Workers)
    gradients: dict[MatrixKey, Tensor] = field(default_factory=dict)

    def data_driven(self, names: Sequence[str]) -> list[MatrixKey]:
        """Return the matrices of these tensors that are quantized by their inputs."""
        return [
            key
            for key, (quantization, _) in self.quantizations.items()
            if key[0] in names and quantization.method in DATA_DRIVEN
        ]

    @property
    def keeps_weights(self) -> bool:
        """Whether a block's weights stay on the device while its matrices are quantized: on GPUs with enough memory."""
        return self.models["original"].device == "cuda" and devices.memory() >= ROOM

    def release_weights(self) -> None:
        """Drop the weights that are kept."""
        for weights in self.kept.values():
            weights.clear()

    def advance(self, name: str, block: Block, x: Tensor) -> None:
        """Take a model's stream through a block, in place."""
        self.models[name].advance(block, x)

    @contextmanager
    def at_block(self, block: Block, streams: Streams) -> Iterator[Streams]:
        """Quantize a block's matrices before the streams go through it.

        Those that read the block's input come before those that read what these make of it.
        """
        self.ahead.at(block)
        first, second = block.matrices(self.source.architecture.steps)
        if keys := self.missing(first):
            moments = block_moments(self.models, block, keys, streams, self.workers)
            self.count_forward(first, 0.5)
            self.quantize(label_of(first), moments)
        else:
            self.count_forward(first, 0.5)
        self.count_forward(second, 0.5)
        computed: Streams = {}
        if keys := self.missing(second):
            if not self.tuning.steps and self.can_keep_inputs(block, keys, streams):
                computed = self.quantize_last(label_of(second), block, keys, streams)
            else:
                self.quantize(label_of(second), block_moments(self.models, block, keys, streams, self.workers))
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
        a, length = self.source.architecture, streams["original"].shape[1]
        rows = self.workers.total(len(streams["original"]))
        frames, count = (rows * length, 1) if block.component == "temporal" else (rows, a.steps)
        columns = sum(self.source.checkpoint.tensors[name].spec.columns for name, _ in keys)
        return len(keys) == count and inputs_are_kept(frames, columns)

    def quantize_last(self, label: str, block: Block, keys: list[MatrixKey], streams: Streams) -> Streams:
        """Quantize a block's last matrices; return the streams behind it, in place.

        What the matrices read is computed once and kept, so that nothing before them is computed again.
        """
        device = self.models["original"].device
        inputs = {name: block_inputs(model, block, keys, streams[name]) for name, model in self.models.items()}
        own = len(streams["original"])
        rows = self.workers.total(own)
        moments: dict[MatrixKey, Moments | Inputs] = {}
        for key in keys:
            original, quantized = inputs["original"][key], inputs["quantized"][key]
            in_front, frames = added_to(block, key, streams), len(original) * rows // own
            moments[key] = moments_of(original, quantized, device, in_front, self.workers, frames)
        self.quantize(label, moments)
        for name, model in self.models.items():
            stream = streams[name]
            for batch in block.batches(stream.shape):  # as ``walk`` takes them: a resumed run comes to the same bytes
                for step, (key, x) in enumerate(inputs[name].items()):
                    some = x.reshape(len(stream), -1, x.shape[-1])[batch]
                    part = stream[batch] if block.component == "temporal" else stream[batch, step : step + 1]
                    part += model.product(key[0], key[1], some)
        return streams

    def fine_tune(self, block: Block, keys: list[MatrixKey], streams: Streams) -> None:
        """Fine-tune a block's quantized matrices, and store them."""
        label = f"{block.prefix}.{block.sublayer}.tuned"
        if not (self.tuning.steps and keys):
            return
        self.finish_writing()
        if self.store.files[keys[0]] in (f"{label}.safetensors", FINE_TUNED):
            return
        if self.tuning.on_block:
            self.tuning.on_block(block)
        device = self.models["original"].device
        matrices = {key: trainable_matrix(key, *self.quantizations[key], self.store, device) for key in keys}
        for key in keys:
            self.kept["quantized"].pop(key, None)
        tune_block(self.models, block, matrices, streams, self.tuning.steps)
        self.store.add(label, {key: matrix.quantized() for key, matrix in matrices.items()})

    def quantize(self, label: str, moments: dict[MatrixKey, Moments | Inputs]) -> None:
        """Quantize matrices by the moments of their inputs, and store them.

        Each worker quantizes some of them, or some of their rows; the one that leads writes them all.
        """
        read = self.models["original"].weights
        if not self.keeps_weights:
            self.release_weights()  # GPTQ needs the memory; reading a block again takes little of its time
            read = source_weights(self.source.checkpoint)
        rounding = Rounding(read, self.quantizations, moments, self.gradients)
        heights = {key: self.source.checkpoint.tensors[key[0]].role.height for key in moments}
        weights = {key: self.weigh(self.works[key[0]].matrices[key[1]]) for key in moments}
        parts = parts_of(heights, self.workers)
        own, total = sum(weights[part.key] * part.share(heights) for part in parts), sum(weights.values())
        made = []
        for number, part in enumerate(parts, 1):
            made.append((part, rounding.outcome(part)))
            self.bar.update(weights[part.key] * part.share(heights) * total / own)  # others do theirs meanwhile
            done = len(self.store.files) + len(moments) * number // len(parts)
            self.bar.set_postfix_str(f"{done} of {data_driven_count(self.quantizations)} matrices", refresh=False)
        if not parts:
            self.bar.update(total)
        outcomes = joined_outcomes(self.workers.gathered(made), rounding)
        for key in outcomes:
            self.gradients.pop(key, None)  # memory of the device
        if self.workers.leads:
            for (name, step), outcome in outcomes.items():
                if outcome.reason:
                    which = f" step {step}" if self.source.checkpoint.tensors[name].role.stacked > 1 else ""
                    self.bar.write(f"{name}{which}: {warning_of(outcome)}", file=sys.stderr)
            adjusted = {key: adjustment_of(outcome) for key, outcome in outcomes.items() if outcome.reason}
            self.writer.add(label, {key: outcome.matrix for key, outcome in outcomes.items()}, adjusted)
        if self.keeps_weights:
            for key, outcome in outcomes.items():
                quantization, device = self.quantizations[key][0], self.models["quantized"].device
                self.kept["quantized"][key] = outcome.matrix.dequantized(quantization, device)
        else:
            self.finish_writing()

    def finish_writing(self) -> None:
        """Return when all quantized matrices are in the store, for all workers."""
        self.writer.finish()
        self.workers.wait()
        if not self.workers.leads:
            self.store.refresh()

    def quantize_readers(self, label: str, names: Sequence[str], inputs: Streams) -> None:
        """Quantize matrices that all read the same inputs."""
        if keys := self.missing(names):
            original, quantized = (inputs[name].contiguous().flatten(0, -2) for name in ("original", "quantized"))
            of_all = moments_of(original, quantized, self.models["original"].device, workers=self.workers)
            self.quantize(label, dict.fromkeys(keys, of_all))
        self.count_forward(names, 1)


def quantize_model(
    source: Source,
    outputs: list[Output],
    token_set: TokenSet,
    store: QuantizedStore,
    tuning: BlockTuning | None = None,
    quiet: bool = False,
    weigh: Callable[[Work], float] = operations,
    workers: Workers = _ALONE,
) -> None:
    """Quantize all matrices of a plan's outputs whose method needs data, into ``store``; fine-tune blocks if asked to.

    weigh: what a piece of work counts in the progress, seconds on this machine for instance. workers: all give the same
    source, outputs, tokens and store, and no more of them than ``most_workers``; blocks are fine-tuned by one only.
    PyTorch computes on a GPU where there is one. A matrix whose inputs are not finite, or which GPTQ with its usual
    damping cannot quantize, is named on standard error and in ``store.adjusted``.
    """
    if tuning and tuning.steps and workers.size > 1:
        raise ValueError("blocks are fine-tuned by one process")
    device = devices.device()
    quantizations = quantizations_of(outputs)
    kept: dict[str, dict[MatrixKey, Tensor]] = {"original": {}, "quantized": {}}
    model = reference_of(source.checkpoint, device=device)
    ahead = reading_ahead(source, model.weights, workers)
    model = replace(model, weights=ahead.weights)
    of_source = kept_by(kept["original"], model.weights, device)
    weights = kept_by(kept["quantized"], quantized_weights(source, quantizations, store, device, of_source), device)
    models = {
        "original": replace(model, weights=of_source),
        "quantized": replace(model, weights=weights, rows=quantized_rows(source, quantizations, device)),
    }
    fitting = fitting_sequences(token_set, source.architecture)
    sequences, _, frames = token_set.tokens.shape
    works = tensor_works(source.architecture, outputs, sequences, frames, store.files)
    passes = gradients_work(source.architecture, works, sequences, frames)
    total = weigh(passes) + sum(weigh(work) for one in works.values() for work in (one.forward, *one.matrices.values()))
    with (
        bar("layer-wise GPTQ", total, "", quiet) as progress,
        keeping(lambda: kept_text(store, outputs)),
        ahead,
        compiling(device),
        StoreWriter(store) as writer,
        torch.no_grad(),
    ):
        tuning = tuning or BlockTuning()
        run = LayerwiseRun(
            source, quantizations, store, writer, ahead, models, kept, tuning, progress, works, weigh, workers
        )
        if passes != Work():
            passed = weigh(passes)
            run.gradients.update(
                output_gradients(model, token_set, lambda share: progress.update(share * passed), workers, ahead)
            )
        _audio(run, fitting, _temporal(run, fitting))
        run.finish_writing()


def _temporal(run: LayerwiseRun, token_set: TokenSet) -> Streams:
    """Quantize the temporal transformer; return its normalized outputs ``[sequences, frames, dim]`` of this worker."""
    own = run.workers.share(len(token_set.tokens))
    a = run.source.architecture
    run.ahead.follow([*blocks_of(a, "temporal"), *blocks_of(a, "depformer")])
    streams = {name: model.embedded(token_set.tokens[own]) for name, model in run.models.items()}
    walk(a, "temporal", streams, run.advance, run.at_block)
    outputs = {name: model.hidden_states(streams.pop(name)) for name, model in run.models.items()}
    run.quantize_readers("text_linear", ["text_linear.weight"], outputs)
    run.release_weights()
    return outputs


def _audio(run: LayerwiseRun, token_set: TokenSet, hidden: Streams) -> None:
    """Quantize the depformer."""
    arch = run.source.architecture
    states, targets = depformer_rows(token_set, hidden, arch, run.workers)
    hidden.clear()  # memory of the device: what the depformer reads of it is in states
    run.quantize_readers("depformer_in", [f"depformer_in.{step}.weight" for step in range(arch.steps)], states)
    streams = {name: model.step_inputs(states.pop(name), targets, arch.steps) for name, model in run.models.items()}
    run.release_weights()
    walk(arch, "depformer", streams, run.advance, run.at_block)
    for step in range(arch.steps):
        outputs = {name: stream[:, step] for name, stream in streams.items()}
        run.quantize_readers(f"linears.{step}", [f"linears.{step}.weight"], outputs)
