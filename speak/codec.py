"""Mimi, the audio codec, through the optional ``rustymimi``, one frame at a time."""

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..convert.errors import UserError, reason, refuse
from ..convert.source.scan import non_finite
from ..convert.tensorfile import TensorFile
from ..model.forward import Floats, Tokens

MISSING = "needs more packages: pip install 'ppx-convert[audio]'"
_FEW = 10  # tensors, which no Mimi has; a demo's stand-in has two


class Codec:
    """A streaming codec; encoder and decoder keep their state between frames."""

    def __init__(self, path: Path, codebooks: int) -> None:
        """Load a file of Mimi's weights; raises UserError for any other, and without the package."""
        try:
            import rustymimi
        except ImportError:
            raise UserError(f"audio {MISSING}") from None
        self.path = path
        with closing(TensorFile(path)) as file:
            refuse(file.header_problems())
            damaged = non_finite(file)
            self._tensors = len(file.specs)
        refuse([f"{path}: {name}: {n} values are NaN or infinite: it is damaged" for name, n in damaged.items()])
        self._open = partial(rustymimi.Tokenizer, str(path), num_codebooks=codebooks)
        self._tokenizer: Any = None
        self._fresh = False
        self.reset()

    def reset(self) -> None:
        """Clear the state of encoder and decoder: the same sound gets the same tokens as at first.

        Loads the weights again if they were used: after its own ``reset``, rustymimi 0.4 can give other tokens for the
        same sound. Raises UserError for a file that it does not load.
        """
        if self._fresh:
            return
        try:
            self._tokenizer = self._open()
        except (OSError, RuntimeError, ValueError) as error:
            stand_in = "a demo's stand-in; the source demo:audio has a whole codec"
            why = stand_in if self._tensors < _FEW else reason(error)
            raise UserError(f"{self.path}: not a codec that rustymimi loads ({why})") from None
        self._fresh = True

    def encode(self, samples: Floats) -> Tokens:
        """Return the tokens ``[codebooks]`` of a frame's samples ``[FRAME]``."""
        self._fresh = False
        try:
            codes = self._tokenizer.encode_step(np.ascontiguousarray(samples, np.float32)[None, None])
        except (RuntimeError, ValueError) as error:
            raise self._failed(error) from None
        return np.asarray(codes[0, :, 0], np.int32)

    def decode(self, tokens: Tokens) -> Floats:
        """Return the samples ``[FRAME]`` of a frame's tokens ``[codebooks]``."""
        self._fresh = False
        try:
            samples = self._tokenizer.decode_step(np.asarray(tokens, np.uint32)[None, :, None])
        except (RuntimeError, ValueError) as error:
            raise self._failed(error) from None
        return np.asarray(samples[0, 0], np.float32)

    def encode_whole(self, samples: Floats) -> NDArray[np.int64]:
        """Return the tokens ``[codebooks, frames]`` of a whole recording ``[samples]``, from a fresh state."""
        self.reset()
        self._fresh = False
        try:
            return np.asarray(self._tokenizer.encode(samples[None, None])[0], np.int64)
        except (RuntimeError, ValueError) as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: fails ({reason(error)}): does it belong to this model?")
