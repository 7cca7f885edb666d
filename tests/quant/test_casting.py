import numpy as np
import pytest
from ppx.quant.affine import BFLOAT16, FLOAT16
from ppx.quant.casting import cast, count_non_finite


def test_bfloat16_to_float16_counts_what_does_not_fit():
    array = np.array([1.0, -0.5, 1e5, -3e38, 1e-9, 0.0, 6e-5], BFLOAT16)
    made = cast(array, FLOAT16)
    assert made.array.dtype == FLOAT16
    np.testing.assert_array_equal(made.array[:4], np.array([1.0, -0.5, 65504, -65504], np.float16))
    assert (made.overflowed, made.flushed) == (2, 1)


def test_what_fits_is_exact():
    array = (0.02 * np.random.default_rng(0).standard_normal(10000)).astype(BFLOAT16)
    normal = array[np.abs(array.astype(np.float32)) > 2.0**-14]
    made = cast(normal, FLOAT16)
    np.testing.assert_array_equal(made.array.astype(np.float32), normal.astype(np.float32))
    assert (made.overflowed, made.flushed) == (0, 0)
    assert cast(array, BFLOAT16).array is array


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32])
def test_non_finite_values_are_counted(dtype):
    array = np.ones((4, 8), np.float32)
    assert count_non_finite(array.astype(dtype)) == 0
    array[0, 0], array[1, 1], array[3, 7] = np.nan, np.inf, -np.inf
    assert count_non_finite(array.astype(dtype)) == 3
