"""The input of both models: token files, the model's own system prompt, or encoded audio."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from ..convert.errors import UserError, printable
from ..convert.hints import Hint
from ..convert.schema import whole
from ..convert.source.architecture import Architecture
from ..convert.source.voices import Voice
from ..convert.tensorfile import TensorFile
from .forward import Floats, Tokens
from .session import listening, no_voice, prompt_columns, system_prompt

SYSTEM_PROMPT, AUDIO = "system prompt", "audio"
SELF_GENERATED = "sessions that the model spoke itself"  # stored in files: its words stay
CALIBRATION_FRAMES, CALIBRATION_SESSIONS = 250, 108  # of 20 seconds: self-generated calibration tokens
DEFAULT_SEQUENCES = 3  # of the system prompt: voices
DEFAULT_FRAMES = 96  # of the system prompt, whose text takes about 25 of them
_LARGEST = 1 << 30  # bytes of a token file
_MOST_FRAMES = 4096  # of a sequence: attention holds a square of them for each head


_Count = Annotated[int, whole(1)]


@dataclass(frozen=True, kw_only=True)
class TokenDescription:
    """Where tokens come from, as reports, manifests and files of sensitivities describe them.

    kind: ``tokens``, ``audio``, ``system prompt`` or SELF_GENERATED. text: of the prompt. file: its name. frames: of
    each sequence. available: sequences of the file, of which these are some. voices: one for each sequence.
    """

    kind: str
    text: str | None = None
    file: str | None = None
    sequences: _Count
    frames: _Count
    available: _Count | None = None
    voices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TokenSet:
    """Sequences for a teacher-forced comparison; everything but ``undelayed`` is delayed, as the model reads it.

    tokens: ``[sequences, streams, frames]``, what is read. targets: the same shape, the next tokens (which the
    depformer reads too); -1 where they are unknown. counted: the same shape, which predictions are compared. voices:
    the voice whose embeddings are the first frames of a sequence, for each sequence; empty for none. scored: whether
    targets were recorded, so that their likelihood is a figure. undelayed: the same sequences as recorded,
    ``[sequences, streams, frames]``, None for the system prompt.
    """

    description: TokenDescription
    tokens: Tokens
    targets: Tokens
    counted: NDArray[np.bool_]
    voices: tuple[str, ...] = ()
    scored: bool = True
    undelayed: Tokens | None = None

    def chosen(self, sequences: NDArray[np.int64]) -> "TokenSet":
        """Return some of its sequences."""
        tokens, targets, counted = self.tokens[sequences], self.targets[sequences], self.counted[sequences]
        voices = tuple(self.voices[index] for index in sequences) if self.voices else ()
        undelayed = None if self.undelayed is None else self.undelayed[sequences]
        return TokenSet(self.description, tokens, targets, counted, voices, self.scored, undelayed)

    def vectors(self, voices: Sequence[Voice], dim: int) -> Floats | None:
        """Return the embeddings of its voices at their frames, zero elsewhere: ``[sequences, frames, dim]``."""
        if not self.voices:
            return None
        by_name = {voice.name: voice.embeddings.reshape(-1, dim).astype(np.float32) for voice in voices}
        vectors = np.zeros((len(self.voices), self.tokens.shape[2], dim), np.float32)
        for number, name in enumerate(self.voices):
            embeddings = by_name[name][: vectors.shape[1]]
            vectors[number, : len(embeddings)] = embeddings
        return vectors


def evenly_spaced(count: int, most: int) -> NDArray[np.int64]:
    """Return at most ``most`` of ``count`` indices, evenly spaced."""
    number = min(count, most)
    return np.arange(number) * count // number


def checked(token_set: TokenSet, architecture: Architecture) -> TokenSet:
    """Return the token set if every limited figure can be computed from it; raises UserError otherwise."""
    frames = token_set.tokens.shape[2]
    if frames > _MOST_FRAMES:
        raise UserError(
            f"sequences of {frames} frames: at most {_MOST_FRAMES} go through a block at once", Hint.FEWER_FRAMES
        )
    agent = token_set.counted[:, 1 : 1 + architecture.n_q // 2]
    if not agent.any(axis=(0, 2)).all() or not token_set.counted[:, 0].any():
        raise UserError(f"{frames} frames have no predictions of some of the agent's codebooks", Hint.MORE_FRAMES)
    return token_set


def from_tokens(tokens: Tokens, architecture: Architecture, kind: str = "tokens", file: str | None = None) -> TokenSet:
    """Return undelayed tokens ``[sequences, streams, frames]`` with delays applied and initial tokens in front.

    Predictions of initial tokens do not count.
    """
    sequences, streams, frames = tokens.shape
    columns = np.empty((sequences, streams, frames + 1), np.int32)
    counted = np.ones((sequences, streams, frames), bool)
    for stream, delay in enumerate(architecture.delays):
        columns[:, stream, : delay + 1] = architecture.card if stream else architecture.text_card
        columns[:, stream, delay + 1 :] = tokens[:, stream, : max(frames - delay, 0)]
        counted[:, stream, :delay] = False
    targets = columns[:, :, 1:]
    known = counted & (targets >= 0)
    description = TokenDescription(kind=kind, file=file, sequences=sequences, frames=frames)
    return checked(TokenSet(description, columns[:, :, :-1], targets, known, undelayed=tokens), architecture)


def read_tokens(path: Path, architecture: Architecture, sequences: int | None, frames: int | None) -> TokenSet:
    """Read a token file; see ``read_token_file``."""
    tokens = read_token_file(path, architecture)[:sequences, :, :frames]
    with closing(TensorFile(path)) as file:
        kind = SELF_GENERATED if file.metadata.get("kind") == SELF_GENERATED else "tokens"
    return from_tokens(tokens, architecture, kind, printable(path.name))


def read_token_file(path: Path, architecture: Architecture) -> Tokens:
    """Return ``tokens`` ``[N, streams, T]`` of a safetensors file, not delayed; raises UserError for unusable ones."""
    if path.is_file() and path.stat().st_size > _LARGEST:
        raise UserError(f"{path}: over 1 GiB: not a token file")
    file = TensorFile(path, Hint.MAKE_TOKENS)
    try:
        spec = file.specs.get("tokens")
        streams = 1 + architecture.n_q
        if spec is None or spec.dtype not in ("I16", "I32", "I64") or len(spec.shape) != 3 or spec.shape[1] != streams:
            others = [*list(file.specs)[:3], "..."] if len(file.specs) > 3 else list(file.specs) or ["nothing"]
            contents = f"{spec.dtype} {list(spec.shape)}" if spec else ", ".join(others)
            raise UserError(
                f"{path}: holds {contents}: integers called tokens, [sequences, {streams}, frames], are needed"
            )
        if 0 in spec.shape:
            raise UserError(f"{path}: tokens are empty: {list(spec.shape)}")
        tokens = file.read("tokens", 0, spec.rows).reshape(spec.shape)
    finally:
        file.close()
    largest = np.array([architecture.text_card] + [architecture.card] * architecture.n_q)[:, None]
    if tokens.min() < -1 or bool((tokens >= largest).any()):
        raise UserError(f"{path}: holds tokens that this model does not have: it was made for another one")
    return tokens.astype(np.int32)


def from_system_prompt(
    architecture: Architecture,
    voices: Sequence[Voice],
    names: Sequence[str],
    text: Sequence[int],
    frames: int | None,
    shown: str,
    user: Tokens | None = None,
    file: str | None = None,
) -> TokenSet:
    """Return the system prompt of a conversation, a sequence for each voice: voice, silence, text prompt, silence.

    names: of the voices; one sequence without a voice where there are none.
    Text predictions count everywhere, audio predictions after the voice: before, the tokens are unknown. All sequences
    are cut to the length of the shortest one. text: the prompt's tokens; shown: the prompt. user: ``[codebooks,
    frames]``, what the user says then, to an agent that is silent; file: the recording that it comes from.
    """
    by_name = {voice.name: voice for voice in voices} if names else {"": no_voice(architecture)}
    begins = names or [""]
    prompt = [*system_prompt(architecture, text), *([] if user is None else listening(architecture, user))]
    length = min(len(by_name[name].embeddings) for name in begins) + len(prompt)
    length = min(length, frames or length)
    shape = (len(begins), 1 + architecture.n_q, length)
    tokens, targets, counted = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, bool)
    counted[:, 0] = True
    for number, name in enumerate(begins):
        begin = len(by_name[name].embeddings)
        read, completed = prompt_columns(architecture, by_name[name], prompt)
        tokens[number, :, begin:] = read[:, : max(length - begin, 0)]
        targets[number, :, begin:] = completed[:, : max(length - begin, 0)]
        counted[number, :, begin:] = True
    kind = SYSTEM_PROMPT if user is None else AUDIO
    description = TokenDescription(
        kind=kind, text=shown, file=file, sequences=len(begins), frames=length, voices=tuple(names) or None
    )
    return checked(TokenSet(description, tokens, targets, counted, tuple(names), scored=False), architecture)
