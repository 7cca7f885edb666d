"""Fine-tuning in low memory: what it holds, that it learns and resumes, and that it is the same arithmetic."""

import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from ppx.calibrate import low_memory_tuning, teacher, weight_only
from ppx.calibrate.dataset import quantizer_of
from ppx.calibrate.eight_bit_adam import adam_in_backward, set_learning_rates, take_step_in_backward
from ppx.calibrate.layerwise import FINE_TUNED
from ppx.calibrate.low_memory_tuning import fine_tune_in_low_memory, trained
from ppx.calibrate.parameters import (
    CODES_RATE,
    DAMPING,
    adam_for,
    low_memory_matrix,
    take_step,
    trainable_matrix,
    trainable_weights,
)
from ppx.calibrate.quantized_model import quantized_weights
from ppx.calibrate.teacher import batches, pool_shape, teacher_pool
from ppx.calibrate.tuning import Batch, Schedule, divergence, divergence_of, trainable_scope
from ppx.convert import preparation
from ppx.convert.bundle.plan import make_plan
from ppx.convert.bundle.quantized_store import QuantizedStore, quantizations_of
from ppx.convert.bundle.recipe import uniform
from ppx.convert.errors import UserError
from ppx.convert.source.architecture import Architecture
from ppx.convert.source.source import locate, open_source
from ppx.convert.tensorfile import DTYPES
from ppx.model.reference import reference_of
from ppx.model.tokens import from_tokens, read_token_file
from ppx.model.weights import kept_by, rows_of, source_weights
from ppx.quant.affine import QuantizationConfig

FORM = QuantizationConfig(4, 64, "gptq")
STEPS = 3


@pytest.fixture(scope="module")
def opened(pico):
    with open_source(locate(str(pico))) as source:
        recipe = uniform(FORM, "speech-swift", "float16", ("temporal", "depformer"))
        yield source, make_plan(preparation.inventory(source), recipe)


@pytest.fixture(scope="module")
def token_set(pico, opened):
    """Some short calibration sequences."""
    tokens = read_token_file(pico / "calibration_tokens.safetensors", opened[0].architecture)
    return from_tokens(tokens[:8, :, :30], opened[0].architecture)


@pytest.fixture(scope="module")
def rounded(opened, tmp_path_factory):
    """The folder of a store of plainly rounded matrices; tests copy it."""
    source, plan = opened
    read = source_weights(source.checkpoint)
    with QuantizedStore(tmp_path_factory.mktemp("rounded") / "store", "mark") as store:
        made = {
            key: weight_only.quantized(key[0], read(*key).float().numpy(), replace(form, method="rtn"), DTYPES[dtype])
            for key, (form, dtype) in quantizations_of(plan.outputs).items()
        }
        store.add("rounded", made)
    return store.folder


@pytest.fixture
def store_at(rounded, tmp_path):
    """Opens copies of that store by name, and closes them at a test's end."""
    with ExitStack() as stack:

        def copied(name):
            if not (tmp_path / name).is_dir():
                shutil.copytree(rounded, tmp_path / name)
            return stack.enter_context(QuantizedStore(tmp_path / name, "mark"))

        yield copied


@pytest.fixture
def matrices(opened, store_at):
    source, plan = opened
    quantizations, store = quantizations_of(plan.outputs), store_at("store")
    return {key: low_memory_matrix(key, *quantizations[key], store, "cpu") for key in trained(source, plan.outputs)}


def model_of(opened, store, matrices):
    source, plan = opened
    rest = kept_by({}, quantized_weights(source, quantizations_of(plan.outputs), store), "cpu", None)
    return replace(reference_of(source.checkpoint), weights=trainable_weights(matrices, rest), rows=rows_of(rest))


def loss_of(opened, store, token_set):
    """The divergence on the calibration tokens themselves."""
    source, plan = opened
    original = reference_of(source.checkpoint)
    quantized = replace(original, weights=quantized_weights(source, quantizations_of(plan.outputs), store))
    batch = Batch(token_set.tokens, token_set.targets, torch.from_numpy(token_set.counted))
    with torch.no_grad():
        return divergence(quantized, original, batch).item()


