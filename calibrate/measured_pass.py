"""One pass of a measurement of sensitivities: the original and variants of some groups, through both transformers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax

from ..convert.errors import UserError
from ..convert.progress import Progress
from ..convert.source.checkpoint import Checkpoint
from ..convert.source.source import Source
from ..model.blocks import Block
from ..model.divergence import kl_divergence
from ..model.forward import Floats, Tokens
from ..model.reference import TorchModel
from ..model.tokens import TokenSet, evenly_spaced
from ..model.walk import advance, step_inputs, walk
from ..model.weights import kept_by
from ..quant.affine import QuantizationConfig
from .measurement_work import READ_FIRST, MeasurementWork
from .sensitivity import STREAMS, Sensitivities, TensorGroup, settings_of, usual_group
from .weight_error import STORAGE
from .weight_only import dequantized

MOST_FRAMES = 4096  # measured on
_ROWS = 128  # frames of a sequence that go through a wide depformer
Variant = tuple[TensorGroup, int]  # a group of tensors, and the bits that it is quantized to
Streams = dict[Variant | None, Floats]  # by variant; None for the original


def _altered(
    model: TorchModel,
    checkpoint: Checkpoint,
    members: Sequence[tuple[str, int | None]],
    quantization: QuantizationConfig,
) -> TorchModel:
    """Return the model with some tensors quantized when they are read."""

    def weights(name: str, step: int | None) -> Tensor:
        values = model.weights(name, step)
        if (name, step) not in members:
            return values
        return dequantized(name, values, quantization, STORAGE, checkpoint.importance(name)).to(values.device)

    def rows(name: str, tokens: Tokens) -> Tensor:
        values = model.rows(name, tokens)
        return dequantized(name, values, quantization, STORAGE) if (name, None) in members else values

    return replace(model, weights=kept_by({}, weights, model.device), rows=rows)


def reads_temporal(groups: Sequence[TensorGroup]) -> bool:
    """Tell whether a variant of any of these groups goes through the temporal transformer."""
    return any(group.component == "temporal" or group.modules in READ_FIRST for group in groups)


@dataclass(frozen=True)
class Pass:
    """One pass of a measurement, over some of the sequences.

    members: the tensors of each group. kept: weights of the present block. nbytes: memory for streams. sums: costs,
    summed over rows; counts: the number of rows, by stream of predictions (text, agent). work: what is computed, which
    the bar counts. known: the original's normalized outputs of the temporal transformer, once they are computed.
    """

    source: Source
    members: dict[TensorGroup, list[tuple[str, int | None]]]
    model: TorchModel
    kept: dict[tuple[str, int], Tensor]
    token_set: TokenSet
    nbytes: int
    sums: Sensitivities
    work: MeasurementWork
    bar: Progress
    known: dict[None, Floats]
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))

    def count_block(self, component: str, streams: int = 1) -> None:
        """Count streams that went through a block of a component."""
        self.bar.update(streams * self.work.block[component])

    def altered(self, variant: Variant | None) -> TorchModel:
        """Return the model with a variant's group quantized."""
        if variant is None:
            return self.model
        group, bits = variant
        checkpoint, members = self.source.checkpoint, self.members[group]
        columns = [checkpoint.tensors[name].role.shape[-1] for name, _ in members]
        quantization = QuantizationConfig(bits, usual_group(settings_of(columns)), "lsq")
        return _altered(self.model, checkpoint, members, quantization)

    def variants(self, *components: str) -> list[Variant]:
        """Return all variants of the groups of these components, or of these modules outside of layers."""
        groups = [group for group in self.members if group.component in components or group.modules in components]
        return [(group, bits) for group in groups for bits in self.sums.costs[group]]

    @contextmanager
    def at_block(self, block: Block, streams: Streams) -> Iterator[Streams]:
        """Begin the streams of the variants that have this block quantized, beside the original's."""
        pattern = "self_attn.*" if block.sublayer == "attention" else "gating.*"
        begun: Streams = {
            (group, bits): streams[None].copy()
            for group, bits in self.variants(block.component)
            if (group.layer, group.modules) == (block.layer, pattern)  # depformer groups have no layer
        }
        for variant, x in begun.items():
            advance(self.altered(variant), block, x)
            self.count_block(block.component)
            self.bar.update(self.work.quantized[variant[0]] if variant else 0)
        yield begun
        self.kept.clear()


def run_pass(run: Pass) -> None:
    """Add up the divergences of all variants of a pass, and count the rows that they are of."""
    _audio(run, _temporal(run))


