"""Speech recognizers that run here, all of them optional: what does the answer sound like to a listener?"""

import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from httpx2 import HTTPError

from ..convert.errors import UserError, reason
from ..model.forward import Floats
from .options import EMBEDDED

RATE = 16000  # samples a second, as all of them take them
_WHISPER = "base.en"
_BLOCK = 480  # samples that pocketsphinx looks at together
MISSING = "a round trip needs more packages: pip install 'ppx-convert[audio,round-trip]'"

Transcribe = Callable[[Floats], str]  # samples at RATE -> words


def _pocketsphinx() -> Transcribe:
    from pocketsphinx import Decoder, Segmenter

    decoder = Decoder(samprate=RATE)

    def transcribe(samples: Floats) -> str:
        silence = RATE // 2 + (_BLOCK // 2 - len(samples) - RATE // 2) % _BLOCK  # a whole number of blocks has no end
        padded = np.pad(samples, (0, silence))
        raw = (np.clip(padded, -1, 1) * 32767).astype("<i2").tobytes()
        words = []
        for segment in Segmenter(sample_rate=RATE).segment(io.BytesIO(raw)):
            decoder.start_utt()
            decoder.process_raw(segment.pcm, full_utt=True)
            decoder.end_utt()
            hypothesis = decoder.hyp()
            words += [hypothesis.hypstr] if hypothesis else []
        return " ".join(words)

    return transcribe


def _faster_whisper() -> Transcribe:
    from faster_whisper import WhisperModel

    model: Any = WhisperModel(_WHISPER)
    return lambda samples: " ".join(segment.text for segment in model.transcribe(samples, language="en")[0])


def _mlx_whisper() -> Transcribe:
    import mlx_whisper

    repository = f"mlx-community/whisper-{_WHISPER}-mlx"
    mlx_whisper.transcribe(np.zeros(RATE, np.float32), path_or_hf_repo=repository)  # loads it
    return lambda samples: str(mlx_whisper.transcribe(samples, path_or_hf_repo=repository, language="en")["text"])


_LOADERS = {"mlx-whisper": _mlx_whisper, "faster-whisper": _faster_whisper, EMBEDDED: _pocketsphinx}


def load(name: str = EMBEDDED) -> Transcribe:
    """Return a recognizer by its package's name; raises UserError if it is not installed, or does not load.

    Whispers take their model from the Hub or its cache.
    """
    module = name.replace("-", "_")
    if find_spec(module) is None:
        raise UserError(MISSING if name == EMBEDDED else f"recognizer {name}: not installed: pip install {name} first")
    try:
        return _LOADERS[name]()
    except (ImportError, OSError, RuntimeError, ValueError, HTTPError) as error:
        raise UserError(f"recognizer {name}: does not load ({reason(error)})") from None
