"""Tuning codes, scales and biases together, so that the whole model predicts what the original does.

Codes are rounded in the forward pass and moved as if they were not (a straight-through estimator); scales and biases
are rounded to their storage dtype in the same way. What is made small is the divergence of the text's and the agent's
predictions, on calibration material in which some tokens are drawn anew from the original's own predictions, so that no
sequence comes twice.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore, quantizations_of
from ..convert.progress import bar
from ..convert.source.source import Source
from ..model import torch_device as devices
from ..model.divergence import kl_divergence
from ..model.forward import Tokens
from ..model.reference import TorchModel, kept_by, reference_of, rows_of, source_weights
from ..model.tokens import TokenSet
from ..quant.affine import DATA_DRIVEN
from .layerwise import FINE_TUNED, quantized_weights
from .parameters import TrainableMatrix, adam_for, begin, set_rate, take_step, weights_of

_BATCH = 16  # sequences of a step
_DRAWN = 0.3  # of the frames, whose tokens are drawn anew
_WARM_UP = 20  # steps
# Bytes a weight: code, gradient, Adam's two moments, and what the graph holds; or the original's weight, and the code.
_BYTES = {"codes": 36, "sides": 12}
_STATE = "refining.pt"


@dataclass(frozen=True)
class Schedule:
    """How long to tune, and what. codes: as well as scales and biases; see ``reach`` for what fits into memory.

    state_seconds: between two states on the disk. on_step: called after each step with its number, from 0, and its loss
    in nats per token.
    """

    steps: int
    codes: bool = True
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
    """Tune what was solved, and leave it in ``solution``; resumes from the last state that a killed run wrote."""
    if any(file == FINE_TUNED for file in store.files.values()):
        return
    device = devices.device()
    quantizations = {
        part: quantization
        for part, quantization in quantizations_of(outputs).items()
        if quantization[0].method in DATA_DRIVEN
    }
    read = source_weights(source.checkpoint)
    tuned = {
        part: begin(part, *quantization, store, device, schedule.codes) for part, quantization in quantizations.items()
    }
    original = reference_of(source.checkpoint, device=device)
    held = kept_by({}, original.weights, device)
    original = replace(original, weights=held, rows=rows_of(held))
    rest = kept_by({}, quantized_weights(source, quantizations_of(outputs), store), device)
    made = replace(original, weights=weights_of(tuned, rest), rows=rows_of(rest))
    with bar("refining", schedule.steps, "step", quiet) as progress:
        _tune(original, made, tuned, token_set, schedule, store.folder / _STATE, progress)
    with torch.inference_mode():
        store.add(
            FINE_TUNED.removesuffix(".safetensors"), {part: one.finished(read(*part)) for part, one in tuned.items()}
        )


def reach(outputs: list[Output], memory: int | None = None) -> str | None:
    """Return what of a model can be tuned as a whole: ``codes``, ``sides`` or None.

    memory: bytes of it, None for what the device has.
    """
    there = devices.memory() if memory is None else memory
    weights = sum(
        math.prod(output.shape)
        for output in outputs
        if output.quantization and output.quantization.method in DATA_DRIVEN
    )
    return next((what for what, nbytes in _BYTES.items() if weights * nbytes < 0.8 * there), None)


def _tune(
    original: TorchModel,
    made: TorchModel,
    tuned: Mapping[MatrixKey, TrainableMatrix],
    token_set: TokenSet,
    schedule: Schedule,
    state: Path,
    progress: "tqdm[Any]",
) -> None:
    """Take the steps, from the last state that was kept on."""
    adam, steps = adam_for(tuned), schedule.steps
    again = len(adam.param_groups) == 1  # what is tuned without codes is large
    done = _resume(state, adam, steps)
    progress.update(done)
    kept, left_out = time.monotonic(), 0
    for step in range(done, steps):
        set_rate(adam, step, steps, _WARM_UP)
        random = np.random.default_rng(step)  # so that a resumed run draws what it would have drawn
        chosen = random.choice(len(token_set.tokens), min(_BATCH, len(token_set.tokens)), replace=False)
        batch = _drawn(original, token_set, chosen, random)
        loss, taken = math.nan, False
        if batch:
            found = divergence(made, original, batch, again)
            loss, taken = found.item(), take_step(adam, found)
        left_out += not taken
        progress.set_postfix_str(f"KL {loss:.4f}", refresh=False)
        progress.update(1)
        if time.monotonic() - kept >= schedule.state_seconds:
            _keep(state, adam, step + 1, steps)
            kept = time.monotonic()
        if schedule.on_step:
            schedule.on_step(step, loss)
    if left_out:
        reason = "predictions or gradients are not finite"
        progress.write(f"fine-tuning: {left_out} of {steps - done} steps were skipped: {reason}", file=sys.stderr)


@dataclass(frozen=True)
class Batch:
    """Some sequences, with tokens drawn anew; shapes are those of ``Material``."""

    tokens: Tokens
    targets: Tokens
    counted: Tensor


def _drawn(original: TorchModel, token_set: TokenSet, chosen: Any, random: np.random.Generator) -> Batch | None:
    """Return sequences in which text and agent say, in some frames, what the original might have said there.

    None where the original's predictions are not finite.
    """
    tokens, targets, counted = (part[chosen] for part in (token_set.tokens, token_set.targets, token_set.counted))
    half = original.architecture.n_q // 2
    with torch.no_grad():
        text, audio = original.logits(tokens, targets, half)
        if not bool(torch.isfinite(text).all() and torch.isfinite(audio).all()):
            return None
        generator = torch.Generator(text.device).manual_seed(int(random.integers(1 << 62)))
        said = [_sample(text, generator)] + [_sample(audio[:, :, step], generator) for step in range(half)]
    new = targets.copy()
    new[:, : half + 1] = np.stack(said, 1)
    frames = random.random((len(tokens), 1, tokens.shape[2])) < _DRAWN
    new = np.where(frames & (targets >= 0) & counted, new, targets)
    read = tokens.copy()
    read[:, :, 1:] = np.where(targets[:, :, :-1] == tokens[:, :, 1:], new[:, :, :-1], tokens[:, :, 1:])
    return Batch(read, new, torch.from_numpy(counted).to(text.device))


def _sample(logits: Tensor, generator: torch.Generator) -> Tokens:
    flat = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
    tokens: Tokens = flat.reshape(logits.shape[:2]).cpu().numpy().astype(np.int32)
    return tokens


def divergence(made: TorchModel, original: TorchModel, batch: Batch, again: bool = False) -> Tensor:
    """Return the loss: the divergence of the text, plus the mean over the agent's codebooks, in nats/token.

    again: whether blocks are computed again for their gradients, which takes less memory.
    """
    half = original.architecture.n_q // 2
    with torch.no_grad():
        expected = original.logits(batch.tokens, batch.targets, half)
    actual = made.logits(batch.tokens, batch.targets, half, again)
    text = _divergence(actual[0], expected[0], batch.counted[:, 0])
    agent = [
        _divergence(actual[1][:, :, step], expected[1][:, :, step], batch.counted[:, step + 1]) for step in range(half)
    ]
    return text + torch.stack(agent).mean()


def _divergence(actual: Tensor, expected: Tensor, counted: Tensor) -> Tensor:
    each = kl_divergence(log_softmax(actual, -1), log_softmax(expected, -1))
    return (each * counted).sum() / counted.sum().clamp(min=1)


def _keep(state: Path, adam: torch.optim.Adam, done: int, steps: int) -> None:
    """Write down where the tuning is."""
    temporary = state.with_name(f"{state.name}.partial")
    values = [parameter.detach() for group in adam.param_groups for parameter in group["params"]]
    with temporary.open("wb") as file:
        torch.save({"done": done, "steps": steps, "values": values, "adam": adam.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(state)


def _resume(state: Path, adam: torch.optim.Adam, steps: int) -> int:
    """Take up what a killed run wrote down; return how many steps it had taken."""
    if not state.is_file():
        return 0
    held = torch.load(state, weights_only=True)
    if held["steps"] != steps:
        return 0
    parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for parameter, value in zip(parameters, held["values"], strict=True):
            parameter.copy_(value)
    adam.load_state_dict(held["adam"])
    return int(held["done"])
