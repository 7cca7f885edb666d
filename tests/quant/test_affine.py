"""The quantizers, against mx.quantize as the oracle."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from ppx.quant.affine import (
    BFLOAT16,
    BITS,
    FLOAT16,
    FLOAT32,
    GROUP_SIZES,
    QuantizationConfig,
    Quantized,
    dequantize,
    quantize,
    round_into,
    unpack,
)

DTYPES = {"bfloat16": (BFLOAT16, mx.bfloat16), "float16": (FLOAT16, mx.float16), "float32": (FLOAT32, mx.float32)}
MLX = dict(DTYPES.values())


def oracle(weight: NDArray[Any], quantization: QuantizationConfig) -> tuple[NDArray[Any], ...]:
    """Words, scales and biases of mx.quantize on the CPU; scales and biases as float32, which holds them exactly."""
    with mx.stream(mx.cpu):
        theirs = mx.array(weight.astype(np.float32)).astype(MLX[weight.dtype])
        words, scales, biases = mx.quantize(theirs, group_size=quantization.group_size, bits=quantization.bits)
        return tuple(np.array(x.astype(mx.float32) if x.dtype != mx.uint32 else x) for x in (words, scales, biases))


def assert_equals_mlx(weight: NDArray[Any], quantization: QuantizationConfig) -> None:
    ours = quantize(weight, quantization)
    words, scales, biases = oracle(weight, quantization)
    for name, mine, theirs in (
        ("words", ours.weight, words),
        ("scales", ours.scales, scales),
        ("biases", ours.biases, biases),
    ):
        different = np.argwhere(mine.astype(theirs.dtype) != theirs)
        assert not len(different), f"{len(different)} {name} differ, first at {different[0]}"


def interesting(dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """Rows of every kind of group that has its own path through the arithmetic."""
    random = np.random.default_rng(1)
    normal = 0.02 * random.standard_normal((8, 4 * size))
    rows = [
        normal,
        np.zeros((1, 4 * size)),
        np.full((1, 4 * size), 0.37),
        np.full((1, 4 * size), -1.5),
        np.abs(normal[:2]) + 0.5,
        -np.abs(normal[:2]) - 0.5,
        np.where(np.arange(4 * size) % size == 3, 40.0, normal[:1]),
        np.where(np.arange(4 * size) % size == 5, 1.0, 0.0)[None],
        normal[:1] * 1e-4,
        np.where(random.random((2, 4 * size)) < 0.5, -0.25, 0.25),
    ]
    return np.concatenate(rows).astype(dtype)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rtn_is_bit_exact_with_mlx(dtype, bits, group_size):
    assert_equals_mlx(interesting(DTYPES[dtype][0], group_size), QuantizationConfig(bits, group_size, "rtn"))


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 128), elements=st.floats(-(2.0**14), 2.0**14, width=16)),
    st.sampled_from(BITS),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from([BFLOAT16, FLOAT16, FLOAT32]),
)
def test_rtn_is_bit_exact_on_whatever_comes(weight, bits, group_size, dtype):
    assert_equals_mlx(weight.astype(dtype), QuantizationConfig(bits, group_size, "rtn"))


def test_storage_dtype_is_a_rounding_of_what_mlx_finds_in_float32():
    weight = interesting(BFLOAT16, 64)
    ours = quantize(weight, QuantizationConfig(4, 64, "rtn"), FLOAT16)
    words, scales, biases = oracle(weight.astype(np.float32), QuantizationConfig(4, 64, "rtn"))
    assert ours.scales.dtype == FLOAT16
    np.testing.assert_array_equal(ours.weight, words)
    np.testing.assert_array_equal(ours.scales, scales.astype(np.float16))
    np.testing.assert_array_equal(ours.biases, biases.astype(np.float16))


@pytest.mark.parametrize("method", ["rtn", "lsq"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_dequantizes_what_we_do(bits, group_size, method):
    quantization = QuantizationConfig(bits, group_size, method)
    ours = quantize(interesting(FLOAT32, group_size), quantization)
    with mx.stream(mx.cpu):
        words, scales, biases = (mx.array(x) for x in (ours.weight, ours.scales, ours.biases))
        theirs = np.array(mx.dequantize(words, scales, biases, group_size=group_size, bits=bits))
    np.testing.assert_allclose(dequantize(ours, quantization), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert unpack(ours.weight, bits).max() < 1 << bits


def squared_errors(
    weight: NDArray[Any], quantization: QuantizationConfig, storage: np.dtype[Any]
) -> tuple[NDArray[np.float64], Quantized]:
    """Squared error of each group in float64, from the packed result; and the result."""
    made = quantize(weight, quantization, storage)
    codes = unpack(made.weight, quantization.bits).astype(np.float64).reshape(len(weight), -1, quantization.group_size)
    restored = codes * made.scales.astype(np.float64)[..., None] + made.biases.astype(np.float64)[..., None]
    return ((restored - weight.astype(np.float64).reshape(codes.shape)) ** 2).sum(-1), made


@pytest.mark.parametrize("storage", [BFLOAT16, FLOAT16, FLOAT32])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_lsq_is_never_worse_than_rtn_on_any_group(bits, group_size, storage):
    random = np.random.default_rng(2)
    heavy = 0.02 * random.standard_t(3, (64, 4 * group_size))
    weight = np.concatenate([interesting(BFLOAT16, group_size), heavy.astype(BFLOAT16)])
    best, _ = squared_errors(weight, QuantizationConfig(bits, group_size, "lsq"), storage)
    plain, _ = squared_errors(weight, QuantizationConfig(bits, group_size, "rtn"), storage)
    assert np.all(best <= plain * (1 + 1e-12))
    ordinary = len(weight) - len(heavy)  # and better on most groups of the heavy-tailed rows
    assert np.mean(best[ordinary:] < plain[ordinary:]) > 0.75


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 128), elements=st.floats(-(2.0**14), 2.0**14, width=16)),
    st.sampled_from(BITS),
    st.sampled_from([BFLOAT16, FLOAT16, FLOAT32]),
)
def test_lsq_is_never_worse_on_whatever_comes(weight, bits, storage):
    best, made = squared_errors(weight, QuantizationConfig(bits, 32, "lsq"), storage)
    plain, _ = squared_errors(weight, QuantizationConfig(bits, 32, "rtn"), storage)
    assert np.all(best <= plain * (1 + 1e-12))
    assert made.squared_error == pytest.approx(best.sum(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("storage", [BFLOAT16, FLOAT16])
def test_lsq_at_4_bit_is_7_percent_better_on_gaussian_weights(storage):
    weight = (0.02 * np.random.default_rng(3).standard_normal((512, 1024))).astype(BFLOAT16)
    best = quantize(weight, QuantizationConfig(4, 64, "lsq"), storage)
    plain = quantize(weight, QuantizationConfig(4, 64, "rtn"), storage)
    assert best.relative_rmse <= 0.93 * plain.relative_rmse


def test_reported_error_is_that_of_the_packed_result():
    weight = interesting(BFLOAT16, 64)
    errors, made = squared_errors(weight, QuantizationConfig(4, 64, "lsq"), FLOAT16)
    assert made.squared_error == pytest.approx(errors.sum(), rel=1e-9)
    assert made.squared_norm == pytest.approx((weight.astype(np.float64) ** 2).sum(), rel=1e-9)


def test_a_matrix_of_zeros_stays_one():
    made = quantize(np.zeros((2, 64), BFLOAT16), QuantizationConfig(4, 64, "lsq"))
    assert made.relative_rmse == 0
    assert not dequantize(made, QuantizationConfig(4, 64)).any()


@pytest.mark.parametrize("method", ["rtn", "lsq"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused(dtype, bad, method):
    weight = np.ones((3, 128), np.float32)
    weight[1, 70] = bad
    with pytest.raises(ValueError, match="1 groups hold values that are NaN, infinite"):
        quantize(weight.astype(DTYPES[dtype][0]), QuantizationConfig(4, 64, method))


def test_a_group_that_spans_more_than_float32_holds_is_refused():
    weight = np.zeros((1, 64), np.float32)
    weight[0, :2] = 3e38, -3e38
    for method in ("rtn", "lsq"):
        with pytest.raises(ValueError, match="too far apart"):
            quantize(weight, QuantizationConfig(4, 64, method))


@pytest.mark.parametrize(
    ("quantization", "shape", "message"),
    [
        (QuantizationConfig(4, 64), (2, 96), "rows of 96 weights are not divided by groups of 64"),
        (QuantizationConfig(7, 64), (2, 64), "bits is 7: use one of 2, 3, 4, 5, 6, 8"),
        (QuantizationConfig(4.0, 64), (2, 64), "bits is 4.0: use one of"),  # type: ignore[arg-type]  # what a file may hold
        (QuantizationConfig(4, 16), (2, 64), "group_size is 16: use one of 32, 64, 128"),
        (QuantizationConfig(4, 64, "best"), (2, 64), "method is 'best': use one of mse, rtn"),
        (QuantizationConfig(4, 64), (64,), "give a matrix"),
    ],
)
def test_settings_that_the_format_does_not_have(quantization, shape, message):
    with pytest.raises(ValueError, match=message):
        quantize(np.zeros(shape, np.float32), quantization)


def test_scales_beyond_float16_are_counted_and_stay_finite():
    weight = np.full((1, 64), 0.0, np.float32)
    weight[0, 0], weight[0, 1] = 1e6, -1e6
    made = quantize(weight, QuantizationConfig(4, 64, "rtn"), FLOAT16)
    assert made.overflowed == 2
    assert np.isfinite(made.scales).all()
    assert np.isfinite(made.biases).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("storage", [BFLOAT16, FLOAT16, np.dtype(np.float32)])
def test_rounding_in_one_pass_is_quantizing_and_dequantizing(bits, size, storage):
    weight = np.random.default_rng(bits).standard_normal((9, 384), np.float32).astype(BFLOAT16)
    quantization = QuantizationConfig(bits, size, "rtn")
    values = np.empty(weight.shape, np.float32)
    round_into(values, weight, bits, size, storage)
    np.testing.assert_array_equal(values, dequantize(quantize(weight, quantization, storage), quantization))


def test_rounding_refuses_what_quantizing_refuses():
    values = np.empty((2, 64), np.float32)
    with pytest.raises(ValueError, match="cannot be rounded in groups of 64"):
        round_into(values[:, :63], np.zeros((2, 63), np.float32), 4, 64, FLOAT16)
    with pytest.raises(ValueError, match="1 groups hold values that are NaN"):
        round_into(values, np.where(np.arange(128).reshape(2, 64) == 5, np.nan, 1).astype(np.float32), 4, 64, FLOAT16)
