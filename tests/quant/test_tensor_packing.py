"""Packing on a GPU, by what computes it there, on the processor."""

import pytest
import torch
from ppx.quant import tensor_packing
from ppx.quant.affine import BITS, pack
from ppx.quant.tensor_packing import packed, packed_bytes, unpacked, unpacked_bytes


@pytest.mark.parametrize("bits", BITS)
def test_a_gpu_packs_as_the_processor_does(bits, monkeypatch):
    monkeypatch.setattr(tensor_packing, "_WORDS", 7)  # the last part is shorter
    codes = torch.randint(0, 1 << bits, (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    expected = pack(codes.numpy(), bits)
    there = packed_bytes(codes, bits)
    assert (there.numpy().view("<u4") == expected).all()
    assert torch.equal(unpacked_bytes(there, bits), codes)
    assert (packed(codes, bits) == expected).all()
    assert torch.equal(unpacked(expected, bits, "cpu"), codes)
