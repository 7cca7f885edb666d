"""Measuring sensitivities: the original and its variants, each with one part quantized, through the same material.

The original goes through the material once, one block in memory. At each block a stream begins for every number of bits
that the block could have, and goes on beside the original's; what the predictions at the end diverge by is the part's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

from ..convert.architecture import Architecture
from ..convert.names import roles
from ..convert.progress import bar
from ..convert.source import Source
from ..quant.affine import BITS, Affine, dequantize, quantize
from . import device as devices
from .material import Material, spread
from .model import Floats, Tokens
from .places import Place, places
from .reference import Rows, TorchModel, kept_by, reference_of, source_weights
from .sensitivity import STREAMS, Part, Sensitivities, part_of, settings_of, usual_group

_STREAMS = 1 << 31  # bytes of all streams at a time
_FRAMES = 4096  # gone through at most
_ROWS = 128  # frames that go through a wide depformer, at most, and rows of a matrix of which errors are taken
Variant = tuple[Part, int]  # a part, and the bits that it is quantized to


def _members(architecture: Architecture) -> dict[Part, list[tuple[str, int | None]]]:
    """Return the tensors, and rows of stacked ones, of each part that the agent's predictions depend on."""
    half, found = architecture.n_q // 2, dict[Part, list[tuple[str, int | None]]]()
    for name, role in roles(architecture).items():
        if role.kind == "norm":
            continue
        stacked = range(role.stacked) if role.stacked > 1 else [None]
        for index in stacked:
            step = role.step if index is None else index
            if step is None or step < half:
                found.setdefault(part_of(role, step), []).append((name, index))
    return found


def _altered(model: TorchModel, members: Sequence[tuple[str, int | None]], form: Affine) -> TorchModel:
    """Return the model with one part quantized, as it is read."""
    mine = set(members)

    def rounded(values: Tensor) -> Tensor:
        flat = np.ascontiguousarray(values.float().cpu().numpy().reshape(-1, values.shape[-1]))
        return torch.from_numpy(dequantize(quantize(flat, form, np.dtype(np.float32)), form)).reshape(values.shape)

    def weights(name: str, step: int | None) -> Tensor:
        held = model.weights(name, step)
        return rounded(held).to(held.device) if (name, step) in mine else held

    def rows(name: str, tokens: Tokens) -> Tensor:
        held = model.rows(name, tokens)
        return rounded(held) if (name, None) in mine else held

    return replace(model, weights=kept_by({}, weights, model.device), rows=rows)


def measure(source: Source, material: Material, mark: str, quiet: bool = False) -> Sensitivities:
    """Measure every part at every number of bits, on as much of the material as fits (in float32, by ``lsq``).

    PyTorch computes on a GPU where there is one. Parts of depformer steps that predict the user's codebooks are not
    among them: what the agent says does not depend on those.
    """
    members = _members(source.architecture)
    device = devices.device()
    kept: dict[tuple[str, int], Tensor] = {}
    model = reference_of(source.checkpoint, device=device)
    model = replace(model, weights=kept_by(kept, model.weights, device), rows=_remembered(model.rows))
    fitting = material.chosen(_fitting(source.architecture, members, material))
    shape = {"sequences": len(fitting.tokens), "frames": fitting.tokens.shape[2]}
    found = Sensitivities(material.description | shape, mark)
    for part in members:
        found.costs[part] = {bits: dict.fromkeys(STREAMS, 0.0) for bits in BITS}
    with bar("measuring", len(members) * len(BITS), "variant", quiet) as progress, torch.inference_mode():
        walk = Walk(source, members, model, kept, fitting, found, progress)
        _audio(walk, _temporal(walk))
        for part, of_part in members.items():
            found.errors[part] = _errors(source, of_part)
    return found


def _remembered(rows: Rows) -> Rows:
    """Return a way to read rows of tables that reads those of the same tokens once."""
    found: dict[tuple[str, bytes], Tensor] = {}

    def read(name: str, tokens: Tokens) -> Tensor:
        key = (name, tokens.tobytes())
        if key not in found:
            found[key] = rows(name, tokens)
        return found[key]

    return read


