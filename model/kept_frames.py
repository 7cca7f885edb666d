"""Keys and values that PyTorch's forward pass keeps of a session."""

from torch import Tensor

_GROWTH = 64  # frames


class KeptFrames:
    """Keys or values of a session, ``[batch, heads, frames, head]``: the last ``context`` of them are kept.

    In a buffer that grows by _GROWTH frames: one that grew with each frame would be copied each time, and leave memory
    in pieces of ever new sizes, which took 3.6 times as much.
    """

    def __init__(self, context: int) -> None:
        """Begin with none."""
        self._context, self._begin, self._end = context, 0, 0
        self._buffer: Tensor | None = None

    def extended(self, new: Tensor) -> Tensor:
        """Add frames; return those kept before them, and them."""
        length = new.shape[2]
        if self._buffer is None or self._end + length > self._buffer.shape[2]:
            kept = new[:, :, :0] if self._buffer is None else self._buffer[:, :, self._begin : self._end]
            self._begin, self._end = 0, kept.shape[2]
            batch, heads, _, size = new.shape
            self._buffer = new.new_empty(batch, heads, self._end + length + min(_GROWTH, self._context), size)
            self._buffer[:, :, : self._end] = kept
        self._buffer[:, :, self._end : self._end + length] = new
        self._end += length
        seen = self._buffer[:, :, self._begin : self._end]
        self._begin = max(self._begin, self._end - self._context)
        return seen