def _temporal(run: Pass) -> Streams:
    """Take all streams through the temporal transformer; add the text's divergences; return the normalized outputs."""
    arch, token_set = run.source.architecture, run.token_set
    if None in run.known and not reads_temporal(list(run.members)):
        streams: Streams = {None: run.known[None].copy()}
    else:
        streams = {
            variant: run.altered(variant).embed(token_set.tokens) for variant in (None, *run.variants(*READ_FIRST))
        }
        walk(
            arch,
            "temporal",
            streams,
            lambda _, block, x: advance(run.model, block, x),
            run.at_block,
            partial(run.count_block, "temporal"),
        )
        for variant, x in streams.items():
            streams[variant] = run.model.out_norm(x)
        run.known[None] = streams[None].copy()
    counted = token_set.counted[:, 0]
    base = streams[None][counted]
    run.counts["text"] += len(base)
    expected = _expected(run.model.text_logits(base))
    for variant, x in streams.items():
        if variant:
            _add(run, variant, "text", [_divergence(run.model.text_logits(x[counted]), expected)])
            run.bar.update(run.work.text + (run.work.quantized[variant[0]] if variant[0].modules in READ_FIRST else 0))
    for variant in run.variants("text_linear"):
        _add(run, variant, "text", [_divergence(run.altered(variant).text_logits(base), expected)])
        run.bar.update(run.work.text + run.work.quantized[variant[0]])
    run.kept.clear()
    return streams


def _add(run: Pass, variant: Variant, stream: str, divergences: Sequence[float]) -> None:
    """Add a variant's divergences, each summed over rows; raises UserError for those that are not finite."""
    (group, bits), total = variant, math.fsum(divergences) / len(divergences)
    if not math.isfinite(total):
        raise UserError(
            f"{group} at {bits} bit: the {stream}'s predictions are not finite: its values overflow when it is "
            "quantized: give a recipe that keeps it float"
        )
    run.sums.costs[group][bits][stream] += total


def _expected(logits: Floats) -> Tensor:
    """Return log-probabilities of the original; raises UserError if they are not finite."""
    log_probabilities = _log_probabilities(logits)
    if not bool(torch.isfinite(log_probabilities).all()):
        raise UserError("the source's own predictions are not finite in float32: its weights are damaged")
    return log_probabilities


def _log_probabilities(logits: Floats) -> Tensor:
    return log_softmax(torch.from_numpy(logits), -1)


def _divergence(logits: Floats, expected: Tensor) -> float:
    """Return the Kullback-Leibler divergence of rows of logits from the expected predictions, summed over the rows."""
    return float(kl_divergence(_log_probabilities(logits), expected).double().sum())


def _audio(run: Pass, hidden: Streams) -> None:
    """Take streams through the agent's depformer steps, some variants at a time; add up the codebooks' divergences."""
    arch = run.source.architecture
    half = arch.n_q // 2
    known, rows, targets = depformer_rows(run.source, run.token_set)
    run.counts["agent"] += len(rows)
    states = {variant: x[known][rows] for variant, x in hidden.items()}
    hidden.clear()
    own = run.variants("depformer", "linears", "depformer_emb", "depformer_text_emb")
    variants = [variant for variant in [*states, *own] if variant]
    if not len(rows):  # no token of the agent is known in these sequences: nothing of the depformer is computed
        run.bar.update(sum(run.work.quantized[group] for group, _ in own))
        return
    expected = [_expected(logits) for logits in _steps(run, [None], states, targets)[None]]
    some = max(1, run.nbytes // (2 * len(targets) * half * (arch.depformer_dim + arch.card) * 4))
    for first in range(0, len(variants), some):
        for variant, logits in _steps(run, variants[first : first + some], states, targets).items():
            if variant:
                _add(run, variant, "agent", [_divergence(*pair) for pair in zip(logits, expected, strict=True)])
                run.bar.update(run.work.audio + (run.work.quantized[variant[0]] if variant in own else 0))


def depformer_rows(source: Source, token_set: TokenSet) -> tuple[NDArray[np.bool_], NDArray[np.int64], Tokens]:
    """Return which frames have all tokens of the agent, which of those are computed, and their tokens."""
    a = source.architecture
    known: NDArray[np.bool_] = np.logical_and.reduce(token_set.counted[:, 1 : a.n_q // 2 + 1], axis=1)
    targets = token_set.targets.transpose(0, 2, 1)[known]
    most = len(token_set.tokens) * _ROWS if a.depformer_dim >= 512 else MOST_FRAMES
    rows = evenly_spaced(len(targets), most)
    return known, rows, targets[rows]


def _steps(
    run: Pass, variants: Sequence[Variant | None], states: Mapping[Variant | None, Floats], targets: Tokens
) -> dict[Variant | None, list[Floats]]:
    """Return the logits of each of the agent's codebooks, by variant; those not in ``states`` have the original's."""
    arch = run.source.architecture
    half = arch.n_q // 2
    inner = {variant: None if variant in states else variant for variant in variants}
    streams = {
        variant: step_inputs(run.altered(inner[variant]), states.get(variant, states[None]), targets, half)
        for variant in variants
    }
    run.kept.clear()
    walk(
        arch,
        "depformer",
        streams,
        lambda variant, block, x: advance(run.altered(inner[variant]), block, x),
        run.at_block,
        partial(run.count_block, "depformer"),
    )
    return {
        variant: [run.altered(inner[variant]).audio_logits(step, x[:, step]) for step in range(half)]
        for variant, x in streams.items()
    }