def _fitting(architecture: Architecture, members: Mapping[Part, Any], material: Material) -> NDArray[np.int64]:
    """Return which sequences are gone through: all streams of them are held at a time."""
    streams = 1 + len(BITS) * sum(part.component != "depformer" for part in members)
    frames = min(_FRAMES, _STREAMS // (streams * architecture.dim * 4))
    return spread(len(material.tokens), max(1, frames // material.tokens.shape[2]))


@dataclass(frozen=True)
class Walk:
    """A measurement under way. kept: matrices of the block that is looked at."""

    source: Source
    members: dict[Part, list[tuple[str, int | None]]]
    model: TorchModel
    kept: dict[tuple[str, int], Tensor]
    material: Material
    found: Sensitivities
    bar: "tqdm[Any]"

    def altered(self, variant: Variant | None) -> TorchModel:
        """Return the model with a variant's part quantized."""
        if variant is None:
            return self.model
        part, bits = variant
        columns = [self.source.checkpoint.tensors[name].role.shape[-1] for name, _ in self.members[part]]
        return _altered(self.model, self.members[part], Affine(bits, usual_group(settings_of(columns)), "lsq"))

    def variants(self, *components: str) -> list[Variant]:
        """Return all variants of parts of these components, or modules outside of layers."""
        parts = [part for part in self.members if part.component in components or part.modules in components]
        return [(part, bits) for part in parts for bits in BITS]


def _temporal(walk: Walk) -> dict[Variant | None, Floats]:
    """Go through the temporal transformer; note what the text costs; return outputs of the frames that are heard."""
    arch, material = walk.source.architecture, walk.material
    streams: dict[Variant | None, Floats] = {
        variant: walk.altered(variant).embed(material.tokens) for variant in (None, *walk.variants("text_emb", "emb"))
    }
    for place in places(arch, "temporal"):
        pattern = "self_attn.*" if place.part == "attention" else "gating.*"
        base = streams[None]
        born: dict[Variant | None, Floats] = {
            (part, bits): _block(walk.altered((part, bits)), place, base)
            for part, bits in walk.variants("temporal")
            if (part.layer, part.modules) == (place.layer, pattern)
        }
        for variant, x in streams.items():
            streams[variant] = _block(walk.model, place, x)
        streams |= born
        walk.kept.clear()
    for variant, x in streams.items():
        streams[variant] = walk.model.out_norm(x)
    counted = material.counted[:, 0]
    base = streams[None][counted]
    expected = _log_probabilities(walk.model.text_logits(base))
    for variant, x in streams.items():
        if variant:
            _note(walk, variant, "text", [_divergence(expected, walk.model.text_logits(x[counted]))])
    for variant in walk.variants("text_linear"):
        _note(walk, variant, "text", [_divergence(expected, walk.altered(variant).text_logits(base))])
        walk.bar.update(1)
    walk.kept.clear()
    return streams


def _note(walk: Walk, variant: Variant, stream: str, divergences: Sequence[float]) -> None:
    walk.found.costs[variant[0]][variant[1]][stream] = max(0.0, math.fsum(divergences) / len(divergences))


def _block(model: TorchModel, place: Place, x: Floats) -> Floats:
    return np.concatenate([model.block(place, x[rows])[1] for rows in place.pieces(x)])


def _log_probabilities(logits: Floats) -> Tensor:
    return log_softmax(torch.from_numpy(logits), -1)


def _divergence(expected: Tensor, logits: Floats) -> float:
    """Return the mean Kullback-Leibler divergence of rows of logits from what was expected."""
    return float((expected.exp() * (expected - _log_probabilities(logits))).sum(-1).double().mean())


def _audio(walk: Walk, hidden: dict[Variant | None, Floats]) -> None:
    """Go through the agent's steps of the depformer, some variants at a time; note what its codebooks cost."""
    arch, material = walk.source.architecture, walk.material
    half = arch.n_q // 2
    known = material.counted[:, 1 : half + 1].all(1)
    targets = material.targets.transpose(0, 2, 1)[known]
    rows = spread(len(targets), _ROWS if arch.depformer_dim >= 512 else _FRAMES)
    targets = targets[rows]
    states = {variant: x[known][rows] for variant, x in hidden.items()}
    hidden.clear()
    own = walk.variants("depformer", "linears", "depformer_emb", "depformer_text_emb")
    variants = [variant for variant in [*states, *own] if variant]
    expected = [_log_probabilities(logits) for logits in _steps(walk, [None], states, targets)[None]]
    some = max(1, _STREAMS // (2 * len(targets) * half * (arch.depformer_dim + arch.card) * 4))
    for first in range(0, len(variants), some):
        for variant, logits in _steps(walk, variants[first : first + some], states, targets).items():
            if variant:
                apart = [_divergence(*pair) for pair in zip(expected, logits, strict=True)]
                _note(walk, variant, "agent", apart)
                walk.bar.update(1)


def _steps(
    walk: Walk, variants: Sequence[Variant | None], states: Mapping[Variant | None, Floats], targets: Tokens
) -> dict[Variant | None, list[Floats]]:
    """Return the logits of each agent's codebook, by variant; those not in ``states`` begin from the original's."""
    arch = walk.source.architecture
    half = arch.n_q // 2
    inner = {variant: None if variant in states else variant for variant in variants}
    streams = {}
    for variant in variants:
        model, state = walk.altered(inner[variant]), states.get(variant, states[None])
        streams[variant] = np.stack([model.step_input(step, state, targets[:, step]) for step in range(half)], 1)
    walk.kept.clear()
    for place in places(arch, "depformer"):
        for variant, x in streams.items():
            streams[variant] = _block(walk.altered(inner[variant]), place, x)
        walk.kept.clear()
    return {
        variant: [walk.altered(inner[variant]).audio_logits(step, x[:, step]) for step in range(half)]
        for variant, x in streams.items()
    }


def _errors(source: Source, members: Sequence[tuple[str, int | None]]) -> dict[tuple[int, int], float]:
    """Return the relative squared error of some rows of a part, by bits and group size."""
    read = source_weights(source.checkpoint)
    weights = [read(name, step) for name, step in members]
    some = [np.ascontiguousarray(weight[spread(len(weight), _ROWS)].float().numpy()) for weight in weights]
    found = settings_of(weight.shape[1] for weight in some)
    for bits, size in found:
        made = [quantize(weight, Affine(bits, size, "lsq"), np.dtype(np.float32)) for weight in some]
        norm = sum(one.squared_norm for one in made)
        found[bits, size] = sum(one.squared_error for one in made) / norm if norm else 0.0
    return found
