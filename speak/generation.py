"""A conversation with a bundle, as a user has it: prompts in one go, then a frame in, a frame out."""

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
    """A session under way, from the end of its prompts on.

    Of the last frame there are the column that was read, ``[streams]``, what was said, ``[1 + steps]``, text_logits
    ``[text_card]`` and audio_logits ``[steps, card]``.
    """

    runtime: Runtime
    voice: Voice
    prompt: Sequence[Frame]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0

    def __post_init__(self) -> None:
        """Go through the voice and the prompt."""
        self.half = self.runtime.architecture.n_q // 2
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
        self._temporal, self._depformer = self.runtime.temporal(), self.runtime.depformer(self.sampling)

    def compile(self) -> None:
        """Compute a frame without input and discard it, so that its functions are compiled.

        What it writes into the keys and values, the frame itself writes over.
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
        """Take the user's tokens of a frame; return what is said in it: a text token, and the newest whole agent frame.

        The agent's codebooks ``[codebooks]`` lie one frame back: the later ones follow the first with that delay.
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
        """Return the column to read, and what is given of the one to complete, UNKNOWN where nothing is."""
        self.column, target, held = self._columns.give(Frame(user=[int(token) for token in user]))
        self._target = target
        streams = range(1 + len(self.runtime.steps))
        return self.column, [int(target[stream]) if stream in held else UNKNOWN for stream in streams]

    def _temporal_step(self, column: Tokens) -> mx.array:
        """Let the temporal transformer go on by a frame; return its output, which is being computed."""
        kv_cache = self.kv_cache
        kv_cache.grow()
        number = mx.array(kv_cache.frames)
        hidden: mx.array
        hidden, self.text_logits, keys, values = self._temporal(
            mx.array(column), number, kv_cache.keys, kv_cache.values
        )
        kv_cache.keys, kv_cache.values = keys, values  # the old ones can be written over: nothing else holds them
        kv_cache.frames += 1
        # it is computed while the depformer's operations are put together
        mx.async_eval(hidden, self.text_logits)  # type: ignore[no-untyped-call]
        return hidden

    def _depformer_step(self, hidden: mx.array, given: list[int]) -> tuple[int, Tokens]:
        """Let the depformer complete the column, and wait for it."""
        self._key, key = mx.random.split(self._key)
        said, self.audio_logits = self._depformer(hidden, self.text_logits, mx.array(given, mx.int32), key)
        mx.eval(said, self.kv_cache.keys, self.kv_cache.values, self._key)
        self.said = np.array(said)
        self._target[: len(given)] = self.said
        return int(self.said[0]), self._columns.advance()[1 : 1 + self.half]


def compilation_progress(silent: bool) -> AbstractContextManager["tqdm[Any]"]:
    """Return what is shown while the prompt is run and a frame is compiled: two steps, and nothing but on a GPU.

    On a GPU MLX compiles each kernel on its first use, which takes up to a minute.
    """
    return long_step("MLX compiles the prompt and a frame", 2, "step", silent or not on_gpu())
