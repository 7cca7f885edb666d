"""Measuring sensitivities: the original and its variants, each with one group of tensors quantized, on the same tokens.

The original goes through some sequences, with one block in memory. At each block a stream begins for every number of
bits that the block could have, and is computed beside the original's. How far its predictions diverge at the end is the
sensitivity of the group. All streams are in memory: sequences that do not fit together are read in several passes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

from ..convert.errors import UserError
from ..convert.progress import bar
from ..convert.source.architecture import Architecture
from ..convert.source.checkpoint import Checkpoint
from ..convert.source.source import Source
from ..model import torch_device as devices
from ..model.blocks import SUBLAYERS, Block, blocks_of
from ..model.divergence import kl_divergence
from ..model.forward import Floats, Tokens
from ..model.reference import Rows, TorchModel, kept_by, reference_of, source_weights
from ..model.tokens import TokenSet, evenly_spaced
from ..model.walk import advance, step_inputs, walk
from ..quant.affine import BITS, QuantizationConfig, dequantize
from .sensitivity import STREAMS, Sensitivities, TensorGroup, members_of, settings_of, usual_group
from .weight_only import dequantized, quantized

_READ_FIRST = ("text_emb", "emb")  # tables that the temporal transformer reads
_SHARE = 0.25  # of the machine's memory, for all streams
_FRAMES = 4096  # measured on at most
_ROWS = 128  # frames of a sequence that go through a wide depformer, and rows of a matrix of which errors are taken
_STORAGE = np.dtype(np.float32)  # of scales and biases: rounding to another dtype costs all groups the same
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
        return dequantized(name, values, quantization, _STORAGE, checkpoint.importance(name)).to(values.device)

    def rows(name: str, tokens: Tokens) -> Tensor:
        values = model.rows(name, tokens)
        return dequantized(name, values, quantization, _STORAGE) if (name, None) in members else values

    return replace(model, weights=kept_by({}, weights, model.device), rows=rows)


def measure(
    source: Source,
    token_set: TokenSet,
    fingerprint: str,
    quiet: bool = False,
    *,
    bits: Sequence[int] = BITS,
    sequences: int = 4,
    memory: int | None = None,
) -> Sensitivities:
    """Measure every group of tensors at every number of ``bits``, in float32, quantized by ``lsq``.

    sequences: to measure on at least, in as many passes as they take; more are read where they fit into one. memory:
    bytes for all streams, None for a share of the machine's. PyTorch computes on a GPU where there is one. Groups of
    depformer steps that predict the user's codebooks are left out: the agent's predictions do not depend on them.
    Raises UserError, which names the group, for predictions that are not finite, and for sequences without known tokens
    of the text or the agent.
    """
    members = members_of(source.architecture)
    nbytes = int(_SHARE * devices.host_memory()) if memory is None else memory
    streams = 1 + len(bits) * sum(group.component != "depformer" for group in members)
    passes = _passes(token_set, sequences, nbytes // (streams * source.architecture.dim * 4))
    available, frames = len(token_set.tokens), token_set.tokens.shape[2]
    used = replace(token_set.description, sequences=sum(map(len, passes)), frames=frames, available=available)
    sensitivities = Sensitivities(used, fingerprint)
    for group in members:
        sensitivities.costs[group] = {one: dict.fromkeys(STREAMS, 0.0) for one in bits}
    counts = dict.fromkeys(STREAMS, 0)
    total = len(passes) * _blocks(source.architecture, members, len(bits))
    with bar("measuring sensitivities", total, "block", quiet) as progress, torch.inference_mode():
        for chosen in passes:
            kept: dict[tuple[str, int], Tensor] = {}
            model = reference_of(source.checkpoint, device=devices.device())
            model = replace(model, weights=kept_by(kept, model.weights, model.device), rows=_cached(model.rows))
            run = Pass(source, members, model, kept, token_set.chosen(chosen), nbytes, sensitivities, counts, progress)
            _audio(run, _temporal(run))
    if silent := [stream for stream, count in counts.items() if not count]:
        raise UserError(
            f"the {used.sequences} sequences that were measured on have no known tokens of {' and '.join(silent)}: "
            "give tokens in which both are known"
        )
    for group, tensors in members.items():
        for cost in sensitivities.costs[group].values():
            cost.update({stream: max(0.0, value / counts[stream]) for stream, value in cost.items()})
        sensitivities.errors[group] = _errors(source, tensors)
    return sensitivities


def _blocks(architecture: Architecture, members: Iterable[TensorGroup], variants: int) -> int:
    """Return how many blocks are computed in a pass, for the original and so many variants of each group."""
    temporal, depformer = (len(blocks_of(architecture, component)) for component in ("temporal", "depformer"))
    count = 0
    for group in members:
        if group.component == "temporal" and group.layer is not None:
            count += temporal - group.layer * len(SUBLAYERS) - (group.modules == "gating.*")  # from its own block on
        count += temporal if group.modules in _READ_FIRST else 0
        count += depformer if group.modules != "text_linear" else 0
    return temporal + depformer + variants * count


def _cached(rows: Rows) -> Rows:
    """Return a way to read rows of embedding tables that reads those of the same tokens once."""
    cache: dict[tuple[str, bytes], Tensor] = {}

    def read(name: str, tokens: Tokens) -> Tensor:
        key = (name, tokens.tobytes())
        if key not in cache:
            cache[key] = rows(name, tokens)
        return cache[key]

    return read


def _passes(token_set: TokenSet, least: int, frames: int) -> list[NDArray[np.int64]]:
    """Return the sequences that are read, evenly spread, by pass; frames: of which all streams fit into memory."""
    count, length = len(token_set.tokens), token_set.tokens.shape[2]
    at_once = max(1, frames // length)
    chosen = evenly_spaced(count, max(1, min(max(at_once, least), _FRAMES // length)))
    return np.array_split(chosen, -(-len(chosen) // at_once))


@dataclass(frozen=True)
class Pass:
    """One pass of a measurement, over some of the sequences.

    members: the tensors of each group. kept: weights of the present block. nbytes: memory for streams. sums: costs,
    summed over rows; counts: the number of rows, by stream of predictions (text, agent).
    """

    source: Source
    members: dict[TensorGroup, list[tuple[str, int | None]]]
    model: TorchModel
    kept: dict[tuple[str, int], Tensor]
    token_set: TokenSet
    nbytes: int
    sums: Sensitivities
    counts: dict[str, int]
    bar: "tqdm[Any]"

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
            self.bar.update(1)
        yield begun
        self.kept.clear()


def _temporal(run: Pass) -> Streams:
    """Take all streams through the temporal transformer; add the text's divergences; return the normalized outputs."""
    arch, token_set = run.source.architecture, run.token_set
    streams: Streams = {
        variant: run.altered(variant).embed(token_set.tokens) for variant in (None, *run.variants(*_READ_FIRST))
    }
    walk(arch, "temporal", streams, lambda _: run.model, run.at_block, run.bar.update)
    for variant, x in streams.items():
        streams[variant] = run.model.out_norm(x)
    counted = token_set.counted[:, 0]
    base = streams[None][counted]
    run.counts["text"] += len(base)
    expected = _expected(run.model.text_logits(base))
    for variant, x in streams.items():
        if variant:
            _add(run, variant, "text", [_divergence(run.model.text_logits(x[counted]), expected)])
    for variant in run.variants("text_linear"):
        _add(run, variant, "text", [_divergence(run.altered(variant).text_logits(base), expected)])
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
    arch, token_set = run.source.architecture, run.token_set
    half = arch.n_q // 2
    known = token_set.counted[:, 1 : half + 1].all(1)
    targets = token_set.targets.transpose(0, 2, 1)[known]
    rows = evenly_spaced(len(targets), len(token_set.tokens) * _ROWS if arch.depformer_dim >= 512 else _FRAMES)
    targets = targets[rows]
    run.counts["agent"] += len(targets)
    states = {variant: x[known][rows] for variant, x in hidden.items()}
    hidden.clear()
    own = run.variants("depformer", "linears", "depformer_emb", "depformer_text_emb")
    variants = [variant for variant in [*states, *own] if variant]
    if not len(targets):  # no token of the agent is known in these sequences
        run.bar.update((1 + len(variants)) * len(blocks_of(arch, "depformer")))
        return
    expected = [_expected(logits) for logits in _steps(run, [None], states, targets)[None]]
    some = max(1, run.nbytes // (2 * len(targets) * half * (arch.depformer_dim + arch.card) * 4))
    for first in range(0, len(variants), some):
        for variant, logits in _steps(run, variants[first : first + some], states, targets).items():
            if variant:
                _add(run, variant, "agent", [_divergence(*pair) for pair in zip(logits, expected, strict=True)])


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
    walk(arch, "depformer", streams, lambda variant: run.altered(inner[variant]), run.at_block, run.bar.update)
    return {
        variant: [run.altered(inner[variant]).audio_logits(step, x[:, step]) for step in range(half)]
        for variant, x in streams.items()
    }


def _errors(source: Source, members: Sequence[tuple[str, int | None]]) -> dict[tuple[int, int], float]:
    """Return the relative squared error of some rows of a group's tensors, by bits and group size.

    Errors and norms are weighted where the quantizer weighs them.
    """
    read = source_weights(source.checkpoint)
    weights = [read(name, step) for name, step in members]
    some = [np.ascontiguousarray(weight[evenly_spaced(len(weight), _ROWS)].float().numpy()) for weight in weights]
    importances = [source.checkpoint.importance(name) for name, _ in members]
    norms = [_weighted_sum(*pair) for pair in zip(some, importances, strict=True)]
    errors = settings_of(weight.shape[1] for weight in some)
    for bits, size in errors:
        quantization, total = QuantizationConfig(bits, size, "lsq"), 0.0
        for (name, _), weight, importance in zip(members, some, importances, strict=True):
            restored = dequantize(quantized(name, weight, quantization, _STORAGE, importance), quantization)
            total += _weighted_sum(weight - restored, importance)
        errors[bits, size] = total / sum(norms) if sum(norms) else 0.0
    return errors


def _weighted_sum(values: NDArray[np.float32], importance: NDArray[np.float64] | None) -> float:
    """Return the sum of squares, each times the importance of its column if there is one."""
    squares = np.square(values, dtype=np.float64).sum(0)
    return float(squares.sum() if importance is None else squares @ importance)
