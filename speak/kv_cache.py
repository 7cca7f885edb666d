"""The rotating KV cache of the temporal transformer."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass
class RotatingKVCache:
    """Keys and values ``[1, heads, capacity, head_dim]`` of each temporal layer; frame n is stored at ``n % capacity``.

    The capacity grows up to ``context`` frames; from then on the oldest frame is overwritten.
    """

    keys: list[mx.array]
    values: list[mx.array]
    context: int
    frames: int = 0

    @property
    def capacity(self) -> int:
        """Frames that fit."""
        return int(self.keys[0].shape[2])

    def grow(self) -> None:
        """Double the capacity, up to the context, if the cache is full."""
        if self.frames == self.capacity < self.context:
            more = min(self.capacity, self.context - self.capacity)
            for held in (self.keys, self.values):
                held[:] = [mx.concatenate([old, mx.zeros_like(old[:, :, :more])], axis=2) for old in held]
