"""A checkpoint and its bundle, side by side through their layers: weights, activations and predictions."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.reader import Bundle
from ..convert.parallel import cores
from ..convert.source.source import Source
from ..convert.source.voices import Voice
from ..model.blocks import Block
from ..model.forward import Floats, Model, Tokens
from ..model.matmul import QuantizedMatmul
from ..model.mlx_model import MlxModel, model_of
from ..model.reference import TorchModel, reference_of
from ..model.tokens import TokenSet
from ..model.walk import run_block, step_inputs, walk
from . import weights
from .figures import ActivationRow, StreamFigures, WeightRow
from .metrics import Predictions, difference, mean_of

_LOGITS = 1 << 24  # logits in memory at a time, of each model


@dataclass
class Measured:
    """Rows and figures of a comparison, as a report has them."""

    weights: list[WeightRow] = field(default_factory=list)
    activations: list[ActivationRow] = field(default_factory=list)
    predictions: dict[str, StreamFigures] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Three models, and the tokens that all of them read.

    reference: float32. noise: the checkpoint's own weights, computed in the bundle's 16-bit dtype. bundle: MLX on what
    the bundle stores. None of them holds more than one block's weights.
    """

    source: Source
    stored: Bundle
    reference: TorchModel
    noise: TorchModel
    bundle: MlxModel
    token_set: TokenSet
    measured: Measured
    pool: ThreadPoolExecutor
    bar: "tqdm[Any]"

    @property
    def models(self) -> dict[str, Model]:
        """All three, by name."""
        return {"reference": self.reference, "noise": self.noise, "bundle": self.bundle}

    def look_at(self, name: str, keep: bool = False) -> list[Floats]:
        """Compare all that a source tensor became with it; keep its float32 values if asked to.

        Returns a matrix for each depformer step where it has them, else one, or nothing.
        """
        kept: list[Floats] = []
        for output in self.stored.layout.outputs[name]:
            shape = (output.rows[1] - output.rows[0], output.shape[-1])
            values = np.empty(shape, np.float32) if keep else None
            self.measured.weights += weights.compare(self.stored, self.source.checkpoint, output, self.pool, values)
            self.bar.update(self._share(output))
            kept += [] if values is None else np.split(values, output.parts)
        return kept

    def _share(self, output: Output) -> int:
        """Return the checkpoint's bytes that an output stands for."""
        return 2 * (output.rows[1] - output.rows[0]) * output.shape[-1]

    def walk(self, component: str, streams: dict[str, Floats]) -> dict[str, Floats]:
        """Take the three streams through a component's blocks."""
        return walk(self.source.architecture, component, streams, self.models.__getitem__, self._at_block)

    @contextmanager
    def _at_block(self, block: Block, streams: dict[str, Floats]) -> Iterator[dict[str, Floats]]:
        """Compare a block's weights, and what it computes: from the reference's stream, and from each model's own."""
        names = [name for name in self.stored.layout.outputs if _belongs(name, block)]
        kept = {name: self.look_at(name, keep=True) for name in names}

        def read(name: str, step: int | None) -> torch.Tensor:
            return torch.from_numpy(kept[name][(step or 0) if len(kept[name]) > 1 else 0])

        local = replace(self.reference, weights=read, context=self.bundle.context, steps_seen=self.bundle.steps_seen)
        start = streams["reference"]
        added, after = run_block(self.reference, block, start)
        once = {"bundle": run_block(local, block, start)[0], "noise": run_block(self.noise, block, start)[0]}
        kept.clear()
        yield {"reference": after}
        self.measured.activations += _rows(block, added, once, streams)


def _belongs(name: str, block: Block) -> bool:
    """Tell whether a tensor of the checkpoint is read by a block."""
    parts = ("norm1", "self_attn") if block.sublayer == "attention" else ("norm2", "gating")
    return any(name.startswith(f"{block.prefix}.{part}.") for part in parts)


def _rows(block: Block, added: Floats, once: dict[str, Floats], after: dict[str, Floats]) -> list[ActivationRow]:
    """Return a block's row, or one for each depformer step."""
    steps = range(added.shape[1]) if block.component == "depformer" else (None,)
    rows = []
    for step in steps:
        part = slice(None) if step is None else (slice(None), step)
        local = {name: difference(once[name][part], added[part]) for name in ("bundle", "noise")}
        drift = {name: difference(after[name][part], after["reference"][part]) for name in ("bundle", "noise")}
        rows.append(
            ActivationRow(
                component=block.component,
                layer=block.layer,
                sublayer=block.sublayer,
                step=step,
                local=local["bundle"],
                accumulated=drift["bundle"],
                noise_local=local["noise"],
                noise_accumulated=drift["noise"],
            )
        )
    return rows


def compare(
    source: Source,
    stored: Bundle,
    token_set: TokenSet,
    voices: Sequence[Voice],
    bar: "tqdm[Any]",
    arithmetic: str = "float32",
    device: str = "cpu",
    matmul: QuantizedMatmul | None = None,
) -> Measured:
    """Run a bundle and its checkpoint on a token set; return all that was measured.

    voices: the bundle's own. arithmetic: dtype of the bundle's activations. device: where PyTorch runs. matmul: how
    MLX multiplies by packed weights. The bar advances by the checkpoint's bytes. Raises UserError for truncated files.
    """
    noise = reference_of(source.checkpoint, getattr(torch, stored.manifest.dtype), device)
    reference, bundle = reference_of(source.checkpoint, device=device), model_of(stored, arithmetic, matmul)
    with ThreadPoolExecutor(cores(), thread_name_prefix="ppx") as pool, torch.inference_mode():
        comparison = Comparison(source, stored, reference, noise, bundle, token_set, Measured(), pool, bar)
        hidden = _temporal(comparison, voices)
        _text(comparison, hidden)
        _audio(comparison, hidden)
    return comparison.measured


