"""Quantized matrices as tensors; packing on a GPU, by what computes it there, on the processor."""

import numpy as np
import pytest
import torch
from ppx.quant import packed_matrix
from ppx.quant.affine import BITS, QuantizationConfig, dequantize, pack, quantize
from ppx.quant.packed_matrix import packed, packed_on_device, unpacked, unpacked_on_device


@pytest.mark.parametrize("bits", BITS)
def test_a_gpu_packs_as_the_processor_does(bits, monkeypatch):
    monkeypatch.setattr(packed_matrix, "_WORDS", 7)  # the last part is shorter
    codes = torch.randint(0, 1 << bits, (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    expected = pack(codes.numpy(), bits)
    there = packed_on_device(codes, bits)
    assert (there.numpy().view("<u4") == expected).all()
    assert torch.equal(unpacked_on_device(there, bits), codes)
    assert torch.equal(packed(codes, bits), there)
    assert torch.equal(unpacked(there, bits), codes)


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_matrix_as_tensors_is_the_same(storage, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if storage == "bfloat16" else storage)
    weight = np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32)
    quantization = QuantizationConfig(3, 32)
    made = quantize(weight, quantization, dtype)
    tensors = packed_matrix.packed_matrix(made)
    assert np.array_equal(tensors.dequantized(quantization, device).cpu().numpy(), dequantize(made, quantization))
    back = tensors.quantized(dtype)
    for name in ("weight", "scales", "biases"):
        assert getattr(back, name).dtype == getattr(made, name).dtype
        assert (getattr(back, name) == getattr(made, name)).all()
