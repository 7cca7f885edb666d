"""A session as the reference runs it: voice, silence, text prompt, silence, then the user, one frame at a time.

Tokens stand in delayed columns: column n holds stream k's token of frame n - delay[k]. A step reads column n - 1 and
completes column n: what is given there stays, the rest is predicted, the text first, then codebook after codebook.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..convert.errors import UserError
from ..convert.source.architecture import Architecture
from ..convert.source.voices import Voice
from .forward import Floats, KVCache, Model, Tokens
from .walk import forward_blocks

SILENCE = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)  # the codec's tokens for no sound, as the reference has them
SINE = (430, 1268, 381, 1611, 1095, 1495, 56, 472)  # the tone in place of the user during prompts
PAUSE = 6  # frames of silence before and after the text prompt: half a second
UNKNOWN = -2


@dataclass(frozen=True)
class Frame:
    """The tokens given for one frame; None where the model predicts them. agent, user: a token for each codebook."""

    text: int | None = None
    agent: Sequence[int] | None = None
    user: Sequence[int] | None = None


def system_prompt(architecture: Architecture, text: Sequence[int]) -> list[Frame]:
    """Return the frames between a voice and the user's first: silence, the text prompt's tokens, silence."""
    half, card = architecture.n_q // 2, architecture.card
    agent, user = ([token % card for token in tokens[:half]] for tokens in (SILENCE, SINE))
    pause = [architecture.text_padding] * PAUSE
    return [Frame(token, agent, user) for token in (*pause, *text, *pause)]


def no_voice(architecture: Architecture) -> Voice:
    """Return a voice without a name and frames, whose cache holds the initial tokens: a session without a voice."""
    a = architecture
    cache = np.full((1, 1 + a.n_q, max(a.delays) + 2), a.card, np.int64)
    cache[:, 0] = a.text_card
    return Voice("", np.zeros((0, 1, 1, a.dim), np.float32), cache)


def listening(architecture: Architecture, user: Tokens) -> list[Frame]:
    """Return frames in which the user speaks, ``[codebooks, frames]``, and the agent is silent."""
    agent = [token % architecture.card for token in SILENCE[: len(user)]]
    return [Frame(architecture.text_padding, agent, column) for column in user.T.tolist()]


@dataclass
class Columns:
    """The delayed columns of tokens under way, ``[streams]`` each, beginning with a voice's last ones.

    Raises UserError for a voice whose cache is too short for the delays.
    """

    architecture: Architecture
    voice: Voice
    tokens: dict[int, Tokens] = field(default_factory=dict)
    given: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Copy the columns around the next step from the voice's cache, all of them given."""
        cache = self.voice.cache[0]
        longest = max(self.architecture.delays)
        if cache.shape[1] < longest + 2:
            raise UserError(
                f"voice {self.voice.name}: holds {cache.shape[1]} columns of tokens, where the model's delays need "
                f"{longest + 2}: it belongs to another one"
            )
        self.next = len(self.voice.embeddings) + 1  # the first step completes column 1
        for column in range(self.next - 1, self.next + longest):
            self.tokens[column] = cache[:, column % cache.shape[1]].astype(np.int32)
            late = (stream for stream, delay in enumerate(self.architecture.delays) if column - self.next < delay)
            self.given[column] = set(late)

    def give(self, frame: Frame) -> tuple[Tokens, Tokens, set[int]]:
        """Add what is given of the next frame; return the column to read, the one to complete, and what it holds."""
        half = self.architecture.n_q // 2
        tokens = {0: frame.text} if frame.text is not None else {}
        tokens |= dict(enumerate(frame.agent or (), 1)) | dict(enumerate(frame.user or (), 1 + half))
        for stream, token in tokens.items():
            column = self.next + self.architecture.delays[stream]
            self._column(column)[stream] = token
            self.given[column].add(stream)
        return self._column(self.next - 1), self._column(self.next), self.given[self.next]

    def _column(self, number: int) -> Tokens:
        self.given.setdefault(number, set())
        return self.tokens.setdefault(number, np.full(1 + self.architecture.n_q, UNKNOWN, np.int32))

    def advance(self) -> Tokens:
        """Move to the next column; return the newest frame that is complete, ``[streams]``, without delays."""
        delays = self.architecture.delays
        first = self.next - max(delays)
        frame = np.array([self._column(first + delay)[stream] for stream, delay in enumerate(delays)], np.int32)
        for column in [column for column in self.tokens if column < first]:
            del self.tokens[column], self.given[column]
        self.next += 1
        return frame


