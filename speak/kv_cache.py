"""Keys and values of the frames that a conversation remembers."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass
class RotatingKVCache:
    """Keys and values ``[1, heads, room, width]`` of each temporal layer; frame n lies at ``n % room``.

    room grows up to ``reach``, the frames that are attended to; from then on the oldest is overwritten.
    """

    keys: list[mx.array]
    values: list[mx.array]
    reach: int
    frames: int = 0

    @property
    def room(self) -> int:
        """Frames that it has room for."""
        return int(self.keys[0].shape[2])

    def grow(self) -> None:
        """Make room for one more frame, if there is none and there may be."""
        if self.frames == self.room < self.reach:
            more = min(self.room, self.reach - self.room)
            for held in (self.keys, self.values):
                held[:] = [mx.concatenate([old, mx.zeros_like(old[:, :, :more])], axis=2) for old in held]
