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
from ..model.walk import advance, run_block, step_inputs, walk
from ..model.weights import kept_by
from . import weights
from .control import control_of
from .figures import BUNDLE, CONTROL, NOISE, ActivationRow, HiddenFigures, StreamFigures, WeightRow
from .metrics import Predictions, cosine, cosines, difference, mean_of_streams

REFERENCE = "reference"
_LOGITS = 1 << 24  # logits in memory at a time, of each model


@dataclass
class Measured:
    """Rows and figures of a comparison, as a report has them."""

    weights: list[WeightRow] = field(default_factory=list)
    activations: list[ActivationRow] = field(default_factory=list)
    predictions: dict[str, StreamFigures] = field(default_factory=dict)
    hidden: HiddenFigures | None = None


@dataclass(frozen=True)
class Comparison:
    """The models, by name, and the tokens that all of them read. None holds more than one block's weights.

    ``reference``: float32. ``noise``: the checkpoint's own weights, computed in the bundle's 16-bit dtype. ``bundle``:
    MLX on what the bundle stores. Every other one is a control: its name says at how many bits it rounds. held: weights
    of the checkpoint that several of them read, until they are released.
    """

    source: Source
    stored: Bundle
    reference: TorchModel
    bundle: MlxModel
    others: dict[str, TorchModel]
    token_set: TokenSet
    measured: Measured
    pool: ThreadPoolExecutor
    bar: "tqdm[Any]"
    held: dict[tuple[str, int], torch.Tensor]

    @property
    def models(self) -> dict[str, Model]:
        """All of them, by name."""
        return {REFERENCE: self.reference, BUNDLE: self.bundle, **self.others}

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
        """Take the models' streams through a component's blocks."""
        return walk(
            self.source.architecture,
            component,
            streams,
            lambda name, block, x: advance(self.models[name], block, x),
            self._at_block,
        )

    @contextmanager
    def _at_block(self, block: Block, streams: dict[str, Floats]) -> Iterator[dict[str, Floats]]:
        """Compare a block's weights, and what it computes: from the reference's stream, and from each model's own."""
        names = [name for name in self.stored.layout.outputs if _belongs(name, block)]
        kept = {name: self.look_at(name, keep=True) for name in names}

        def read(name: str, step: int | None) -> torch.Tensor:
            return torch.from_numpy(kept[name][(step or 0) if len(kept[name]) > 1 else 0])

        local = replace(self.reference, weights=read, context=self.bundle.context, steps_seen=self.bundle.steps_seen)
        start = streams[REFERENCE]
        added, after = run_block(self.reference, block, start)
        once = run_block(local, block, start)[0]
        kept.clear()
        yield {REFERENCE: after}
        self.held.clear()
        self.measured.activations += _rows(block, added, once, streams)


def _belongs(name: str, block: Block) -> bool:
    """Tell whether a tensor of the checkpoint is read by a block."""
    parts = ("norm1", "self_attn") if block.sublayer == "attention" else ("norm2", "gating")
    return any(name.startswith(f"{block.prefix}.{part}.") for part in parts)


def _rows(block: Block, added: Floats, once: Floats, after: dict[str, Floats]) -> list[ActivationRow]:
    """Return a block's row, or one for each depformer step.

    added, once: what the block computes from the reference's input, with the checkpoint's and the bundle's weights.
    """
    steps = range(added.shape[1]) if block.component == "depformer" else (None,)
    rows = []
    for step in steps:
        part = slice(None) if step is None else (slice(None), step)
        drift = {name: difference(after[name][part], after[REFERENCE][part]) for name in (BUNDLE, NOISE)}
        rows.append(
            ActivationRow(
                component=block.component,
                layer=block.layer,
                sublayer=block.sublayer,
                step=step,
                local=difference(once[part], added[part]),
                accumulated=drift[BUNDLE],
                noise_accumulated=drift[NOISE],
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
    controls: Sequence[int] = (),
) -> Measured:
    """Run a bundle, its checkpoint and the control on a token set; return all that was measured.

    voices: the bundle's own. arithmetic: dtype of the bundle's activations. device: where PyTorch runs. matmul: how
    MLX multiplies by packed weights. controls: bits of more controls. The bar advances by the checkpoint's bytes.
    Raises UserError for truncated files.
    """
    held: dict[tuple[str, int], torch.Tensor] = {}
    reference = reference_of(source.checkpoint, device=device)
    reference = replace(reference, weights=kept_by(held, reference.weights, device))
    noise = replace(reference, dtype=getattr(torch, stored.manifest.dtype))
    bundle = model_of(stored, arithmetic, matmul)
    with ThreadPoolExecutor(cores(), thread_name_prefix="ppx") as pool, torch.inference_mode():
        others = {NOISE: noise, CONTROL: control_of(reference, stored, pool)}
        others |= {str(bits): control_of(reference, stored, pool, bits) for bits in controls}
        comparison = Comparison(source, stored, reference, bundle, others, token_set, Measured(), pool, bar, held)
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
    original, stored = (token_set.vectors(some, arch.dim) for some in (comparison.source.voices, voices))
    streams = {
        name: model.embed(token_set.tokens, stored if name == BUNDLE else original)
        for name, model in comparison.models.items()
    }
    comparison.measured.activations += _edge("embeddings", streams)
    streams = comparison.walk("temporal", streams)
    comparison.look_at("out_norm.alpha")
    streams = {name: model.out_norm(streams[name]) for name, model in comparison.models.items()}
    comparison.measured.activations += _edge("out_norm", streams)
    read = token_set.counted[:, 0]
    expected = streams[REFERENCE][read]
    of = {name: cosine(cosines(x[read], expected)) for name, x in streams.items() if name != REFERENCE}
    comparison.measured.hidden = HiddenFigures.of(of)
    return streams


def _edge(name: str, streams: dict[str, Floats], step: int | None = None) -> list[ActivationRow]:
    """Return the row of what stands between blocks, which has an accumulated error only."""
    drift = {key: difference(streams[key], streams[REFERENCE]) for key in (BUNDLE, NOISE)}
    component = "depformer" if name == "input" else "temporal"
    return [ActivationRow(component, None, name, step, None, drift[BUNDLE], drift[NOISE])]


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
    comparison.held.clear()


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
    comparison.held.clear()
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
        if streams_of:  # a model may lack the user's steps
            measured.predictions[name] = mean_of_streams(streams_of)


def _head(model: Model, step: int) -> Callable[[Floats], Floats]:
    return lambda x: model.audio_logits(step, x)


def _predict(
    heads: dict[str, Callable[[Floats], Floats]],
    states: dict[str, Floats],
    targets: Tokens | None,
    sequences: NDArray[np.int64],
    card: int,
) -> StreamFigures:
    """Return the figures of one stream's predictions, for each model but the reference."""
    compared = {name: Predictions() for name in heads if name != REFERENCE}
    height = max(1, _LOGITS // card)
    for first in range(0, len(states[REFERENCE]), height):
        rows = slice(first, first + height)
        reference = heads[REFERENCE](states[REFERENCE][rows])
        for name, predictions in compared.items():
            tokens = None if targets is None else targets[rows]
            predictions.add(heads[name](states[name][rows]), reference, tokens, sequences[rows])
    summaries = {name: predictions.summary() for name, predictions in compared.items()}
    return StreamFigures.of(summaries)