@pytest.mark.parametrize("key", [("transformer.layers.0.gating.linear_out.weight", 0), ("depformer_in.3.weight", 0)])
def test_gradients_are_those_of_float32(key, opened, store_at):
    _, plan = opened
    store, (form, dtype) = store_at("store"), quantizations_of(plan.outputs)[key]
    wide, narrow = trainable_matrix(key, form, dtype, store, "cpu"), low_memory_matrix(key, form, dtype, store, "cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        narrow.offsets.copy_(1.5 * torch.randn(narrow.offsets.shape, generator=generator))  # beyond both ends, too
        wide.codes.copy_(narrow.codes.float() + narrow.offsets.float())
        for name in ("scales", "biases"):
            values = 0.01 * torch.randn(narrow.scales.shape, generator=generator)
            getattr(wide, name).copy_(values)
            getattr(narrow, name).copy_(values)
    behind = torch.randn(wide.weight().shape, generator=generator)
    assert torch.equal(narrow.weight(), wide.weight())
    (wide.weight() * behind).sum().backward()
    (narrow.weight() * behind).sum().backward()
    assert narrow.offsets.grad is not None
    assert narrow.offsets.grad.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.offsets.grad.float(), wide.codes.grad, rtol=1 / 128, atol=0)
    assert 0 < torch.eq(narrow.offsets.grad, 0).float().mean() < 0.5  # beyond the ends nothing pulls
    for name in ("scales", "biases"):
        torch.testing.assert_close(getattr(narrow, name).grad, getattr(wide, name).grad)


def test_whole_codes_are_carried(matrices):
    """The matrix stays what it is; offsets are near 0 but where a code would leave its range."""
    one = next(iter(matrices.values()))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        one.offsets.copy_(3 * torch.randn(one.offsets.shape, generator=generator))
    before, weight = one.codes.clone(), one.weight()
    one.carry()
    assert torch.equal(one.weight(), weight)
    assert 0.5 < (one.codes != before).float().mean() < 1
    far = one.offsets.abs() > 0.5
    assert 0 < far.float().mean() < 0.5
    assert bool((((one.codes == 0) & (one.offsets < 0)) | ((one.codes == 15) & (one.offsets > 0)))[far].all())


def test_codes_are_damped(opened, store_at, matrices):
    """By a gradient of zero they move to the nearest whole number, in both scopes by the same share."""
    _, plan = opened
    key, low = next(iter(matrices.items()))
    wide = trainable_matrix(key, *quantizations_of(plan.outputs)[key], store_at("store"), "cpu")
    with torch.no_grad():
        low.offsets.fill_(-0.375)
        wide.codes.sub_(0.375)
    adams = adam_for({key: wide}), adam_in_backward({key: low})
    torch.manual_seed(0)
    for _ in range(20):
        assert take_step(adams[0], wide.weight().sum() * 0)
        assert take_step_in_backward(adams[1], low.weight().sum() * 0)
    expected = 0.375 * (1 - CODES_RATE * DAMPING) ** 20
    inside = low.codes > 0
    assert low.offsets[inside].float().mean().item() == pytest.approx(-expected, rel=0.01)
    assert (wide.codes - wide.codes.round())[inside].detach().numpy() == pytest.approx(-expected, rel=1e-3)


def nbytes(value):
    """The bytes of a tensor, or of the tensors that torchao keeps one in."""
    names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
    parts = [getattr(value, name) for name in names if name != "qmap"] or [value]  # qmap: 256 floats, shared
    return sum(part.numel() * part.element_size() for part in parts)


