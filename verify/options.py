"""What a verification is asked to do."""

from dataclasses import dataclass
from pathlib import Path

from ..convert.errors import UserError
from ..model.mlx_device import ARITHMETICS
from ..quant.affine import BITS

EMBEDDED = "pocketsphinx"  # the recognizer that comes with a small model of its own
RECOGNIZERS = (EMBEDDED, "faster-whisper", "mlx-whisper")


@dataclass(frozen=True)
class VerifyOptions:
    """How to verify. tokens, audio: files to read instead of the system prompt. rollout: frames of a greedy session.

    sequences, frames: at most so many of each; None for all, or as many as are usual for the system prompt.
    arithmetic: of the bundle's activations, ``float32``, or ``bundle`` for its own dtype. device: None for MLX's
    choice. controls: bits at which the checkpoint is rounded for comparison, beside the bundle's own.
    """

    tokens: Path | None = None
    audio: Path | None = None
    sequences: int | None = None
    frames: int | None = None
    rollout: int = 0
    arithmetic: str = ARITHMETICS[0]
    device: str | None = None
    controls: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise UserError for bits that nothing is rounded to."""
        if wrong := [bits for bits in self.controls if bits not in BITS]:
            raise UserError(f"controls of {wrong[0]} bit: use {', '.join(map(str, BITS))}")
