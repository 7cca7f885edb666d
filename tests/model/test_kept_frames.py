"""Keys and values of a session: whatever comes at a time, they are the last frames of what came."""

import numpy as np
import torch
from ppx.model.kept_frames import KeptFrames


def test_it_keeps_the_last_frames():
    generator, lengths = torch.Generator().manual_seed(1), np.random.default_rng(1)
    for context in (3, 70, 500):
        kept, whole = KeptFrames(context), torch.zeros(2, 3, 0, 4)
        for _ in range(200):
            new = torch.randn(2, 3, int(lengths.integers(1, 5)), 4, generator=generator)
            before = whole[:, :, -context:]
            whole = torch.cat([whole, new], 2)
            assert torch.equal(kept.extended(new), torch.cat([before, new], 2))
