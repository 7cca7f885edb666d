"""Rounding on a GPU: what calls the kernels, the check before they are used, and, where Triton is, the kernels."""

import subprocess
import sys
import threading
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from ppx.quant import rounding
from ppx.quant.affine import QuantizationConfig
from ppx.quant.gptq import Moments, gptq_with_retries
from ppx.quant.packed_matrix import PackedMatrix, unpacked
from torch import Tensor

FLOAT16 = np.dtype(np.float16)


def with_numpy(adjusted, lost, first_group, inverses, trials, storage, bits, feedback, errors, grids, codes):
    """Round a wave of strips as the kernels do."""
    strips, lines, _ = adjusted.shape
    blocks, size, top = errors.shape[1], inverses.shape[1], np.float32((1 << bits) - 1)
    shares, shifts = trials.numpy().T
    for strip in range(max(0, -first_group), min(strips, len(inverses) - first_group)):
        group = first_group + strip
        columns, own = slice(group * size, (group + 1) * size), errors[group % strips].numpy()
        inverse, values = inverses[group].numpy().T, adjusted[strip, :, columns].numpy()
        fitted = rounding.grid(values, QuantizationConfig(bits, size, "gptq"), storage)
        height = lines // blocks
        for row in range(height):
            which, place = np.arange(blocks) * height + row, (strips - 1 - strip) * height + row
            whole, low = (side[which, None].astype(np.float32) for side in fitted)
            scale = (whole * shares).astype(storage).astype(values.dtype)
            bias = (low + whole * (top / 2 * (1 - shares) + shifts)).astype(storage).astype(values.dtype)
            passed = np.einsum("bo,boc->bc", feedback.numpy()[:, :place, place], own[:, :place])
            now = np.repeat(values[which][..., None], len(shares), 2)
            losses, chosen = np.empty_like(now), np.empty_like(now)
            for column in range(size):
                diagonal = inverse[column, column]
                moved = now[:, column] + diagonal * passed[:, column, None]
                chosen[:, column] = np.clip(np.rint((moved - bias) / np.where(scale, scale, 1)), 0, top)
                losses[:, column] = (now[:, column] - (chosen[:, column] * scale + bias)) / diagonal
                now[:, column + 1 :] -= inverse[column, column + 1 :, None] * losses[:, column, None]
            best = ((losses + passed[..., None]) ** 2).sum(1).argmin(1)
            taken = np.arange(blocks), best
            own[:, place] = np.take_along_axis(losses, best[:, None, None], 2)[..., 0]
            code = np.take_along_axis(chosen, best[:, None, None], 2)[..., 0]
            codes[strip].numpy()[which, columns] = code
            lost[strip].numpy()[which, columns] -= code * scale[taken][:, None] + bias[taken][:, None]
            for side, of_side in zip(grids.numpy(), (scale, bias), strict=True):
                side[group, strip * lines + which] = of_side[taken]


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, the factor of its moments, and what rows make up for."""
    random = torch.Generator().manual_seed(2)
    factor = torch.eye(columns) + torch.randn(columns, columns, generator=random).triu(1) / 16
    feedback = torch.randn(-(-rows // 64), 64, 64, generator=random).triu(1) / 64
    return torch.randn(rows, columns, generator=random), factor, feedback


@pytest.mark.parametrize("with_feedback", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(100, 640), (64, 128), (10, 64), (130, 1792)])
def test_a_matrix_on_a_gpu_goes_through_the_steps_of_the_processor(rows, columns, with_feedback):
    goal, factor, feedback = (values.double() for values in problem(rows, columns))  # in float32 many are as good
    quantization = QuantizationConfig(4, 64, "gptq")
    rest = (quantization, FLOAT16, feedback if with_feedback else None)
    expected = rounding._on_processor(goal.clone(), factor, *rest)
    found = rounding._on_gpu(with_numpy, goal.clone(), factor, *rest)
    assert (unpacked(found.weight, 4) == unpacked(expected.weight, 4)).float().mean() > 0.999
    for name in ("scales", "biases"):
        assert (getattr(found, name) == getattr(expected, name)).float().mean() > 0.999
    losses = [loss_of(one, goal, factor, quantization) for one in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def loss_of(rounded: PackedMatrix, goal: Tensor, factor: Tensor, quantization: QuantizationConfig) -> float:
    """The error of a rounded matrix's output."""
    return float(((goal - rounded.dequantized(quantization, "cpu")) @ factor).square().sum())


UNUSABLE = {"nan": [torch.nan], "infinite": [torch.inf], "too far apart": [3e38, -3e38]}


@pytest.mark.parametrize("values", UNUSABLE.values(), ids=UNUSABLE)
def test_values_that_cannot_be_rounded_are_an_error_as_on_the_processor(values):
    goal, factor, feedback = problem(64, 128)
    goal[3, 70 : 70 + len(values)] = torch.tensor(values)

    def kernel(adjusted, *rest):  # which rounds what it can, as those of Triton do
        with_numpy(adjusted.nan_to_num(0.0, 1.0, -1.0).clamp(-10, 10), *rest)

    for round_on in (rounding._on_processor, lambda *rest: rounding._on_gpu(kernel, *rest)):
        with pytest.raises(ValueError, match="NaN, infinite"):
            round_on(goal.clone(), factor, QuantizationConfig(4, 64, "gptq"), FLOAT16, feedback)