@dataclass(frozen=True)
class SessionStep:
    """What a step of the session gave.

    tokens: the newest complete frame, ``[streams]``. text_logits: ``[text_card]``. audio_logits: ``[steps, card]``.
    """

    tokens: Tokens
    text_logits: Floats
    audio_logits: Floats


def prompt_columns(architecture: Architecture, voice: Voice, frames: Sequence[Frame]) -> tuple[Tokens, Tokens]:
    """Return the columns that steps over given frames read and complete, ``[streams, steps]`` each."""
    columns, read, completed = Columns(architecture, voice), [], []
    for frame in frames:
        source, target, _ = columns.give(frame)
        read.append(source.copy())
        completed.append(target.copy())
        columns.advance()
    return np.stack(read, 1), np.stack(completed, 1)


def greedy(model: Model, architecture: Architecture, voice: Voice, frames: Sequence[Frame]) -> Iterator[SessionStep]:
    """Run a session and yield its steps over ``frames``, the top-1 token wherever none is given.

    For what the reference does while streaming, the model must see one frame and one step less than its context (its
    rotating KV cache masks the oldest key).
    """
    for steps in sessions(model, architecture, [voice], [[frame] for frame in frames], top1):
        yield steps[0]


def top1(logits: Floats, stream: int) -> Tokens:
    """Return the top-1 token of each row ``[rows, vocabulary]``; the stream makes no difference."""
    del stream
    tokens: Tokens = logits.argmax(-1).astype(np.int32)
    return tokens


def sessions(
    model: Model,
    architecture: Architecture,
    voices: Sequence[Voice],
    frames: Iterable[Sequence[Frame]],
    choose: Callable[[Floats, int], Tokens],
) -> Iterator[list[SessionStep]]:
    """Run sessions side by side, of voices of one length; yield the step of each, frame by frame.

    frames: the next frame of every session. choose: takes logits ``[sessions, vocabulary]`` and the stream, and returns
    tokens for where none is given. The voices go through the temporal transformer in one pass, then each frame in one.
    """
    kv_cache: KVCache = {}
    vectors = np.stack([voice.embeddings.reshape(-1, architecture.dim).astype(np.float32) for voice in voices])
    if vectors.shape[1]:
        nothing = np.full((len(voices), 1 + architecture.n_q, vectors.shape[1]), -1, np.int32)
        forward_blocks(model, architecture, "temporal", model.embed(nothing, vectors), kv_cache)
    columns = [Columns(architecture, voice) for voice in voices]
    for done, given_now in enumerate(frames, vectors.shape[1]):
        columns_now = [one.give(frame) for one, frame in zip(columns, given_now, strict=True)]
        targets, given = [target for _, target, _ in columns_now], [known for _, _, known in columns_now]
        x = model.embed(np.stack([source for source, _, _ in columns_now])[:, :, None])
        hidden = model.out_norm(forward_blocks(model, architecture, "temporal", x, kv_cache, done))[:, 0]
        text = model.text_logits(hidden)
        _complete(targets, given, 0, choose(text, 0))
        audio = _steps(model, architecture, hidden, targets, given, choose)
        yield [SessionStep(one.advance(), text[index], audio[index]) for index, one in enumerate(columns)]


def _complete(targets: Sequence[Tokens], given: Sequence[set[int]], stream: int, tokens: Tokens) -> None:
    """Put tokens into the columns where none is given."""
    for target, known, token in zip(targets, given, tokens, strict=True):
        if stream not in known:
            target[stream] = token


def _steps(
    model: Model,
    architecture: Architecture,
    hidden: Floats,
    targets: Sequence[Tokens],
    given: Sequence[set[int]],
    choose: Callable[[Floats, int], Tokens],
) -> Floats:
    """Run the depformer's steps for one frame and complete its columns; return logits ``[sessions, steps, card]``."""
    kv_cache: KVCache = {}
    logits = []
    for step in range(architecture.steps):
        previous = np.array([target[step] for target in targets], np.int32)
        x = model.step_input(step, hidden, previous)[:, None]
        x = forward_blocks(model, architecture, "depformer", x, kv_cache, step)
        logits.append(model.audio_logits(step, x[:, 0]))
        _complete(targets, given, step + 1, choose(logits[-1], step + 1))
    return np.stack(logits, 1)
