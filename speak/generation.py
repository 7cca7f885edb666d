"""A conversation with a bundle: prompts are prefilled, then each input frame gives an output frame."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..convert.progress import long_step
from ..convert.source.voices import Voice
from ..model.forward import Tokens
from ..model.mlx_device import on_gpu
from ..model.session import UNKNOWN, Columns, Frame
from .language_model import Runtime
from .sampling import Sampling


@dataclass
class Conversation:
    """A session after its prompts.

    Attributes of the last frame: column ``[streams]``, which was read; tokens ``[1 + steps]``, which were sampled;
    text_logits ``[text_card]``; audio_logits ``[steps, card]``.
    """

    runtime: Runtime
    voice: Voice
    prompt: Sequence[Frame]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0

    def __post_init__(self) -> None:
        """Prefill the voice and the prompt."""
        self.half = self.runtime.architecture.n_q // 2
        self._temporal, self._depformer = self.runtime.temporal(), self.runtime.depformer(self.sampling)
        self.restart(self.seed)

    def restart(self, seed: int) -> None:
        """Begin again after the prompts, with another seed; compiled functions stay."""
        self.seed = seed
        self._columns = Columns(self.runtime.architecture, self.voice)
        read = []
        for frame in self.prompt:
            read.append(self._columns.give(frame)[0].copy())
            self._columns.advance()
        streams = 1 + self.runtime.architecture.n_q
        columns = np.stack(read, 1) if read else np.empty((streams, 0), np.int32)
        vectors = self.voice.embeddings.reshape(-1, self.runtime.architecture.dim).astype(np.float32)
        self.kv_cache = self.runtime.prefill(columns, vectors)
        self._key = mx.random.key(self.seed)

    def compile(self) -> None:
        """Compute a frame without input and discard it, so that its functions are compiled.

        The next frame overwrites its keys and values.
        """
        kv_cache = self.kv_cache
        kv_cache.grow()
        architecture = self.runtime.architecture
        column = mx.zeros(1 + architecture.n_q, mx.int32)
        number = mx.array(kv_cache.frames)
        hidden, text_logits, *_ = self._temporal(column, number, list(kv_cache.keys), list(kv_cache.values))
        given = mx.full(1 + len(self.runtime.steps), UNKNOWN, mx.int32)
        mx.eval(self._depformer(hidden, text_logits, given, mx.random.key(self.seed)), kv_cache.keys, kv_cache.values)

    def step(self, user: Sequence[int] | Tokens) -> tuple[int, Tokens]:
        """Run a frame of the user's tokens; return its text token, and the newest complete agent frame.

        The agent's codebooks ``[codebooks]`` are one frame old, because codebooks 1 to 7 have that delay.
        """
        column, given = self._input_columns(user)
        hidden = self._temporal_step(column)
        return self._depformer_step(hidden, given)

    def timed(self, user: Sequence[int] | Tokens) -> dict[str, float]:
        """Do the same in two evaluations; return the seconds of each transformer."""
        column, given = self._input_columns(user)
        began = time.perf_counter()
        hidden = self._temporal_step(column)
        mx.eval(hidden, self.text_logits, self.kv_cache.keys, self.kv_cache.values)
        between = time.perf_counter()
        self._depformer_step(hidden, given)
        return {"temporal": between - began, "depformer": time.perf_counter() - between}

    def _input_columns(self, user: Sequence[int] | Tokens) -> tuple[Tokens, list[int]]:
        """Return the column to read, and the given tokens of the one to complete, UNKNOWN where none is given."""
        self.column, target, known = self._columns.give(Frame(user=[int(token) for token in user]))
        self._target = target
        streams = range(1 + len(self.runtime.steps))
        return self.column, [int(target[stream]) if stream in known else UNKNOWN for stream in streams]

    def _temporal_step(self, column: Tokens) -> mx.array:
        """Run a temporal step; return its output, which is still being computed."""
        kv_cache = self.kv_cache
        kv_cache.grow()
        number = mx.array(kv_cache.frames)
        hidden: mx.array
        hidden, self.text_logits, keys, values = self._temporal(
            mx.array(column), number, kv_cache.keys, kv_cache.values
        )
        kv_cache.keys, kv_cache.values = keys, values  # the old ones can be written over: nothing else holds them
        kv_cache.frames += 1
        # it is computed while the depformer's graph is built
        mx.async_eval(hidden, self.text_logits)  # type: ignore[no-untyped-call]
        return hidden

    def _depformer_step(self, hidden: mx.array, given: list[int]) -> tuple[int, Tokens]:
        """Run the depformer steps, which complete the column, and wait for them."""
        self._key, key = mx.random.split(self._key)
        tokens, self.audio_logits = self._depformer(hidden, self.text_logits, mx.array(given, mx.int32), key)
        mx.eval(tokens, self.kv_cache.keys, self.kv_cache.values, self._key)
        self.tokens = np.array(tokens)
        self._target[: len(given)] = self.tokens
        return int(self.tokens[0]), self._columns.advance()[1 : 1 + self.half]


def compilation_progress(silent: bool) -> AbstractContextManager["tqdm[Any]"]:
    """Return what is shown while the prompt is run and a frame is compiled: two steps, and nothing but on a GPU.

    On a GPU MLX compiles each kernel on its first use, which takes up to a minute.
    """
    return long_step("MLX compiles the prompt and a frame", 2, "step", silent or not on_gpu())