def test_a_kernel_that_works_is_used(caplog):
    assert rounding._works(with_numpy, "cpu")
    assert not caplog.text


def test_a_kernel_with_another_result_is_not_used(caplog):
    def broken(*arguments):
        with_numpy(*arguments)
        arguments[-1][..., :8] ^= 3

    assert not rounding._works(broken, "cpu")
    assert "its loss is" in caplog.text


def test_a_kernel_that_does_not_compile_is_not_used(caplog):
    def broken(*_):
        raise RuntimeError("Failed to find C compiler\nby any name")

    assert not rounding._works(broken, "cpu")
    assert "Failed to find C compiler)" in caplog.text


def test_without_triton_the_processor_rounds(monkeypatch, caplog):
    rounding._compiled_and_checked.cache_clear()
    monkeypatch.delitem(sys.modules, "ppx.quant.gpu_rounding", raising=False)
    monkeypatch.delitem(sys.modules, "ppx.quant.gpu_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        assert rounding._gpu_rounder() is None
    finally:
        rounding._compiled_and_checked.cache_clear()
    assert not caplog.text


INTERPRETED = """
import numpy as np, torch
from ppx.quant import gpu_rounding, rounding
from ppx.quant.affine import QuantizationConfig
from ppx.quant.packed_matrix import unpacked
from test_gpu_rounding import loss_of, problem

for bits, size, storage in ((4, 32, np.float16), (3, 64, np.float32)):
    goal, factor, feedback = problem(66, 2 * size)
    rest = (QuantizationConfig(bits, size, "gptq"), np.dtype(storage), feedback)
    expected = rounding._on_processor(goal.clone(), factor, *rest)
    found = rounding._on_gpu(gpu_rounding.round_wave, goal.clone(), factor, *rest)
    assert (unpacked(found.weight, bits) == unpacked(expected.weight, bits)).float().mean() > 0.9
    assert np.allclose(*(loss_of(one, goal, factor, rest[0]) for one in (found, expected)), rtol=0.02)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: PyTorch's builds for GPUs bring it")
def test_the_kernels_come_to_what_the_processor_does(tmp_path):
    """By Triton's interpreter, which needs no GPU."""
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join([str(tmp_path), *sys.path])}
    (tmp_path / "test_gpu_rounding.py").symlink_to(__file__)
    subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, check=True, timeout=600)


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@ON_GPU
@pytest.mark.parametrize(
    ("bits", "size", "groups", "strips"),
    [(2, 32, 4, 16), (3, 64, 4, 16), (4, 64, 28, 16), (4, 64, 28, 4), (8, 128, 4, 16)],
)
def test_a_gpu_comes_to_what_the_processor_does(bits, size, groups, strips, monkeypatch):
    monkeypatch.setattr("ppx.quant.strips._MOST_STRIPS", strips)
    goal, factor, feedback = problem(200, groups * size)
    rest = (QuantizationConfig(bits, size, "gptq"), FLOAT16, feedback)
    expected = rounding._on_processor(goal.clone(), factor, *rest)
    found = rounding.round_columns(goal.cuda(), factor.cuda(), *rest)
    assert rounding._gpu_rounder() is not None
    assert loss_of(found, goal, factor, rest[0]) == pytest.approx(loss_of(expected, goal, factor, rest[0]), rel=0.01)


@ON_GPU
@pytest.mark.parametrize("values", UNUSABLE.values(), ids=UNUSABLE)
def test_values_that_cannot_be_rounded_are_an_error_on_a_gpu(values):
    goal, factor, feedback = problem(64, 128)
    goal[3, 70 : 70 + len(values)] = torch.tensor(values)
    with pytest.raises(ValueError, match="NaN, infinite"):
        rounding.round_columns(goal.cuda(), factor.cuda(), QuantizationConfig(4, 64, "gptq"), FLOAT16, feedback)


@ON_GPU
def test_moments_that_cannot_be_used_are_found_on_a_gpu():
    weight, second = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), torch.eye(128)
    quantization = QuantizationConfig(4, 64, "gptq")
    broken = Moments(second.cuda(), torch.full_like(second, torch.nan).cuda())
    found = gptq_with_retries(weight, broken, quantization, FLOAT16)
    assert (found.damping, found.reason) == (None, "moments are not finite")
    negative = second.clone()
    negative[5, 5] = -0.5
    found = gptq_with_retries(weight, Moments(negative.cuda(), negative.cuda()), quantization, FLOAT16)
    assert (found.damping, found.reason) == (1.0, "the second moments are not positive definite")
    assert found.matrix.weight.is_cuda


def test_a_thread_compiles_for_the_gpu_of_its_process(monkeypatch):
    where: list[int | str] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", where.append)
    monkeypatch.setattr(rounding, "_compiled_and_checked", lambda: where.append(threading.current_thread().name))
    with rounding.compiling("cpu"):
        pass
    assert not where
    with rounding.compiling("cuda"):
        pass
    assert where == [1, "ppx-compile"]
