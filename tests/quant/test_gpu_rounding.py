"""Rounding on a GPU: what calls the kernels, the check before they are used, and, where Triton is, the kernels."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from ppx.quant import rounding
from ppx.quant.affine import STORAGE, QuantizationConfig, Quantized, dequantize
from ppx.quant.column_rounding import round_group
from torch import Tensor

FLOAT16 = np.dtype(np.float16)


def on_processor(adjusted, goal, first, inverse, grids, storage, bits, feedback, scales, biases, codes):
    """Round a group as the kernels do, with what rounds on the processor."""
    quantization = QuantizationConfig(bits, adjusted.shape[1], "gptq")
    scale, bias = rounding.grid(adjusted.numpy(), quantization, storage)
    statistics = np.zeros((-(-len(adjusted) // 64), 2))
    counts = None if feedback is None else feedback.numpy()
    round_group(
        adjusted.numpy(), goal.numpy(), goal.numpy().copy(), first, np.ascontiguousarray(inverse.numpy()),
        grids.numpy(), STORAGE[storage], (1 << bits) - 1, counts, scale, bias, codes.numpy(), statistics,
    )  # fmt: skip
    scales.copy_(torch.from_numpy(scale))
    biases.copy_(torch.from_numpy(bias))


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, the factor of its moments, and what rows make up for."""
    random = torch.Generator().manual_seed(2)
    factor = torch.eye(columns) + torch.randn(columns, columns, generator=random).triu(1) / 16
    feedback = torch.randn(-(-rows // 64), 64, 64, generator=random).triu(1) / 64
    return torch.randn(rows, columns, generator=random), factor, feedback


@pytest.mark.parametrize("with_feedback", [True, False])
def test_a_matrix_on_a_gpu_goes_through_the_steps_of_the_processor(with_feedback):
    goal, factor, feedback = problem(100, 640)
    quantization = QuantizationConfig(4, 64, "gptq")
    rest = (quantization, FLOAT16, feedback if with_feedback else None)
    expected = rounding._on_processor(goal.clone(), goal, factor, *rest)
    found = rounding._on_gpu(on_processor, goal.clone(), goal, factor, *rest)
    assert (found.weight == expected.weight).all()
    assert (found.scales == expected.scales).all()
    assert (found.biases == expected.biases).all()
    assert found.squared_error == pytest.approx(expected.squared_error)


def test_values_that_are_not_finite_are_an_error_as_on_the_processor():
    goal, factor, feedback = problem(64, 128)
    goal[3, 70] = torch.inf

    def kernel(adjusted, *rest):
        if torch.isfinite(adjusted).all():
            return on_processor(adjusted, *rest)
        rest[-3][3] = torch.nan  # the scale, as the kernel computes it
        return None

    for round_on in (rounding._on_processor, lambda *rest: rounding._on_gpu(kernel, *rest)):
        with pytest.raises(ValueError, match="NaN, infinite"):
            round_on(goal.clone(), goal, factor, QuantizationConfig(4, 64, "gptq"), FLOAT16, feedback)


def test_a_kernel_that_works_is_used(caplog):
    assert rounding._works(on_processor, "cpu")
    assert not caplog.text


def test_a_kernel_with_another_result_is_not_used(caplog):
    def broken(*arguments):
        on_processor(*arguments)
        arguments[-1][:, arguments[2] : arguments[2] + 8] ^= 3

    assert not rounding._works(broken, "cpu")
    assert "its loss is" in caplog.text


def test_a_kernel_that_does_not_compile_is_not_used(caplog):
    def broken(*_):
        raise RuntimeError("Failed to find C compiler\nby any name")

    assert not rounding._works(broken, "cpu")
    assert "Failed to find C compiler)" in caplog.text


def test_without_triton_the_processor_rounds(monkeypatch, caplog):
    rounding._gpu_rounder.cache_clear()
    monkeypatch.delitem(sys.modules, "ppx.quant.gpu_rounding", raising=False)
    monkeypatch.delitem(sys.modules, "ppx.quant.gpu_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        assert rounding._gpu_rounder() is None
    finally:
        rounding._gpu_rounder.cache_clear()
    assert not caplog.text


INTERPRETED = """
import numpy as np, torch
from ppx.quant import gpu_rounding, rounding
from ppx.quant.affine import QuantizationConfig, unpack
from test_gpu_rounding import problem

for bits, size, storage in ((4, 32, np.float16), (3, 64, np.float32)):
    goal, factor, feedback = problem(66, 2 * size)
    rest = (QuantizationConfig(bits, size, "gptq"), np.dtype(storage), feedback)
    expected = rounding._on_processor(goal.clone(), goal, factor, *rest)
    found = rounding._on_gpu(gpu_rounding.round_group, goal.clone(), goal, factor, *rest)
    assert np.mean(unpack(found.weight, bits) == unpack(expected.weight, bits)) > 0.9
    assert np.allclose(found.squared_error, expected.squared_error, rtol=0.02)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: PyTorch's builds for GPUs bring it")
def test_the_kernels_come_to_what_the_processor_does(tmp_path):
    """By Triton's interpreter, which needs no GPU."""
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join([str(tmp_path), *sys.path])}
    (tmp_path / "test_gpu_rounding.py").symlink_to(__file__)
    subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, check=True, timeout=600)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, 64), (4, 64), (8, 128)])
def test_a_gpu_comes_to_what_the_processor_does(bits, size):
    goal, factor, feedback = problem(200, 4 * size)
    rest = (QuantizationConfig(bits, size, "gptq"), FLOAT16, feedback)
    expected = rounding._on_processor(goal.clone(), goal, factor, *rest)
    found = rounding.round_columns(goal.cuda(), goal, factor.cuda(), *rest)
    assert rounding._gpu_rounder() is not None

    def loss(rounded: Quantized) -> float:
        back = torch.from_numpy(dequantize(rounded, rest[0]))
        return float(((goal - back) @ factor).square().sum())

    assert loss(found) == pytest.approx(loss(expected), rel=0.01)
