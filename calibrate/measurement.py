"""Measuring sensitivities: the original and its variants, each with one part quantized, through the same material.

The original goes through some sequences, one block in memory. At each block a stream begins for every number of bits
that the block could have, and is computed beside the original's; what the predictions at the end diverge by is the
part's. All streams are held at a time: sequences that do not fit into memory together are read in several passes.
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
from .weight_only import quantized

_READ_FIRST = ("text_emb", "emb")  # tables that the temporal transformer reads
_SHARE = 0.25  # of the machine's memory, for all streams at a time
_FRAMES = 4096  # measured on at most
_ROWS = 128  # frames of a sequence that go through a wide depformer, and rows of a matrix of which errors are taken
_STORAGE = np.dtype(np.float32)  # of scales and biases: what other dtypes round is the same for all parts
Variant = tuple[TensorGroup, int]  # a part, and the bits that it is quantized to
Streams = dict[Variant | None, Floats]  # by variant; None for the original


def _altered(
    model: TorchModel, members: Sequence[tuple[str, int | None]], quantization: QuantizationConfig
) -> TorchModel:
    """Return the model with one part quantized, as it is read."""
    mine = set(members)

    def rounded(name: str, values: Tensor) -> Tensor:
        flat = np.ascontiguousarray(values.float().cpu().numpy().reshape(-1, values.shape[-1]))
        return torch.from_numpy(dequantize(quantized(name, flat, quantization, _STORAGE), quantization)).reshape(
            values.shape
        )

    def weights(name: str, step: int | None) -> Tensor:
        held = model.weights(name, step)
        return rounded(name, held).to(held.device) if (name, step) in mine else held

    def rows(name: str, tokens: Tokens) -> Tensor:
        held = model.rows(name, tokens)
        return rounded(name, held) if (name, None) in mine else held

    return replace(model, weights=kept_by({}, weights, model.device), rows=rows)


def measure(
    source: Source,
    token_set: TokenSet,
    mark: str,
    quiet: bool = False,
    *,
    bits: Sequence[int] = BITS,
    sequences: int = 4,
    memory: int | None = None,
) -> Sensitivities:
    """Measure every part at every number of ``bits``, on as much of the material as fits (in float32, by ``lsq``).

    sequences: to measure on at least, in as many passes as they take. memory: bytes for what is computed at a time,
    None for a share of the machine's. PyTorch computes on a GPU where there is one. Parts of depformer steps that
    predict the user's codebooks are not among them: what the agent says does not depend on those. Raises UserError,
    which names the part, for predictions that are not finite, and for sequences that tell nothing of text or agent.
    """
    members = members_of(source.architecture)
    nbytes = int(_SHARE * devices.host_memory()) if memory is None else memory
    streams = 1 + len(bits) * sum(part.component != "depformer" for part in members)
    passes = _passes(token_set, sequences, nbytes // (streams * source.architecture.dim * 4))
    available, frames = len(token_set.tokens), token_set.tokens.shape[2]
    used = replace(token_set.description, sequences=sum(map(len, passes)), frames=frames, available=available)
    found = Sensitivities(used, mark)
    for part in members:
        found.costs[part] = {one: dict.fromkeys(STREAMS, 0.0) for one in bits}
    counts = dict.fromkeys(STREAMS, 0)
    total = len(passes) * _blocks(source.architecture, members, len(bits))
    with bar("measuring", total, "block", quiet) as progress, torch.inference_mode():
        for chosen in passes:
            kept: dict[tuple[str, int], Tensor] = {}
            model = reference_of(source.checkpoint, device=devices.device())
            model = replace(model, weights=kept_by(kept, model.weights, model.device), rows=_remembered(model.rows))
            run = Pass(source, members, model, kept, token_set.chosen(chosen), nbytes, found, counts, progress)
            _audio(run, _temporal(run))
    if silent := [stream for stream, count in counts.items() if not count]:
        raise UserError(
            f"the {used.sequences} sequences that were measured on hold no tokens of {' and '.join(silent)}: "
            "give tokens in which both are known throughout"
        )
    for part, of_part in members.items():
        for cost in found.costs[part].values():
            cost.update({stream: max(0.0, value / counts[stream]) for stream, value in cost.items()})
        found.errors[part] = _errors(source, of_part)
    return found


def _blocks(architecture: Architecture, members: Iterable[TensorGroup], variants: int) -> int:
    """Return how many blocks are computed in a pass, for the original and for so many variants of each part."""
    temporal, depformer = (len(blocks_of(architecture, component)) for component in ("temporal", "depformer"))
    count = 0
    for part in members:
        if part.component == "temporal" and part.layer is not None:
            count += temporal - part.layer * len(SUBLAYERS) - (part.modules == "gating.*")  # from its own block on
        count += temporal if part.modules in _READ_FIRST else 0
        count += depformer if part.modules != "text_linear" else 0
    return temporal + depformer + variants * count


def _remembered(rows: Rows) -> Rows:
    """Return a way to read rows of tables that reads those of the same tokens once."""
    found: dict[tuple[str, bytes], Tensor] = {}

    def read(name: str, tokens: Tokens) -> Tensor:
        key = (name, tokens.tobytes())
        if key not in found:
            found[key] = rows(name, tokens)
        return found[key]

    return read


def _passes(token_set: TokenSet, least: int, frames: int) -> list[NDArray[np.int64]]:
    """Return the sequences that are read, evenly spread, by pass; frames: of which all streams fit into memory."""
    count, length = len(token_set.tokens), token_set.tokens.shape[2]
    at_once = max(1, frames // length)
    chosen = evenly_spaced(count, max(1, min(max(at_once, least), _FRAMES // length)))
    return np.array_split(chosen, -(-len(chosen) // at_once))


@dataclass(frozen=True)
class Pass:
    """One pass of a measurement. kept: matrices of the block that is looked at. nbytes: of streams at a time.

    found: its costs are sums over rows. counts: of how many rows, by stream.
    """

    source: Source
    members: dict[TensorGroup, list[tuple[str, int | None]]]
    model: TorchModel
    kept: dict[tuple[str, int], Tensor]
    token_set: TokenSet
    nbytes: int
    found: Sensitivities
    counts: dict[str, int]
    bar: "tqdm[Any]"

    def altered(self, variant: Variant | None) -> TorchModel:
        """Return the model with a variant's part quantized."""
        if variant is None:
            return self.model
        part, bits = variant
        columns = [self.source.checkpoint.tensors[name].role.shape[-1] for name, _ in self.members[part]]
        return _altered(
            self.model, self.members[part], QuantizationConfig(bits, usual_group(settings_of(columns)), "lsq")
        )

    def variants(self, *components: str) -> list[Variant]:
        """Return all variants of parts of these components, or modules outside of layers."""
        parts = [part for part in self.members if part.component in components or part.modules in components]
        return [(part, bits) for part in parts for bits in self.found.costs[part]]

    @contextmanager
    def at_block(self, block: Block, streams: Streams) -> Iterator[Streams]:
        """Begin the streams of the variants that have this block quantized, beside the original's."""
        pattern = "self_attn.*" if block.sublayer == "attention" else "gating.*"
        variants = self.variants(block.component)
        begun: Streams = {
            (part, bits): streams[None].copy()
            for part, bits in variants
            if (part.layer, part.modules) == (block.layer, pattern)  # depformer parts have no layer
        }
        for variant, x in begun.items():
            advance(self.altered(variant), block, x)
            self.bar.update(1)
        yield begun
        self.kept.clear()


