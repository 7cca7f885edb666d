"""Audio in, audio and text out: a bundle with its model, codec, voice and tokenizer."""

import codecs
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..convert.bundle.reader import Bundle, open_bundle
from ..convert.errors import UserError, printable
from ..convert.file_names import CODEC, CONFIG, TOKENIZER
from ..convert.hints import Hint
from ..convert.source.architecture import read_config
from ..convert.source.tokenizer import open_tokenizer
from ..convert.source.voices import Voice
from ..model.forward import Floats, Tokens
from ..model.matmul import QuantizedMatmul
from ..model.mlx_model import arithmetic_of
from ..model.prompt import PROMPT, VOICE, prompt_tokens
from ..model.session import Frame, no_voice, system_prompt
from . import loader
from .codec import Codec
from .generation import Conversation, compilation_progress
from .kernel_cache import on_tested_kernels
from .recorded_voices import is_path, voice_for_bundle
from .sampling import Sampling, sampling_of


@dataclass(frozen=True)
class SpeakOptions:
    """Voice, text prompt and sampling.

    voice: one of the bundle's, or the file of a recording or of ``ppx-voice``. None for the usual one, or the
    bundle's first. A bundle without voices speaks without one; with an empty prompt its session then begins with
    nothing, as base Moshi's do. consent: of the person in a recording. sampling, codec: None for the bundle's.
    arithmetic: dtype of activations, None for the default of the device.
    """

    voice: str | None = None
    prompt: str = PROMPT
    sampling: Sampling | None = None
    seed: int = 0
    arithmetic: str | None = None
    codec: Path | None = None
    consent: str | None = None


@dataclass(frozen=True)
class OutputFrame:
    """One frame of output. text: a piece of text, often empty. agent: tokens ``[codebooks]``. samples: ``[FRAME]``."""

    text: str
    agent: Tokens
    samples: Floats


@dataclass
class Speaker:
    """A conversation after its prompts. wrapped: whether input tokens were beyond the model's vocabulary."""

    conversation: Conversation
    codec: Codec
    words: "Words"
    wrapped: bool = False

    def answer(self, question: Iterable[Floats]) -> Iterator[OutputFrame]:
        """Take input frames of samples ``[FRAME]`` and yield an output frame for each."""
        card = self.conversation.runtime.architecture.card
        for frame in question:
            user = self.codec.encode(frame)
            self.wrapped |= bool((user >= card).any())
            token, agent = self.conversation.step(user % card)
            yield OutputFrame(self.words.piece(token), agent, self.codec.decode(agent))

    def restart(self, seed: int) -> None:
        """Begin a new conversation, after the same voice and prompt."""
        self.conversation.restart(seed)
        self.codec.reset()
        self.words.reset()


def open_speaker(
    folder: Path, options: SpeakOptions, silent: bool = False, matmul: QuantizedMatmul | None = None
) -> Speaker:
    """Open a bundle and run its prompts; raises UserError if a file is missing or the prompt exceeds the context.

    silent: print no progress. matmul: how packed weights are multiplied, None for MLX's own kernels. Raises CheckFailed
    if an MLX kernel is wrong and has no workaround.
    """
    with closing(open_bundle(folder)) as bundle:
        codec, voice, prompt = _prepared(bundle, options)
        layout = bundle.layout
        model = loader.load(bundle, arithmetic_of(options.arithmetic, bundle.manifest.dtype))
    model = on_tested_kernels(model, silent, matmul)
    sampling = options.sampling or sampling_of(read_config(folder / CONFIG))
    with compilation_progress(silent) as progress:
        conversation = Conversation(model, voice, prompt, sampling, options.seed)
        progress.update()
        conversation.compile()
        progress.update()
    words = Words(folder / layout.target.copies[TOKENIZER], layout.architecture.text_padding)
    return Speaker(conversation, codec, words)


def check_speaker(folder: Path, options: SpeakOptions) -> str:
    """Return the name of the voice that ``open_speaker`` takes, empty for none, before weights are loaded.

    Raises UserError for what that would end with.
    """
    with closing(open_bundle(folder)) as bundle:
        return _prepared(bundle, options)[1].name


def _prepared(bundle: Bundle, options: SpeakOptions) -> tuple[Codec, Voice, list[Frame]]:
    """Return codec, voice and system prompt of a conversation."""
    layout, folder = bundle.layout, bundle.folder
    codec = Codec(options.codec or folder / layout.target.copies[CODEC], layout.architecture.n_q // 2)
    if layout.architecture.steps < layout.architecture.n_q // 2:
        raise UserError(f"{folder}: the depformer has too few steps for the agent's codebooks")
    voice = _voice(bundle, options, codec)
    text = prompt_tokens(folder / layout.target.copies[TOKENIZER], layout.architecture, options.prompt)
    prompt = system_prompt(layout.architecture, text) if voice.name or options.prompt else []
    context = loader.context_of(bundle)
    if len(prompt) >= context:
        most = max(context - 1 - (len(prompt) - len(text)), 0)
        raise UserError(f"the text prompt has {len(text)} tokens: at most {most} fit this model", Hint.SHORTEN_PROMPT)
    return codec, voice, prompt


def _voice(bundle: Bundle, options: SpeakOptions, codec: Codec) -> Voice:
    """Return the voice of a session; raises UserError for one that the bundle does not have."""
    wanted = options.voice
    if wanted and is_path(wanted):
        return voice_for_bundle(bundle, Path(wanted), options.consent, codec)
    voices = bundle.voices()
    by_name = {voice.name: voice for voice in voices}
    if wanted is None:
        return by_name.get(VOICE) or next(iter(voices), no_voice(bundle.architecture))
    if not voices:
        raise UserError(f"voice {wanted}: this bundle has no voices", Hint.WITHOUT_VOICE)
    if wanted not in by_name:
        raise UserError(f"voice {wanted}: not in this bundle, which has {', '.join(by_name)}", Hint.CHOOSE_VOICE)
    return by_name[wanted]


def load(bundle: str | Path, options: SpeakOptions | None = None, *, quiet: bool = True) -> Speaker:
    """Load a bundle for a conversation, with its voice and prompt behind it.

    Example::

        speaker = load("my-bundle", SpeakOptions(voice="NATM1", seed=3))
        for frame in speaker.answer(frames): ...

    quiet: not to announce what takes long. Raises as ``open_speaker`` does.
    """
    return open_speaker(Path(bundle), options or SpeakOptions(), quiet)


class Words:
    """Incremental text decoder."""

    def __init__(self, tokenizer: Path, padding: int) -> None:
        """Open a sentencepiece model."""
        self._processor: Any = open_tokenizer(tokenizer)
        self._padding, self._decoder = padding, codecs.getincrementaldecoder("utf-8")("replace")

    def reset(self) -> None:
        """Forget the bytes of a character that is not complete."""
        self._decoder.reset()

    def piece(self, token: int) -> str:
        """Return the text of a token; bytes are held back until their character is complete."""
        processor = self._processor
        if (
            token == self._padding
            or token >= len(processor)
            or processor.is_control(token)
            or processor.is_unknown(token)
        ):
            return ""
        piece = str(processor.id_to_piece(token))
        if not processor.is_byte(token):
            self._decoder.reset()
            return printable(piece.replace("\u2581", " "))
        text = self._decoder.decode(bytes([int(piece[3:5], 16)]))
        return " " if text.isspace() else printable(text)


def text_of(pieces: Iterable[str]) -> str:
    """Join pieces into one text."""
    return " ".join("".join(pieces).split())
