"""Fine-tuning codes, scales and biases together, so that the whole model predicts what the original predicts.

Codes are rounded in the forward pass, and their gradient is that of unrounded ones (a straight-through estimator);
scales and biases are rounded to their storage dtype in the same way. The loss is the divergence of the text's and the
agent's predictions on calibration tokens. In each step some tokens are sampled from the original's own predictions, so
that no sequence is repeated.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.quantized_store import QuantizedStore, quantizations_of
from ..convert.progress import bar
from ..convert.source.source import Source
from ..model import torch_device as devices
from ..model.divergence import kl_divergence
from ..model.forward import Tokens
from ..model.reference import TorchModel, kept_whole, reference_of
from ..model.tokens import TokenSet
from ..model.weights import kept_by, rows_of
from ..quant.affine import DATA_DRIVEN
from .gradients import sample_tokens
from .layerwise import FINE_TUNED
from .parameters import adam_for, set_learning_rate, take_step, trainable_matrix, trainable_weights
from .quantized_model import quantized_weights

BATCH = 16  # sequences of a step
_RESAMPLED = 0.3  # of the frames, whose tokens are sampled
WARM_UP = 20  # steps
# Bytes of the device's memory per weight. codes: code, gradient, Adam's two moments and the graph, all in float32, and
# the original's weight. low-memory: see ``low_memory_tuning``.
_BYTES = {"codes": 36, "low-memory": 8}
_STATE = "refining.pt"
Predictions = tuple[Tensor, Tensor]  # of the text and of the agent's codebooks


@dataclass(frozen=True)
class Schedule:
    """How long to fine-tune.

    state_seconds: between two states on the disk. on_step: called after each step with its number, from 0, and its loss
    in nats/token.
    """

    steps: int
    state_seconds: float = 60.0
    on_step: Callable[[int, float], None] | None = None


def fine_tune(
    source: Source,
    outputs: list[Output],
    token_set: TokenSet,
    store: QuantizedStore,
    schedule: Schedule,
    quiet: bool = False,
) -> None:
    """Fine-tune the data-driven matrices of a store, in it; resumes from the last state that a killed run wrote."""
    if any(file == FINE_TUNED for file in store.files.values()):
        return
    device = devices.device()
    matrices = {
        key: trainable_matrix(key, quantization, dtype, store, device)
        for key, (quantization, dtype) in quantizations_of(outputs).items()
        if quantization.method in DATA_DRIVEN
    }
    original = kept_whole(reference_of(source.checkpoint, device=device))
    rest = kept_by({}, quantized_weights(source, quantizations_of(outputs), store), device)
    quantized = replace(original, weights=trainable_weights(matrices, rest), rows=rows_of(rest))
    with bar("fine-tuning", schedule.steps, "step", quiet) as progress:
        _train(quantized, original, adam_for(matrices), token_set, schedule, store.folder / _STATE, progress)
    with torch.inference_mode():
        made = {key: matrix.quantized() for key, matrix in matrices.items()}
    store.add(FINE_TUNED.removesuffix(".safetensors"), made)


def trainable_scope(outputs: list[Output], memory: int | None = None) -> str | None:
    """Return how codes, scales and biases of a whole model can be trained at once: ``codes`` or ``low-memory``.

    ``codes`` (``fine_tune``) keeps everything in float32, ``low-memory`` (``fine_tune_in_low_memory``) in 8 and 16 bit.
    None where only single blocks fit. memory: in bytes, None for what the device has.
    """
    available = devices.memory() if memory is None else memory
    weights = sum(
        math.prod(output.shape)
        for output in outputs
        if output.quantization and output.quantization.method in DATA_DRIVEN
    )
    return next((scope for scope, nbytes in _BYTES.items() if weights * nbytes < 0.8 * available), None)


def _train(
    quantized: TorchModel,
    original: TorchModel,
    adam: torch.optim.Adam,
    token_set: TokenSet,
    schedule: Schedule,
    state: Path,
    progress: "tqdm[Any]",
) -> None:
    """Take the steps, from the last state on the disk on."""
    steps = schedule.steps
    first = _load_state(state, adam, steps)
    progress.update(first)
    saved, skipped = time.monotonic(), 0
    for step in range(first, steps):
        set_learning_rate(adam, step, steps, WARM_UP)
        random = np.random.default_rng(step)  # so that a resumed run samples what it would have sampled
        chosen = random.choice(len(token_set.tokens), min(BATCH, len(token_set.tokens)), replace=False)
        batch = _resampled(original, token_set, chosen, random)
        value, taken = math.nan, False
        if batch:
            loss = divergence(quantized, original, batch)
            value, taken = loss.item(), take_step(adam, loss)
        skipped += not taken
        progress.set_postfix_str(f"KL {value:.4f}", refresh=False)
        progress.update(1)
        if time.monotonic() - saved >= schedule.state_seconds:
            _save_state(state, adam, step + 1, steps)
            saved = time.monotonic()
        if schedule.on_step:
            schedule.on_step(step, value)
    if skipped:
        reason = "predictions or gradients are not finite"
        progress.write(f"fine-tuning: {skipped} of {steps - first} steps were skipped: {reason}", file=sys.stderr)


@dataclass(frozen=True)
class Batch:
    """Some sequences, in which some tokens are sampled; shapes as in ``TokenSet``."""

    tokens: Tokens
    targets: Tokens
    counted: Tensor


def _resampled(original: TorchModel, token_set: TokenSet, chosen: Any, random: np.random.Generator) -> Batch | None:
    """Return sequences in which the text and agent tokens of some frames are sampled from the original's predictions.

    None where the original's predictions are not finite.
    """
    some = token_set.chosen(chosen)
    half = original.architecture.n_q // 2
    with torch.no_grad():
        text, audio = original.logits(some.tokens, some.targets, half)
        if not bool(torch.isfinite(text).all() and torch.isfinite(audio).all()):
            return None
        generator = torch.Generator(text.device).manual_seed(int(random.integers(1 << 62)))
        sampled = [sample_tokens(text, generator)] + [
            sample_tokens(audio[:, :, step], generator) for step in range(half)
        ]
    read, new = with_sampled(some, np.stack(sampled, 1), random)
    return Batch(read, new, torch.from_numpy(some.counted).to(text.device))


def with_sampled(token_set: TokenSet, sampled: Tokens, random: np.random.Generator) -> tuple[Tokens, Tokens]:
    """Return tokens and targets in which those of some frames are replaced by sampled ones, where they are known.

    sampled: of the text and the agent's codebooks, ``[sequences, 1 + codebooks, frames]``.
    """
    tokens, targets = token_set.tokens, token_set.targets
    new = targets.copy()
    new[:, : sampled.shape[1]] = sampled
    frames = random.random((len(tokens), 1, tokens.shape[2])) < _RESAMPLED
    new = np.where(frames & (targets >= 0) & token_set.counted, new, targets)
    read = tokens.copy()
    read[:, :, 1:] = np.where(targets[:, :, :-1] == tokens[:, :, 1:], new[:, :, :-1], tokens[:, :, 1:])
    return read, new


def divergence(quantized: TorchModel, original: TorchModel, batch: Batch) -> Tensor:
    """Return the loss of a batch; see ``divergence_of``."""
    half = original.architecture.n_q // 2
    with torch.no_grad():
        expected = original.logits(batch.tokens, batch.targets, half)
    return divergence_of(quantized.logits(batch.tokens, batch.targets, half), expected, batch.counted)


def divergence_of(actual: Predictions, expected: Predictions, counted: Tensor) -> Tensor:
    """Return the loss: the divergence of the text, plus the mean over the agent's codebooks, in nats/token.

    actual, expected: logits of the text and of the agent's codebooks, as ``TorchModel.logits`` gives them; expected may
    be log-probabilities. counted: as in ``TokenSet``.
    """
    text = _divergence(actual[0], expected[0], counted[:, 0])
    agent = [
        _divergence(actual[1][:, :, step], expected[1][:, :, step], counted[:, step + 1])
        for step in range(actual[1].shape[2])
    ]
    return text + torch.stack(agent).mean()


def _divergence(actual: Tensor, expected: Tensor, counted: Tensor) -> Tensor:
    each = kl_divergence(log_softmax(actual, -1), log_softmax(expected, -1))
    return (each * counted).sum() / counted.sum().clamp(min=1)


def _save_state(state: Path, adam: torch.optim.Adam, done: int, steps: int) -> None:
    """Write the state after some steps: parameters and optimizer."""
    values = [parameter.detach() for group in adam.param_groups for parameter in group["params"]]
    write_state(state, {"done": done, "steps": steps, "values": values, "adam": adam.state_dict()})


def write_state(state: Path, content: dict[str, Any]) -> None:
    """Write a state so that it is there whole or not at all."""
    temporary = state.with_name(f"{state.name}.partial")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(state)


def _load_state(state: Path, adam: torch.optim.Adam, steps: int) -> int:
    """Restore the state that a killed run wrote, if any; return how many steps it had taken."""
    if not state.is_file():
        return 0
    saved = torch.load(state, weights_only=True)
    if saved["steps"] != steps:
        return 0
    parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for parameter, value in zip(parameters, saved["values"], strict=True):
            parameter.copy_(value)
    adam.load_state_dict(saved["adam"])
    return int(saved["done"])