def _temporal(run: Pass) -> Streams:
    """Go through the temporal transformer; note what the text costs; return outputs of the frames that are heard."""
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
            _note(run, variant, "text", [_divergence(run.model.text_logits(x[counted]), expected)])
    for variant in run.variants("text_linear"):
        _note(run, variant, "text", [_divergence(run.altered(variant).text_logits(base), expected)])
    run.kept.clear()
    return streams


def _note(run: Pass, variant: Variant, stream: str, divergences: Sequence[float]) -> None:
    """Add a variant's divergences, each summed over rows; raises UserError for those that are not finite."""
    (part, bits), total = variant, math.fsum(divergences) / len(divergences)
    if not math.isfinite(total):
        raise UserError(
            f"{part} at {bits} bit: the {stream}'s predictions are not finite: its values overflow when it is "
            "quantized: give a recipe that keeps it float"
        )
    run.found.costs[part][bits][stream] += total


def _expected(logits: Floats) -> Tensor:
    """Return log-probabilities of the original; raises UserError if they are not finite."""
    found = _log_probabilities(logits)
    if not bool(torch.isfinite(found).all()):
        raise UserError("the source's own predictions are not finite in float32: its weights are damaged")
    return found


def _log_probabilities(logits: Floats) -> Tensor:
    return log_softmax(torch.from_numpy(logits), -1)


def _divergence(logits: Floats, expected: Tensor) -> float:
    """Return the Kullback-Leibler divergence of rows of logits from the expected predictions, summed over the rows."""
    return float(kl_divergence(_log_probabilities(logits), expected).double().sum())


def _audio(run: Pass, hidden: Streams) -> None:
    """Go through the agent's steps of the depformer, some variants at a time; note what its codebooks cost."""
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
    if not len(targets):  # in these sequences the agent's tokens are not known
        run.bar.update((1 + len(variants)) * len(blocks_of(arch, "depformer")))
        return
    expected = [_expected(logits) for logits in _steps(run, [None], states, targets)[None]]
    some = max(1, run.nbytes // (2 * len(targets) * half * (arch.depformer_dim + arch.card) * 4))
    for first in range(0, len(variants), some):
        for variant, logits in _steps(run, variants[first : first + some], states, targets).items():
            if variant:
                apart = [_divergence(*pair) for pair in zip(logits, expected, strict=True)]
                _note(run, variant, "agent", apart)


def _steps(
    run: Pass, variants: Sequence[Variant | None], states: Mapping[Variant | None, Floats], targets: Tokens
) -> dict[Variant | None, list[Floats]]:
    """Return the logits of each agent's codebook, by variant; those not in ``states`` begin from the original's."""
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
    """Return the relative squared error of some rows of a part, by bits and group size."""
    read = source_weights(source.checkpoint)
    weights = [read(name, step) for name, step in members]
    some = [np.ascontiguousarray(weight[evenly_spaced(len(weight), _ROWS)].float().numpy()) for weight in weights]
    found = settings_of(weight.shape[1] for weight in some)
    for bits, size in found:
        quantization = QuantizationConfig(bits, size, "lsq")
        made = [
            quantized(name, weight, quantization, _STORAGE) for (name, _), weight in zip(members, some, strict=True)
        ]
        norm = sum(one.squared_norm for one in made)
        found[bits, size] = sum(one.squared_error for one in made) / norm if norm else 0.0
    return found