def _temporal(comparison: Comparison, voices: Sequence[Voice]) -> dict[str, Floats]:
    """Go through the temporal transformer; return its normalized output, ``[sequences, frames, dim]`` of each model."""
    arch, token_set = comparison.source.architecture, comparison.token_set
    for name, outputs in comparison.stored.layout.outputs.items():
        if outputs[0].role.component == "embeddings":
            comparison.look_at(name)
    vectors = {name: token_set.vectors(comparison.source.voices, arch.dim) for name in ("reference", "noise")}
    vectors["bundle"] = token_set.vectors(voices, arch.dim)
    streams = {name: model.embed(token_set.tokens, vectors[name]) for name, model in comparison.models.items()}
    comparison.measured.activations += _edge("embeddings", streams)
    streams = comparison.walk("temporal", streams)
    comparison.look_at("out_norm.alpha")
    streams = {name: model.out_norm(streams[name]) for name, model in comparison.models.items()}
    comparison.measured.activations += _edge("out_norm", streams)
    return streams


def _edge(name: str, streams: dict[str, Floats], step: int | None = None) -> list[ActivationRow]:
    """Return the row of what stands between blocks, which has an accumulated error only."""
    drift = {key: difference(streams[key], streams["reference"]) for key in ("bundle", "noise")}
    component = "depformer" if name == "input" else "temporal"
    return [ActivationRow(component, None, name, step, None, drift["bundle"], None, drift["noise"])]


def _text(comparison: Comparison, hidden: dict[str, Floats]) -> None:
    """Compare text predictions."""
    token_set = comparison.token_set
    comparison.look_at("text_linear.weight")
    heads: dict[str, Callable[[Floats], Floats]] = {
        name: model.text_logits for name, model in comparison.models.items()
    }
    chosen = token_set.counted[:, 0]
    states = {name: array[chosen] for name, array in hidden.items()}
    targets = token_set.targets[:, 0][chosen] if token_set.scored else None
    card = comparison.source.architecture.text_card
    comparison.measured.predictions["text"] = _predict(heads, states, targets, np.nonzero(chosen)[0], card)


def _audio(comparison: Comparison, hidden: dict[str, Floats]) -> None:
    """Go through the depformer and compare its predictions, codebook by codebook."""
    arch, token_set = comparison.source.architecture, comparison.token_set
    counted, targets = token_set.counted[:, 1 : arch.steps + 1], token_set.targets
    chosen = counted.any(1)  # frames where some codebook counts
    measured = comparison.measured
    known, sequences = targets.transpose(0, 2, 1)[chosen], np.nonzero(chosen)[0]
    states = {name: array[chosen] for name, array in hidden.items()}
    for step in range(arch.steps):
        comparison.look_at(f"depformer_in.{step}.weight")
    streams = {name: step_inputs(model, states[name], known, arch.steps) for name, model in comparison.models.items()}
    for step in range(arch.steps):
        measured.activations += _edge("input", {name: array[:, step] for name, array in streams.items()}, step)
    streams = comparison.walk("depformer", streams)
    of_steps = counted.transpose(0, 2, 1)[chosen]
    for step in range(arch.steps):
        comparison.look_at(f"linears.{step}.weight")
        rows = of_steps[:, step]
        heads = {name: _head(model, step) for name, model in comparison.models.items()}
        states = {name: np.ascontiguousarray(array[rows, step]) for name, array in streams.items()}
        tokens = known[rows, step + 1] if token_set.scored else None
        measured.predictions[f"codebook_{step}"] = _predict(heads, states, tokens, sequences[rows], arch.card)
    half = arch.n_q // 2
    of = [measured.predictions[f"codebook_{step}"] for step in range(arch.steps)]
    for name, streams_of in (("agent", of[:half]), ("user", of[half:])):
        if not streams_of:  # a model without the user's steps
            continue
        measured.predictions[name] = StreamFigures(
            mean_of([stream.bundle for stream in streams_of]), mean_of([stream.noise for stream in streams_of])
        )


def _head(model: Model, step: int) -> Callable[[Floats], Floats]:
    return lambda x: model.audio_logits(step, x)


def _predict(
    heads: dict[str, Callable[[Floats], Floats]],
    states: dict[str, Floats],
    targets: Tokens | None,
    sequences: NDArray[np.int64],
    card: int,
) -> StreamFigures:
    """Return the figures of one stream's predictions, for the bundle and for the noise floor."""
    compared = {"bundle": Predictions(), "noise": Predictions()}
    height = max(1, _LOGITS // card)
    for first in range(0, len(states["reference"]), height):
        rows = slice(first, first + height)
        reference = heads["reference"](states["reference"][rows])
        for name, predictions in compared.items():
            tokens = None if targets is None else targets[rows]
            predictions.add(heads[name](states[name][rows]), reference, tokens, sequences[rows])
    return StreamFigures(compared["bundle"].summary(), compared["noise"].summary())
