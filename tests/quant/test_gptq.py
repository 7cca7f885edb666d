"""Second-order rounding, against what a search over all codes finds, and against the textbook."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from ppx.quant import gptq, rounding
from ppx.quant.affine import QuantizationConfig, Quantized, dequantize, pack, quantize, unpack
from ppx.quant.gptq import Inputs, Moments, gptq_with_retries
from torch import Tensor

STORAGE = np.dtype(np.float32)


def layer(
    seed: int, rows: int = 16, columns: int = 128, samples: int = 400, drift: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, and inputs of the original and of the quantized model, whose columns hang together."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random, dtype=torch.float64) / columns**0.5
    x = torch.randn(samples, columns, generator=random, dtype=torch.float64) @ mix
    seen = x + drift * torch.randn(samples, columns, generator=random, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=random, dtype=torch.float64)
    return weight, x, seen


def moments(x: Tensor, seen: Tensor) -> Moments:
    return Moments(seen.T @ seen, x.T @ seen, frames=len(seen))


def output_error(weight: Tensor, x: Tensor, seen: Tensor, made: Quantized, quantization: QuantizationConfig) -> float:
    back = torch.from_numpy(dequantize(made, quantization)).double()
    return float((x @ weight.T - seen @ back.T).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("columns", [32, 96, 256])
def test_packing_is_the_inverse_of_unpacking(bits, columns):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (7, columns)).astype(np.uint8)
    assert (unpack(pack(codes, bits), bits) == codes).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_it_keeps_outputs_better_than_least_squares_on_weights(bits, group_size):
    quantization = QuantizationConfig(bits, group_size, "gptq")
    for seed in range(3):
        weight, x, seen = layer(seed)
        made = gptq.gptq(weight, moments(x, seen), quantization, STORAGE)
        plain = quantize(weight.float().numpy(), QuantizationConfig(bits, group_size, "lsq"), STORAGE)
        bound = output_error(weight, x, seen, plain, quantization)
        unavoidable = float((x @ weight.T - seen @ torch.linalg.lstsq(seen, x @ weight.T).solution).square().sum())
        assert output_error(weight, x, seen, made, quantization) - unavoidable < 0.75 * (bound - unavoidable)


def textbook(weight: Tensor, damped: Tensor, quantization: QuantizationConfig, ratios: Tensor | None = None) -> Tensor:
    """Codes by the same steps without any shortcut: each grid rounds a row's group on its own, and the best is kept.

    ratios: by how much the error of a row counts for a later one, ``[rows, rows]``.
    """
    size, top = quantization.group_size, (1 << quantization.bits) - 1
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    now, codes, lost = weight.clone(), torch.zeros(weight.shape), torch.zeros_like(weight)
    for first in range(0, weight.shape[1], size):
        group = slice(first, first + size)
        scales, biases = map(torch.from_numpy, rounding.grid(now[:, group].numpy(), quantization, STORAGE))
        for row in range(len(weight)):
            passed = torch.zeros(size, dtype=weight.dtype) if ratios is None else ratios[:row, row] @ lost[:row, group]
            best: tuple[float, Tensor, Tensor, Tensor] | None = None
            for factor, shift in rounding.GRIDS:
                scale = (scales[row] * float(np.float32(factor))).float().double()
                bias = (biases[row] + scales[row] * (top / 2 * (1 - factor) + shift)).float().double()
                values, errors, chosen = now[row].clone(), torch.zeros_like(passed), torch.zeros(size)
                for index in range(size):
                    column = first + index
                    diagonal = upper[column, column]
                    code = ((values[column] + diagonal * passed[index] - bias) / scale).round().clamp(0, top)
                    errors[index], chosen[index] = (values[column] - (code * scale + bias)) / diagonal, code
                    values[column:] -= errors[index] * upper[column, column:]
                total = float((errors + passed).square().sum())
                if best is None or total < best[0]:
                    best = (total, values, errors, chosen)
            assert best is not None
            _, now[row], lost[row, group], codes[row, group] = best
    return codes


def agreement(made: Quantized, bits: int, codes: Tensor) -> float:
    """The share of equal codes: a tie of two grids may go either way."""
    return float((torch.from_numpy(unpack(made.weight, bits)) == codes).double().mean())


def damped_moments(x: Tensor) -> Tensor:
    second = x.T @ x
    return second + gptq.DAMPING * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)


def test_it_rounds_as_the_textbook_does():
    weight, x, _ = layer(5, rows=4, columns=64)
    quantization = QuantizationConfig(3, 32, "gptq")
    made = gptq.gptq(weight, Moments(x.T @ x, x.T @ x), quantization, STORAGE)
    assert agreement(made, 3, textbook(weight, damped_moments(x), quantization)) == 1


def test_columns_beyond_one_product_are_rounded_as_the_textbook_does():
    """More columns than share one product: the error of the first reaches the last."""
    weight, x, _ = layer(6, rows=3, columns=1088, samples=1500)
    quantization = QuantizationConfig(4, 64, "gptq")
    made = gptq.gptq(weight, Moments(x.T @ x, x.T @ x), quantization, STORAGE)
    assert agreement(made, 4, textbook(weight, damped_moments(x), quantization)) > 0.999


def output_gradients(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Gradients whose rows hang together, and their second moments by blocks of 64 rows."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(rows, rows, generator=random, dtype=torch.float64)
    g = torch.randn(600, rows, generator=random, dtype=torch.float64) @ mix
    padded = torch.nn.functional.pad(g, (0, -rows % 64)).reshape(len(g), -1, 64)
    return g, torch.einsum("fbi,fbj->bij", padded, padded)


def test_rows_make_up_for_each_other_as_the_textbook_does():
    weight, x, _ = layer(7, rows=70, columns=64)
    quantization = QuantizationConfig(3, 32, "gptq")
    _, gradients = output_gradients(0, 70)
    made = gptq.gptq(weight, Moments(x.T @ x, x.T @ x), quantization, STORAGE, gradients=gradients)
    ratios = torch.zeros(70, 70, dtype=torch.float64)
    for first, block in zip((0, 64), gradients, strict=True):
        mean = block.diagonal().mean()
        loaded = block / mean + 0.3 * torch.eye(64, dtype=torch.float64)
        # U of F = U U^T is the inverse of the upper factor of the inverse of F.
        lower = torch.linalg.cholesky(torch.linalg.inv(loaded))
        upper = torch.linalg.inv(lower).T
        height = min(64, 70 - first)
        ratios[first : first + height, first : first + height] = (upper / upper.diagonal())[:height, :height].triu(1)
    assert agreement(made, 3, textbook(weight, damped_moments(x), quantization, ratios)) > 0.999


def test_gradients_leave_less_of_what_matters():
    """The loss of errors E of the outputs is the sum of (g E)^2 over gradients g."""
    quantization, ratios = QuantizationConfig(3, 32, "gptq"), []
    for seed in range(4):
        weight, x, seen = layer(seed, rows=64, drift=0)
        g, gradients = output_gradients(seed, 64)
        losses = []
        for given in (gradients, None):
            made = gptq.gptq(weight, moments(x, seen), quantization, STORAGE, gradients=given)
            error = torch.from_numpy(dequantize(made, quantization)).double() - weight
            losses.append(float((g @ error @ x.T).square().sum()))
        ratios.append(losses[0] / losses[1])
    assert max(ratios) < 0.8, ratios


def test_gradients_that_say_nothing_change_nothing():
    quantization = QuantizationConfig(4, 32, "gptq")
    weight, x, seen = layer(3, rows=70)
    plain = gptq.gptq(weight, moments(x, seen), quantization, STORAGE)
    for value in (0.0, torch.nan, torch.inf):
        made = gptq.gptq(weight, moments(x, seen), quantization, STORAGE, gradients=torch.full((2, 64, 64), value))
        assert (made.weight == plain.weight).all()


def test_more_grids_leave_less_error(monkeypatch):
    quantization, ratios, several = QuantizationConfig(4, 64, "gptq"), [], rounding.GRIDS
    assert (1.0, 0) in several
    for seed in range(4):
        weight, x, seen = layer(seed, rows=64, drift=0)
        errors = []
        for grids in (several, 32 * ((1.0, 0.0),)):
            monkeypatch.setattr(rounding, "GRIDS", grids)
            made = gptq.gptq(weight, moments(x, seen), quantization, STORAGE)
            errors.append(output_error(weight, x, seen, made, quantization))
        ratios.append(errors[0] / errors[1])
    assert max(ratios) < 0.95, ratios


@pytest.mark.parametrize("samples", [40, 400])
@pytest.mark.parametrize("rows", [16, 300])
def test_inputs_give_what_their_moments_give(samples, rows):
    """Few frames or many, more rows than columns or fewer: four orders of computing the same."""
    weight, x, seen = layer(3, rows=rows, columns=128, samples=samples)
    quantization = QuantizationConfig(4, 32, "gptq")
    by_inputs = gptq.gptq(weight, Inputs(x, seen), quantization, STORAGE)
    by_moments = gptq.gptq(weight, moments(x, seen), quantization, STORAGE)
    codes = [unpack(made.weight, 4) for made in (by_inputs, by_moments)]
    assert (codes[0] == codes[1]).mean() > 0.999
    narrow = gptq.gptq(weight.float(), Inputs(x.float(), seen.float()), quantization, STORAGE)
    errors = [output_error(weight, x, seen, made, quantization) for made in (narrow, by_moments)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    with pytest.raises(ValueError, match="not finite"):
        gptq.gptq(weight, Inputs(x * torch.nan, seen), quantization, STORAGE)


def test_what_is_prepared_serves_every_matrix_that_reads_the_same():
    weight, x, seen = layer(4, rows=48)
    quantization, prepared = QuantizationConfig(4, 32, "gptq"), dict[float, gptq.Prepared]()
    parts = [gptq_with_retries(part, Inputs(x, seen), quantization, STORAGE, prepared) for part in weight.split(16)]
    assert list(prepared) == [gptq.usual_damping(Inputs(x, seen))]
    whole = gptq.gptq(weight, Inputs(x, seen), quantization, STORAGE)
    together = np.concatenate([unpack(part.matrix.quantized(STORAGE).weight, 4) for part in parts])
    assert (together == unpack(whole.weight, 4)).mean() > 0.999


@pytest.mark.parametrize("columns", [64, 1024, 1100])
def test_a_symmetric_product_is_the_whole_one(columns):
    x = torch.randn(8, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(columns, columns, dtype=torch.float64)
    for part in x.split(4):
        gptq.add_symmetric_product(total, part)
    gptq.mirror(total)
    assert torch.allclose(total, x.T @ x)


def test_it_comes_near_the_best_of_all_codes():
    """On 8 columns of 2 bits, with the grid that it chose, all 65536 choices can be tried."""
    quantization = QuantizationConfig(2, 32, "gptq")
    worst = []
    for seed in range(24):
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 8, generator=random, dtype=torch.float64)
        x = x @ torch.randn(8, 8, generator=random, dtype=torch.float64)
        seen = torch.cat([x, 1e-3 * torch.randn(64, 24, generator=random, dtype=torch.float64)], 1)
        weight = torch.zeros(1, 32, dtype=torch.float64)
        weight[0, :8] = torch.randn(8, generator=random, dtype=torch.float64)
        made = gptq.gptq(weight, Moments(seen.T @ seen, seen.T @ seen), quantization, STORAGE)
        scale, bias = float(made.scales[0, 0]), float(made.biases[0, 0])
        choices = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=torch.float64) * scale + bias
        lost = (choices - weight[:, :8]) @ x.T
        best = float(lost.square().sum(1).min())
        rounded = ((weight[:, :8] - bias) / scale).round().clamp(0, 3) * scale + bias
        plain = float(((rounded - weight[:, :8]) @ x.T).square().sum())
        mine = float(((torch.from_numpy(dequantize(made, quantization)).double() - weight)[:, :8] @ x.T).square().sum())
        worst.append((mine / best, plain / best))
    mine, plain = np.array(worst).T
    assert np.median(mine) < 1.5
    assert (mine < 1.001).mean() > 2 * (plain < 1.001).mean()
    assert np.log(mine).mean() < 0.7 * np.log(plain).mean()


def test_it_makes_up_for_what_the_layers_before_lost():
    quantization = QuantizationConfig(4, 64, "gptq")
    weight, x, seen = layer(1, drift=0.3)
    aware = gptq.gptq(weight, moments(x, seen), quantization, STORAGE)
    blind = gptq.gptq(weight, moments(seen, seen), quantization, STORAGE)
    assert output_error(weight, x, seen, aware, quantization) < 0.9 * output_error(weight, x, seen, blind, quantization)


@pytest.mark.parametrize("samples", [50, 4000])
def test_it_makes_up_for_what_the_residual_stream_lacks(samples):
    """By moments and by the inputs themselves; the part of it that the inputs tell, and no more."""
    quantization = QuantizationConfig(4, 64, "gptq")
    weight, x, seen = layer(1, rows=24, samples=samples, drift=0.01)
    random = torch.Generator().manual_seed(9)
    map_of = torch.randn(seen.shape[1], 24, generator=random, dtype=torch.float64) / seen.shape[1] ** 0.5
    lacking = 2 * seen @ map_of + 0.1 * torch.randn(samples, 24, generator=random, dtype=torch.float64)
    by_inputs = Inputs(x, seen, lacking)
    by_moments = replace(moments(x, seen), residual=lacking.T @ seen)
    made = [gptq.gptq(weight, given, quantization, STORAGE) for given in (by_inputs, by_moments)]
    assert (unpack(made[0].weight, 4) == unpack(made[1].weight, 4)).mean() > 0.999
    blind = gptq.gptq(weight, moments(x, seen), quantization, STORAGE)
    errors = []
    for one in (made[0], blind):
        back = torch.from_numpy(dequantize(one, quantization)).double()
        errors.append(float((lacking + x @ weight.T - seen @ back.T).square().sum()))
    assert errors[0] < 0.8 * errors[1]
    with pytest.raises(ValueError, match="not finite"):
        gptq.gptq(weight, replace(by_inputs, residual=lacking * torch.inf), quantization, STORAGE)


def test_damping_grows_as_frames_get_few():
    eye = torch.eye(64)
    expected = {0: gptq.DAMPING, 16: 1.0, 64: 1.0, 640: 0.1, 6400: 0.01, 1 << 20: 0.01}
    assert {frames: gptq.usual_damping(Moments(eye, eye, frames=frames)) for frames in expected} == expected
    assert gptq.usual_damping(Inputs(torch.ones(128, 64), torch.ones(128, 64))) == 0.5
    # What it is for: of few frames, the outputs of others come nearer.
    quantization = QuantizationConfig(4, 64, "gptq")
    ratios = []
    for seed in range(4):
        weight, x, seen = layer(seed, samples=2400, columns=256)
        few = moments(x[:160], seen[:160])
        made = [gptq.gptq(weight, few, quantization, STORAGE, damping) for damping in (None, gptq.DAMPING)]
        errors = [output_error(weight, x[160:], seen[160:], one, quantization) for one in made]
        ratios.append(errors[0] / errors[1])
    assert max(ratios) < 0.9, ratios


def test_an_input_that_never_comes_and_a_weight_that_is_zero():
    quantization = QuantizationConfig(4, 32, "gptq")
    nothing = torch.zeros(64, 64)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    plain = quantize(weight.numpy(), QuantizationConfig(4, 32, "lsq"), STORAGE)
    made = gptq.gptq(weight, Moments(nothing, nothing), quantization, STORAGE)
    assert 0.98 * plain.relative_rmse < made.relative_rmse < plain.relative_rmse  # of more grids than lsq tries
    made = gptq.gptq(torch.zeros(8, 64), Moments(torch.eye(64), torch.eye(64)), quantization, STORAGE)
    assert not dequantize(made, quantization).any()
    assert made.relative_rmse == 0
    with pytest.raises(ValueError, match="not finite"):
        gptq.gptq(weight, Moments(torch.full((64, 64), torch.nan), nothing), quantization, STORAGE)


def test_damping_is_raised_until_the_moments_can_be_factored():
    quantization = QuantizationConfig(4, 32, "gptq")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    second = torch.eye(64, dtype=torch.float64)
    second[5, 5] = -0.5  # as sums in few bits may leave it
    with pytest.raises(RuntimeError, match="not positive definite"):
        gptq.gptq(weight, Moments(second, second), quantization, STORAGE)
    prepared: dict[float, gptq.Prepared] = {}
    found = gptq_with_retries(weight, Moments(second, second), quantization, STORAGE, prepared)
    assert found.damping == 1.0
    assert list(prepared) == [1.0]  # what could not be used is not kept
    assert found.reason == "the second moments are not positive definite"
    damped = gptq.gptq(weight, Moments(second, second), quantization, STORAGE, 1.0)
    assert (found.matrix.quantized(STORAGE).weight == damped.weight).all()
    sound = gptq_with_retries(weight, Moments(second.abs(), second.abs()), quantization, STORAGE)
    assert (sound.damping, sound.reason) == (gptq.DAMPING, "")


@pytest.mark.parametrize(
    ("second", "cross", "reason"),
    [
        (-100 * torch.eye(64), torch.eye(64), "not positive definite"),
        (torch.full((64, 64), torch.nan), torch.eye(64), "not finite"),
        (torch.eye(64), torch.full((64, 64), torch.inf), "not finite"),
        (torch.eye(64), 1e38 * torch.ones(64, 64), "NaN, infinite"),
    ],
    ids=["negative", "nan", "infinite", "overflow"],
)
def test_what_cannot_be_solved_is_quantized_by_its_weights(second, cross, reason):
    quantization = QuantizationConfig(4, 32, "gptq")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    found = gptq_with_retries(weight, Moments(second, cross), quantization, STORAGE)
    assert found.damping is None
    assert reason in found.reason
    plain = quantize(weight.numpy(), QuantizationConfig(4, 32, "lsq"), STORAGE)
    made = found.matrix.quantized(STORAGE)
    assert (made.weight == plain.weight).all()
    assert (made.scales == plain.scales).all()
    assert (made.biases == plain.biases).all()


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_scales_are_what_their_dtype_holds(storage):
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if storage == "bfloat16" else np.float16)
    weight, x, seen = layer(2)
    quantization = QuantizationConfig(4, 64, "gptq")
    made = gptq.gptq(weight.float(), moments(x.float(), seen.float()), quantization, dtype)
    assert made.scales.dtype == made.biases.dtype == dtype
    back = dequantize(made, quantization)
    assert made.squared_error == pytest.approx(float(np.square(weight.numpy() - back).sum()), rel=1e-5)
