"""A greedy session on the checkpoint and on its bundle, each fed its own tokens: when do they differ, and how much?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from tqdm import tqdm

from ..convert.bundle.reader import Bundle
from ..convert.source.architecture import Architecture
from ..convert.source.source import Source
from ..convert.source.voices import Voice
from ..model.matmul import QuantizedMatmul
from ..model.mlx_model import model_of
from ..model.reference import reference_of
from ..model.session import SILENCE, Frame, greedy, no_voice, system_prompt
from ..model.tokens import TokenSet
from .figures import FirstDifference, Rollout

_KEPT = 2 << 30  # bytes: a checkpoint up to this size is kept in memory, a larger one is read again for every frame


@dataclass(frozen=True)
class Script:
    """What is given of a session: a voice's name (empty for none), a text prompt's tokens, and the user's frames."""

    voice: str
    prompt: Sequence[int]
    user: Sequence[Sequence[int]]


def script(source: Source, token_set: TokenSet, prompt: Sequence[int], frames: int) -> Script:
    """Return the script of a session of so many frames with the first voice and user of the token set.

    The user is silent where it has no token (-1), and after its end.
    """
    half, card = source.architecture.n_q // 2, source.architecture.card
    silence = np.array([token % card for token in SILENCE[:half]])
    user = np.tile(silence, (frames, 1))
    if token_set.undelayed is not None:
        recorded = token_set.undelayed[0, 1 + half :, :frames].T
        user[: len(recorded)] = np.where(recorded < 0, silence, recorded)
    names = token_set.voices or [voice.name for voice in source.voices]
    return Script(names[0] if names else "", prompt, user.tolist())


def frames_of(architecture: Architecture, played: Script) -> list[Frame]:
    """Return what is given of each frame of a session after its voice; delays are applied when a session runs."""
    return [*system_prompt(architecture, played.prompt), *(Frame(user=tokens) for tokens in played.user)]


def run(
    source: Source,
    stored: Bundle,
    played: Script,
    bar: "tqdm[Any]",
    arithmetic: str = "float32",
    device: str = "cpu",
    matmul: QuantizedMatmul | None = None,
) -> Rollout:
    """Run a session on both; return where the agent's text and codebooks differ first, and how many tokens agree."""
    reference, bundle = reference_of(source.checkpoint, device=device), model_of(stored, arithmetic, matmul)
    if source.checkpoint.file.nbytes <= _KEPT:
        reference = replace(reference, weights=cache(reference.weights))
        bundle = replace(bundle, read=cache(bundle.read))
    frames = frames_of(source.architecture, played)
    sessions = []
    for model, voices in ((reference, source.voices), (bundle, stored.voices())):
        # while it streams, the reference's rotating KV cache hides the oldest key
        streaming = replace(model, context=model.context - 1, steps_seen=model.steps_seen - 1)
        voice = next((v for v in voices if v.name == played.voice), no_voice(source.architecture))
        sessions.append(_agent(streaming, source, voice, frames, len(played.user), bar))
    same = sessions[0] == sessions[1]
    different = np.argwhere(~same)
    first = None
    if len(different):
        frame, stream = (int(value) for value in different[0])
        first = FirstDifference(frame, "text" if stream == 0 else f"codebook {stream - 1}")
    return Rollout(
        voice=played.voice or None,
        frames=len(played.user),
        first_difference=first,
        agreement=tuple(float(share) for share in same.mean(1)),
        agreement_text=float(same[:, 0].mean()),
        agreement_agent=float(same[:, 1:].mean()),
    )


def _agent(
    model: Any, source: Source, voice: Voice, frames: Sequence[Frame], count: int, bar: "tqdm[Any]"
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the agent's own tokens, ``[frames, 1 + codebooks]``."""
    own = []
    for step in greedy(model, source.architecture, voice, frames):
        own.append(step.tokens[: 1 + source.architecture.n_q // 2])
        bar.update()
    return np.stack(own[len(own) - count :])