def test_less_than_8_bytes_per_weight(opened, store_at, matrices, token_set):
    """What stays between steps; and nothing of a block in float32 stays between its forward and its backward pass."""
    source, _ = opened
    model, adam = model_of(opened, store_at("store"), matrices), adam_in_backward(matrices)
    saved = []

    def pack(value):
        saved.append((value.dtype, tuple(value.shape)))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        text, audio = model.logits(token_set.tokens, token_set.targets, source.architecture.n_q // 2, True)
    assert saved
    shapes = {tuple(matrix.wide().weight().shape) for key, matrix in matrices.items() if "layers" in key[0]}
    shapes |= {shape[::-1] for shape in shapes} | {tuple(matrix.codes.shape) for matrix in matrices.values()}
    assert set(saved) & {(torch.float32, shape) for shape in shapes} == set()
    assert take_step_in_backward(adam, text.square().mean() + audio.square().mean())
    weights = sum(matrix.codes.numel() for matrix in matrices.values())
    kept = [
        nbytes(values.detach())
        for matrix in matrices.values()
        for values in (matrix.codes, matrix.offsets, matrix.scales, matrix.biases, *matrix.initial)
    ]
    moments = [
        nbytes(values)
        for optimizer in adam.optimizers.values()
        for state in optimizer.state.values()
        for values in state.values()
    ]
    assert len(moments) == 9 * len(matrices)  # count and two moments of three parameters
    assert 5 < sum(kept + moments) / weights < 5.6
    assert not any(value.grad is not None for one in matrices.values() for value in (one.offsets, one.scales))


def test_it_learns_resumes_and_leaves_what_the_user_reads(opened, store_at, token_set, monkeypatch):
    monkeypatch.setattr(low_memory_tuning, "WARM_UP", 1)
    source, plan = opened
    stores = [store_at(name) for name in ("whole", "broken")]
    before = loss_of(opened, stores[0], token_set)
    losses: dict[int, float] = {}
    broken: dict[int, float] = {}
    rest: dict[int, float] = {}

    def cut_off(step, loss):
        broken[step] = loss
        if step == 1:
            raise KeyboardInterrupt

    def tune(store, **schedule):
        fine_tune_in_low_memory(source, plan.outputs, token_set, store, Schedule(STEPS, **schedule), quiet=True)

    tune(stores[0], on_step=losses.__setitem__)
    assert loss_of(opened, stores[0], token_set) < before
    with pytest.raises(KeyboardInterrupt):
        tune(stores[1], state_seconds=0.0, on_step=cut_off)
    made = (stores[1].folder / teacher.FILE).stat().st_ino

    def go_on(step, loss):
        rest[step] = loss
        assert (stores[1].folder / teacher.FILE).stat().st_ino == made

    tune(stores[1], on_step=go_on)
    # A state is written before a step is reported, at once where the pause allows it: the first step's is.
    assert {**broken, **rest} == losses
    assert min(rest) in (1, 2)
    assert {path.name for path in stores[1].folder.iterdir()} == {"rounded.safetensors", FINE_TUNED, "solution.json"}
    files = [store.folder / FINE_TUNED for store in stores]
    assert files[0].read_bytes() == files[1].read_bytes()
    changed = {key for key, file in stores[0].files.items() if file == FINE_TUNED}
    assert changed == set(trained(source, plan.outputs))
    user = quantizations_of(plan.outputs).keys() - changed
    assert ("depformer.layers.0.self_attn.in_proj_weight", 8) in user
    assert ("depformer.layers.1.gating.15.linear_in.weight", 0) in user
    assert len(user) == 8 * (1 + 4 * source.architecture.depformer_num_layers)


def test_gradients_that_are_not_finite_change_nothing(matrices):
    (first, one), (second, other), *_ = matrices.items()
    adam = adam_in_backward({first: one, second: other})
    set_learning_rates(adam, 1, 20, 1)
    assert not take_step_in_backward(adam, one.weight().sum() * torch.inf)
    assert adam.skipped() == {}
    assert take_step_in_backward(adam, one.weight().square().sum() + (0 * other.weight().sum()).sqrt())
    assert adam.skipped() == {second: 3}
    assert bool((one.offsets != 0).any())
    assert not any(bool((values != 0).any()) for values in (other.offsets, other.scales, other.biases))


def test_the_teachers_predictions_are_the_originals(opened, token_set, tmp_path):
    source, _ = opened
    original = reference_of(source.checkpoint)
    made: list[int] = []

    def pool_of(count, number):
        return teacher_pool(original, token_set, count, number, tmp_path, lambda: made.append(number))

    for _ in range(2):
        with pool_of(12, 5) as pool:
            batch, predictions = pool.batch([1, 11], "cpu")
            assert pool.tokens.shape == (12, *token_set.tokens.shape[1:])
    assert made == [5]
    with torch.no_grad():
        exact = original.logits(batch.tokens, batch.targets, source.architecture.n_q // 2)
        assert divergence_of(predictions, exact, batch.counted) < 1e-5
    # The user's tokens are as they were: by them the sequences are known. All occur, some twice with other samples.
    users = {sequence.tobytes(): number for number, sequence in enumerate(token_set.targets[:, 9:])}
    numbers = [users[sequence.tobytes()] for sequence in pool.targets[:, 9:]]
    assert set(numbers) == set(range(8))
    new = pool.targets[:, :9] != token_set.targets[numbers][:, :9]
    assert 0.05 < new.mean() < 0.3  # 30 % of frames, and some tokens are sampled as they were
    assert (pool.tokens[:, :9, 1:] != token_set.tokens[numbers][:, :9, 1:]).any()
    assert len({sequence.tobytes() for sequence in pool.targets}) == 12
    with pool_of(12, 6) as other:
        assert {sequence.tobytes() for sequence in other.targets}.isdisjoint(
            sequence.tobytes() for sequence in pool.targets
        )
    assert made == [5, 6]


def test_pools_are_read_once_whatever_step_is_first(opened, token_set, tmp_path, monkeypatch):
    """Pools of 6 sequences at most, and steps of 2."""
    monkeypatch.setattr(teacher, "_SEQUENCES", 6)
    original = reference_of(opened[0].checkpoint)
    runs = []
    for name, first in (("whole", 0), ("resumed", 4)):
        (tmp_path / name).mkdir()
        runs.append(
            [
                batch.targets
                for batch, _ in batches(original, token_set, tmp_path / name, 2, range(first, 7), lambda: None)
            ]
        )
    assert [len(run) for run in runs] == [7, 3]
    assert all((one == other).all() for one, other in zip(runs[0][4:], runs[1], strict=True))
    read = [sequence.tobytes() for targets in runs[0] for sequence in targets]
    assert len(set(read)) == len(read) == 14


def test_the_pool_is_bounded():
    whole = Architecture()
    for steps in (1, 50, 10**4):
        each, height = pool_shape(whole, 250, 8, steps)
        assert height == 8
        assert each * height * 250 * 48384 * 2 <= teacher.POOL_BYTES
    assert pool_shape(whole, 250, 8, 50) == (17, 8)  # three pools: 22 steps fit into one
    assert pool_shape(whole, 250, 8, 3) == (3, 8)
    assert pool_shape(whole, 30_000, 8, 3) == (1, 1)


def test_states_are_left_out_where_the_disk_is_full(opened, store_at, token_set, monkeypatch):
    source, plan = opened
    full = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    store, states = store_at("store"), []

    def look(_step, _loss):
        states.extend(store.folder.glob("*.pt*"))

    schedule = Schedule(1, state_seconds=0.0, on_step=look)
    fine_tune_in_low_memory(source, plan.outputs, token_set, store, schedule, quiet=True)
    assert not states


def test_a_missing_package_is_named_before_anything_is_computed(opened, pico, monkeypatch):
    source, plan = opened
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    weights = sum(output.shape[0] * output.shape[1] for output in plan.outputs if output.quantization)
    assert trainable_scope(plan.outputs, 20 * weights) == "low-memory"
    tokens = pico / "calibration_tokens.safetensors"
    with pytest.raises(UserError, match=r"pip install 'ppx-convert\[fine-tuning\]'"):
        quantizer_of(source, plan, tokens, 2, quiet=True, memory=20 * weights)
    quantizer_of(source, plan, tokens, 2, quiet=True, memory=100 * weights)
