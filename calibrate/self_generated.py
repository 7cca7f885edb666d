"""Material that the original speaks itself: sessions in which it says both sides.

Half of them begin with a voice and a text prompt, as conversations do, half with nothing, as training data did: what is
drawn from a model's own distribution is what it was trained on, as far as it has learnt it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..convert.errors import UserError
from ..convert.file_names import TOKENIZER, WEIGHTS
from ..convert.progress import bar
from ..convert.source.architecture import Architecture
from ..convert.source.scan import Fingerprint
from ..convert.source.source import Source, fingerprint
from ..convert.source.voices import Voice
from ..convert.tensorfile import TensorFile
from ..model import torch_device as devices
from ..model.forward import Floats, Tokens
from ..model.prompt import prompt_tokens
from ..model.reference import TorchModel, kept_by, reference_of, rows_of
from ..model.session import PAUSE, Frame, sessions, system_prompt
from ..model.tokens import CALIBRATION_FRAMES, CALIBRATION_SESSIONS, SELF_GENERATED, evenly_spaced
from .dataset import write

# What conversations are about. The prompt that a verification reads is not among them.
PROMPTS = (
    "You enjoy having a good conversation. Have a casual discussion about weekend plans and the weather.",
    "You work for a city library and your name is Nora. A card is free; books may be kept for 21 days.",
    "You are a calm nurse on a night line. Ask about the symptoms and say when to see a doctor.",
    "You are an engineer on the radio. Explain to listeners how bridges carry their load, in plain words.",
    "You take orders for a small bakery. Bread is 4 dollars, cakes are 30, and Monday is closed.",
    "You are a travel guide who knows the mountains well and likes to tell old stories.",
)
_KEPT = 0.4  # of the memory that is there, for weights; what does not fit in float32 computes in bfloat16
_ROOM = 0.1  # of it, for keys and values of the sessions that run side by side
_VERSION = 1  # of how they are made
Beginning = tuple[Voice, Sequence[int] | None]  # a voice, and the tokens of a text prompt


def self_generated(
    source: Source,
    path: Path,
    sessions_wanted: int | None = None,
    quiet: bool = False,
    fingerprints: Mapping[str, Fingerprint] | None = None,
) -> Path:
    """Return a file of sessions that a source speaks itself, made if there is none of this source.

    prints: the source's fingerprint, taken here if it is not given. Raises UserError for a file of something else.
    """
    adapter = source.adapter and source.adapter.sha256
    decisive = [
        (fingerprints or fingerprint(source, quiet))[WEIGHTS].sha256,
        adapter,
        sessions_wanted,
        CALIBRATION_FRAMES,
        PROMPTS,
        _VERSION,
    ]
    mark = hashlib.sha256(repr(decisive).encode()).hexdigest()
    if path.exists():
        with closing(TensorFile(path)) as file:
            if file.metadata.get("mark") == mark:
                return path
        raise UserError(f"{path}: is not of this source: move it away, or give it as --calibration if it is meant")
    tokens = speak(source, CALIBRATION_FRAMES, sessions_wanted, quiet)
    source.check_unchanged("sampled")
    write(tokens, path, {"kind": SELF_GENERATED, "mark": mark})
    return path


def speak(source: Source, frames: int, sessions_wanted: int | None = None, quiet: bool = False) -> Tokens:
    """Return so many sessions ``[sessions, streams, frames]`` as heard; the same again on the same machine."""
    a = source.architecture
    texts = [prompt_tokens(source.location.folder / TOKENIZER, a, text) for text in PROMPTS]
    count = sessions_wanted or CALIBRATION_SESSIONS
    begun = [(voice, text) for text in texts for voice in source.voices]
    wanted: list[Beginning] = [begun[index] for index in evenly_spaced(len(begun), (count + 1) // 2)]
    wanted += [(_nobody(a), None)] * (count - len(wanted))
    wanted.sort(key=_lengths)
    made: list[Tokens] = []
    model = _model(source)
    with bar("speaking", len(wanted) * frames, "frame", quiet) as progress, torch.inference_mode():
        for lengths, alike in groupby(wanted, _lengths):
            pairs = list(alike)
            room = 2 * model.dtype.itemsize * a.num_layers * a.dim * min(a.context, sum(lengths) + frames)
            some = max(1, int(_ROOM * devices.memory()) // room)
            for first in range(0, len(pairs), some):
                made.append(_together(model, pairs[first : first + some], frames, len(made), progress))
    return np.concatenate(made)


def _lengths(pair: Beginning) -> tuple[int, int]:
    voice, text = pair
    return len(voice.embeddings), 0 if text is None else len(text) + 2 * PAUSE


def _nobody(architecture: Architecture) -> Voice:
    """Return a voice of no frames, whose ring holds the initial tokens."""
    a = architecture
    cache = np.full((1, 1 + a.n_q, max(a.delays) + 2), a.card, np.int64)
    cache[:, 0] = a.text_card
    return Voice("", np.zeros((0, 1, 1, a.dim), np.float32), cache)


def _model(source: Source) -> TorchModel:
    """Return what speaks: in float32 and held in memory if that fits, else in bfloat16 and held if that does."""
    size, there = source.checkpoint.file.path.stat().st_size, _KEPT * devices.memory()
    dtype = torch.float32 if 2 * size < there else torch.bfloat16
    model = reference_of(source.checkpoint, dtype, devices.device())
    if size < there:
        held = kept_by({}, model.weights, model.device, dtype)
        model = replace(model, weights=held, rows=rows_of(held))
    return replace(model, context=model.context - 1, steps_seen=model.steps_seen - 1)  # as the reference streams


def _together(model: TorchModel, pairs: Sequence[Beginning], frames: int, seed: int, progress: "tqdm[Any]") -> Tokens:
    """Return sessions of voices of one length and prompts of one length, drawn from the model's own distribution."""
    a = model.architecture
    begin = list(zip(*(system_prompt(a, text) if text is not None else [] for _, text in pairs), strict=True))
    late = max(a.delays)  # columns until the last frame is whole

    def given() -> Iterator[Sequence[Frame]]:
        yield from begin
        for number in range(late + frames):
            yield [Frame()] * len(pairs)
            progress.update(len(pairs) if number >= late else 0)

    generator = torch.Generator(model.device).manual_seed(seed)

    def choose(logits: Floats, stream: int) -> Tokens:
        del stream
        if not np.isfinite(logits).all():
            raise UserError(
                f"the source's own predictions are not finite in {str(model.dtype).removeprefix('torch.')}, so it "
                "cannot generate sequences: give recorded conversations as --calibration or --tokens"
            )
        drawn = torch.multinomial(torch.from_numpy(logits).to(model.device).softmax(-1), 1, generator=generator)
        tokens: Tokens = drawn[:, 0].cpu().numpy().astype(np.int32)
        return tokens

    voices = [voice for voice, _ in pairs]
    heard = [[step.tokens for step in steps] for steps in sessions(model, a, voices, given(), choose)]
    return np.stack([np.stack([frame[index] for frame in heard[-frames:]], 1) for index in range(len(pairs))])
