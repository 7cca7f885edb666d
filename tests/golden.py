"""What the golden files hold, computed by a model, and how near it must be."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from ppx.convert.source.architecture import Architecture
from ppx.convert.source.source import Source
from ppx.model.blocks import blocks_of
from ppx.model.forward import Floats, Model, Tokens
from ppx.model.mlx_model import MlxModel
from ppx.model.reference import TorchModel
from ppx.model.session import Frame, SessionStep, greedy, system_prompt
from safetensors.torch import load_file

Streaming = TypeVar("Streaming", TorchModel, MlxModel)


def recorded(model: Model, architecture: Architecture, tokens: Tokens) -> dict[str, Floats]:
    """Everything that the golden files hold, computed by a model."""
    x = model.embed(tokens)
    found = {"temporal.embed": x}
    for block in blocks_of(architecture, "temporal"):
        added, x = model.block(block, x)
        if block.layer == 0:
            found[f"temporal.layers.0.{ {'attention': 'self_attn', 'mlp': 'gating'}[block.sublayer] }"] = added
        if block.sublayer == "mlp":
            found[f"temporal.layers.{block.layer}"] = x
    hidden = model.out_norm(x)
    batch, frames, dim = hidden.shape
    rows = hidden.reshape(-1, dim)
    found |= {"temporal.out_norm": hidden, "text_logits": model.text_logits(rows).reshape(batch, frames, -1)}
    steps = architecture.steps
    x = np.stack([model.step_input(step, rows, tokens[:, step].reshape(-1)) for step in range(steps)], 1)
    for block in blocks_of(architecture, "depformer"):
        _, x = model.block(block, x)
        if block.sublayer == "mlp":
            found[f"depformer.layers.{block.layer}"] = x.reshape(batch, frames, steps, -1)
    logits = [model.audio_logits(step, x[:, step]).reshape(batch, frames, -1) for step in range(steps)]
    return found | {"audio_logits": np.stack(logits, 1)}


def assert_near(found: Mapping[str, Floats], golden: Mapping[str, torch.Tensor], tolerance: float) -> None:
    """Compare all recorded tensors: the largest difference over the tensor's largest value."""
    assert set(found) == set(golden) - {"tokens"}
    for name, array in found.items():
        expected = golden[name].float().numpy()
        apart = np.abs(array - expected).max() / np.abs(expected).max()
        assert apart <= tolerance, f"{name}: {apart:.2g}"


def streaming(model: Streaming) -> Streaming:
    """A model that sees what the reference sees while it streams: its ring of keys hides the oldest."""
    return replace(model, context=model.context - 1, steps_seen=model.steps_seen - 1)


def session(source: Source, model: Streaming, pico: Path) -> tuple[list[SessionStep], dict[str, torch.Tensor]]:
    """The steps of the golden session's user phase, and the golden session."""
    golden = load_file(pico / "golden" / "generate_greedy.safetensors")
    prompt = system_prompt(source.architecture, golden["text_prompt"].tolist())
    assert prompt[0].agent == golden["silence_tokens"].tolist()
    assert prompt[0].user == golden["sine_tokens"].tolist()
    frames = prompt + [Frame(user=tokens) for tokens in golden["user_tokens"].tolist()]
    voice = next(voice for voice in source.voices if voice.name == "NATF2")
    steps = list(greedy(streaming(model), source.architecture, voice, frames))
    return steps[len(prompt) :], golden


def assert_same_session(steps: Sequence[SessionStep], golden: Mapping[str, torch.Tensor], tolerance: float) -> None:
    np.testing.assert_array_equal(np.stack([step.tokens for step in steps]), golden["tokens"].numpy())
    for name in ("text_logits", "audio_logits"):
        apart = np.abs(np.stack([getattr(step, name) for step in steps]) - golden[name].numpy()).max()
        assert apart <= tolerance * golden[name].abs().max()
