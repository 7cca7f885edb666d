"""Layer-wise GPTQ in several processes that exchange sums: with two and three of them on this machine's processors."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ppx.calibrate import dataset, layerwise, quantizer
from ppx.calibrate.gradients import output_gradients
from ppx.calibrate.layerwise_processes import quantize_together
from ppx.calibrate.matrix_parts import MatrixPart, Rounding, joined_outcomes, parts_of
from ppx.calibrate.moments import block_moments, moments_of
from ppx.calibrate.processes import compute_together
from ppx.calibrate.read_ahead import ReadAhead
from ppx.calibrate.stream_rows import depformer_rows, fitting_sequences, most_workers
from ppx.calibrate.work import operations
from ppx.calibrate.workers import Workers
from ppx.convert import preparation
from ppx.convert.bundle.plan import Plan
from ppx.convert.bundle.quantized_store import MatrixKey, QuantizedStore, quantizations_of
from ppx.convert.bundle.recipe import uniform
from ppx.convert.conversion import convert
from ppx.convert.errors import UserError
from ppx.convert.source.source import Source, locate, open_source
from ppx.model.blocks import Block
from ppx.model.reference import reference_of
from ppx.model.tokens import TokenSet, from_tokens
from ppx.quant.affine import QuantizationConfig, dequantize, unpack
from ppx.quant.gptq import Inputs, Moments
from ppx.quant.packed_matrix import unpacked
from safetensors.numpy import load_file, save_file
from torch import Tensor

FORM = QuantizationConfig(4, 64, "gptq")
RECIPE = replace(uniform(FORM, "mlx", "float16", ("temporal", "depformer")), depformer_steps=8)  # half the work
FIRST = "transformer.layers.0.self_attn.in_proj_weight"
FEW = 8  # frames of each of three sequences: fewer than half of any matrix's columns
BLOCKS = {
    Block("temporal", 0, "attention"): "transformer.layers.0.self_attn.out_proj.weight",
    Block("temporal", 1, "mlp"): "transformer.layers.1.gating.linear_out.weight",
    Block("depformer", 0, "attention"): "depformer.layers.0.self_attn.out_proj.weight",
}


def tokens_of(pico: Path, source: Source, sequences: int, frames: int) -> TokenSet:
    whole = load_file(pico / "calibration_tokens.safetensors")["tokens"]
    return from_tokens(whole[:sequences, :, :frames].copy(), source.architecture)


@pytest.fixture(scope="module")
def opened(pico: Path) -> Iterator[tuple[Source, Plan]]:
    with open_source(locate(str(pico))) as source:
        yield preparation.planned(source, RECIPE)


def together(count: int, opened: tuple[Source, Plan], tokens: TokenSet, folder: Path) -> QuantizedStore:
    store = QuantizedStore(folder, "mark")
    quantize_together(count, opened[0], opened[1].outputs, tokens, store, True, operations)
    return store


@pytest.fixture(scope="module")
def stores(opened, pico, tmp_path_factory) -> Iterator[dict[int, QuantizedStore]]:
    """What one and two processes make of three sequences, which two cannot divide evenly; by their number."""
    folder = tmp_path_factory.mktemp("stores")
    tokens = tokens_of(pico, opened[0], 3, 40)
    with QuantizedStore(folder / "one", "mark") as one:
        layerwise.quantize_model(opened[0], opened[1].outputs, tokens, one, quiet=True)
        with together(2, opened, tokens, folder / "two") as two:
            yield {1: one, 2: two}


def codes(store: QuantizedStore, key: MatrixKey) -> np.ndarray:
    return unpack(store.read(key, 0, store.rows(key), np.dtype(np.float32)).weight, FORM.bits)


def moments_in(pico: Path, source: Source, frames: int, workers: Workers) -> dict[tuple[str, ...], torch.Tensor]:
    """Moments of some matrices' inputs, of three sequences; the quantized model's weights are other ones."""
    a, model = source.architecture, reference_of(source.checkpoint)
    models = {"original": model, "quantized": replace(model, weights=lambda *key: 1.02 * model.weights(*key))}
    fitting = fitting_sequences(tokens_of(pico, source, 3, frames), a)
    own = workers.share(len(fitting.tokens))
    streams = {"temporal": {name: one.embedded(fitting.tokens[own]) for name, one in models.items()}}
    states, targets = depformer_rows(fitting, streams["temporal"], a, workers)
    streams["depformer"] = {name: model.step_inputs(states[name], targets, a.steps) for name, model in models.items()}
    found: dict[tuple[str, ...], torch.Tensor] = {}
    for block, name in BLOCKS.items():
        keys = [(name, step) for step in range(3 if block.component == "depformer" else 1)]
        for key, of_inputs in block_moments(models, block, keys, streams[block.component], workers).items():
            assert isinstance(of_inputs, Inputs if frames == FEW else Moments)
            for what, values in vars(of_inputs).items():
                found[str(frames), *map(str, key), what] = torch.as_tensor(values, dtype=torch.float32)
    return found


def sums_of(pico: Path, workers: Workers) -> dict[tuple[str, ...], torch.Tensor]:
    """What a worker gets of sums over its own and others' sequences: moments and inputs, and gradients.

    Of sequences of 540 frames one is enough for gradients: the second worker has none.
    """
    with open_source(locate(str(pico))) as source, torch.no_grad():
        found = moments_in(pico, source, 130, workers) | moments_in(pico, source, FEW, workers)
        tokens = tokens_of(pico, source, 6, 90)
        assert tokens.undelayed is not None
        one = np.concatenate(list(tokens.undelayed), axis=1)
        long = from_tokens(np.stack([one, one[:, ::-1]]), source.architecture)
        for name, given in (("several", tokens), ("one", long)):
            sums = output_gradients(reference_of(source.checkpoint), given, workers=workers)
            found |= {(name, *map(str, key)): values for key, values in sums.items()}
    return found


def test_sums_are_those_of_one_process(pico):
    expected = sums_of(pico, Workers())
    for found in compute_together(partial(sums_of, pico), 2):
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert found[key].shape == values.shape
            assert (found[key] - values).norm() <= 1e-5 * values.norm(), key


def test_two_processes_quantize_as_one_does(opened, stores):
    """Every matrix is there, as near to the original as one process makes it; the first one has nearly the same codes.

    GPTQ passes the error of a tie on, to what follows in the row and to the layers behind: two threads in place of one
    change 27 % of all codes of this model, two processes 29 %.
    """
    one, two = stores[1], stores[2]
    assert two.files == one.files
    assert two.adjusted == one.adjusted == {}
    key = (FIRST, 0)
    assert (codes(one, key) != codes(two, key)).mean() < 0.1  # 1.7 %
    source, plan = opened
    for (name, step), (quantization, _) in quantizations_of(plan.outputs).items():
        tensor = source.checkpoint.tensors[name]
        height = tensor.spec.rows // tensor.role.stacked
        exact = source.checkpoint.read(name, step * height, (step + 1) * height).astype(np.float32)
        errors = []
        for store in (one, two):
            made = store.read((name, step), 0, height, np.dtype(np.float16))
            errors.append(np.linalg.norm(dequantize(made, quantization) - exact))
        assert errors[1] == pytest.approx(errors[0], rel=0.1), name


def quantize_as_on_gpus(pico: Path, folder: Path, workers: Workers) -> bool:
    """Take part in quantizing; the leading process writes matrices while both compute the next ones."""
    layerwise.LayerwiseRun.keeps_weights = True  # type: ignore[method-assign, assignment]
    layerwise.reading_ahead = lambda source, read, _: ReadAhead(read, source.architecture)  # type: ignore
    with open_source(locate(str(pico))) as whole, QuantizedStore(folder, "mark") as store:
        source, plan = preparation.planned(whole, RECIPE)
        tokens = tokens_of(pico, source, 3, 40)
        layerwise.quantize_model(source, plan.outputs, tokens, store, quiet=True, workers=workers)
        return store.files.keys() == quantizations_of(plan.outputs).keys()


def test_two_gpus_leave_the_same_bytes_as_two_that_wait_for_files(pico, stores, tmp_path):
    QuantizedStore(tmp_path / "store", "mark").close()
    assert compute_together(partial(quantize_as_on_gpus, pico, tmp_path / "store"), 2) == [True, True]
    names = {path.name for path in stores[2].folder.iterdir()}
    assert {path.name for path in (tmp_path / "store").iterdir()} == names
    assert [
        name
        for name in sorted(names)
        if (tmp_path / "store" / name).read_bytes() != (stores[2].folder / name).read_bytes()
    ] == []


def test_rows_of_a_matrix_are_quantized_as_in_the_whole(opened):
    """From the same moments: only what is computed in another order can differ."""
    source, plan = opened
    a, model = source.architecture, reference_of(source.checkpoint)
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(3 * a.dim, a.dim, generator=random)
    key, height = (FIRST, 0), 3 * a.dim
    noise = torch.randn(-(-height // 64), 64, 200, generator=random)
    quantizations = quantizations_of(plan.outputs)
    of_inputs = moments_of(inputs, inputs + 0.1 * torch.randn(inputs.shape, generator=random), "cpu")
    gradients = {key: noise @ noise.transpose(1, 2)}
    rounding = Rounding(model.weights, quantizations, {key: of_inputs}, gradients)
    whole = rounding.outcome(MatrixPart(key, 0, height))
    parts = [[(part, rounding.outcome(part)) for part in parts_of({key: height}, Workers(r, 5))] for r in range(5)]
    joined = joined_outcomes(parts, rounding)[key]
    assert (joined.damping, joined.reason) == (whole.damping, whole.reason)
    assert joined.matrix.scales.shape == whole.matrix.scales.shape
    differ = unpacked(joined.matrix.weight, 4) != unpacked(whole.matrix.weight, 4)
    assert differ.float().mean() < 0.02


def test_a_matrix_some_of_whose_rows_need_another_method_is_quantized_whole(opened):
    source, plan = opened
    key, a = (FIRST, 0), source.architecture
    wide = reference_of(source.checkpoint).weights(*key).float().clone()
    wide[-1, :64] = torch.tensor([1e38, -1e38]).repeat(32)  # plain rounding can, what makes up for errors cannot
    inputs = torch.randn(2 * a.dim, a.dim, generator=torch.Generator().manual_seed(0))
    moments = {key: moments_of(10 * inputs, inputs, "cpu")}
    rounding = Rounding(lambda *_: wide, quantizations_of(plan.outputs), moments, {})
    parts = [[(part, rounding.outcome(part)) for part in parts_of({key: len(wide)}, Workers(r, 2))] for r in range(2)]
    dampings = [outcome.damping for made in parts for _, outcome in made]
    assert dampings[0] is not None
    assert dampings[1] is None
    joined, alone = joined_outcomes(parts, rounding)[key], rounding.outcome(MatrixPart(key, 0, len(wide)))
    assert joined.damping is None
    assert joined.reason == alone.reason != ""
    assert torch.equal(joined.matrix.weight, alone.matrix.weight)


def exchanged(workers: Workers) -> list[tuple[str, list[Tensor], Tensor]]:
    """What workers gather of tensors, whose sizes differ between them."""
    words = torch.full((3, 5 + workers.rank), workers.rank, dtype=torch.uint8)
    numbers = torch.arange(2.0 * workers.rank)
    return workers.gathered((f"of {workers.rank}", [words, words.T], numbers))


def test_tensors_are_gathered_by_rank():
    for found in compute_together(exchanged, 2):
        assert [name for name, *_ in found] == ["of 0", "of 1"]
        for rank, (_, (words, turned), numbers) in enumerate(found):
            assert words.dtype == torch.uint8
            assert words.tolist() == [[rank] * (5 + rank)] * 3
            assert turned.tolist() == [[rank] * 3] * (5 + rank)
            assert numbers.tolist() == [0.0, 1.0][: 2 * rank]


def nothing_exchanged(workers: Workers) -> list[str]:
    """What workers gather where there is no tensor."""
    return workers.gathered(f"of {workers.rank}")


def test_values_without_tensors_are_gathered():
    assert compute_together(nothing_exchanged, 2) == [["of 0", "of 1"]] * 2


@pytest.mark.parametrize("size", range(1, 8))
def test_workers_share_everything_once(size):
    for heights in ({("a", 0): 200}, {("a", 0): 64}, {(f"{n}", n): 128 for n in range(16)}):
        parts = [part for rank in range(size) for part in parts_of(heights, Workers(rank, size))]
        rows = [(part.key, row) for part in parts for row in range(part.first, part.last)]
        assert sorted(rows) == sorted((key, row) for key, height in heights.items() for row in range(height))
        assert all(part.first % 64 == 0 and (part.last % 64 == 0 or part.last == heights[part.key]) for part in parts)
    shares = [Workers(rank, size).share(5) for rank in range(size)]
    assert [index for share in shares for index in range(5)[share]] == list(range(5))


def test_there_are_no_more_workers_than_sequences_with_audio(opened, pico):
    tokens = tokens_of(pico, opened[0], 4, 12)
    counted = tokens.counted.copy()
    counted[1, 1:] = False
    assert most_workers(tokens, opened[0].architecture) == 4
    assert most_workers(replace(tokens, counted=counted), opened[0].architecture) == 3


@contextmanager
def when_some_are_kept(folder: Path, act: Callable[[], object]) -> Iterator[None]:
    """Do something as soon as a store holds a matrix."""

    def watch() -> None:
        while not ended.wait(0.02):
            index = folder / "solution.json"
            if index.is_file() and json.loads(index.read_text())["parts"]:
                act()
                return

    ended = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen[bytes]]:
    """The processes that a test has started."""
    known: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*args, **options):
        known.append(popen(*args, **options))
        return known[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return known


@pytest.fixture
def few(pico, tmp_path) -> Path:
    """A file of three short calibration sequences."""
    path: Path = tmp_path / "tokens.safetensors"
    save_file({"tokens": load_file(pico / "calibration_tokens.safetensors")["tokens"][:3, :, :12].copy()}, path)
    return path


def test_a_killed_process_ends_all_and_others_resume(pico, few, tmp_path, started, capfd):
    folder = tmp_path / "out.solution.partial"
    with (
        when_some_are_kept(folder, lambda: os.kill(started[1].pid, signal.SIGKILL)),
        pytest.raises(UserError, match=r"^process 2 of 2 ended with SIGKILL .*memory.*: run the same command again"),
    ):
        convert(str(pico), tmp_path / "out", RECIPE, quantizer=quantizer.quantizer_for(few, processes=2))
    assert all(process.poll() is not None for process in started)
    assert capfd.readouterr().err == ""
    kept = {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}
    assert kept
    made = quantizer.quantizer_for(few, processes=3)
    again: dict[str, int] = {}

    def watched(*arguments):
        layerwise = made(*arguments)

        def quantize(store):
            layerwise.quantize(store)
            again.update({path.name: path.stat().st_ino for path in folder.glob("*.safetensors")})

        return replace(layerwise, quantize=quantize)

    convert(str(pico), tmp_path / "out", RECIPE, quantizer=watched)
    assert {name: again[name] for name in kept} == kept
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {entry["method"] for entry in manifest["tensors"] if "bits" in entry} == {"gptq"}
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C has its usual effect: a shell's jobs in the background begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_all_and_says_what_is_kept(opened, pico, tmp_path, started):
    tokens, folder = tokens_of(pico, opened[0], 2, 12), tmp_path / "store"
    with (
        when_some_are_kept(folder, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(KeyboardInterrupt) as stopped,
    ):
        together(2, opened, tokens, folder)
    assert all(process.poll() is not None for process in started)
    with QuantizedStore(folder, "mark") as store:
        assert stopped.value.__notes__ == [f"{len(store.files)} of 80 matrices are kept"]


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """Also where it has no time to end them."""
    script = (
        f"from ppx.calibrate.processes import compute_together; from test_workers import wait_for; "
        f"from functools import partial; compute_together(partial(wait_for, {str(tmp_path)!r}), 2)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    main = subprocess.Popen([sys.executable, "-c", script], env=environment)
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    main.kill()
    main.wait()
    for pid in (int(path.name) for path in tmp_path.iterdir()):
        while is_running(pid):
            assert time.monotonic() < end
            time.sleep(0.05)


def wait_for(folder: str, workers: Workers) -> None:
    (Path(folder) / str(os.getpid())).touch()
    workers.wait()
    time.sleep(600)


def is_running(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


@pytest.fixture
def damaged(pico_copy):
    """Pico with a matrix whose last row cannot be quantized by any method; its path."""
    path = pico_copy / "model.safetensors"
    tensors = load_file(path)
    tensors[FIRST][-1] = np.tile([3e38, -3e38], tensors[FIRST].shape[1] // 2).astype(tensors[FIRST].dtype)
    save_file(tensors, path)
    return pico_copy


def test_an_error_of_one_process_is_the_error_of_all(damaged, few, tmp_path, capfd):
    made = quantizer.quantizer_for(few, processes=2)
    with pytest.raises(UserError, match=rf"^{FIRST}: .*too far apart: give a recipe that keeps it float$") as error:
        convert(str(damaged), tmp_path / "out", RECIPE, quantizer=made)
    assert len(error.value.problems) == 1
    assert capfd.readouterr().err == ""


def fail(workers: Workers) -> None:
    if workers.rank == 1:
        raise ZeroDivisionError
    workers.wait()


def test_a_mistake_in_the_code_of_one_process_shows_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)in fail\n.*ZeroDivisionError"):
        compute_together(fail, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_more_gpus_than_there_are_is_an_error(program, pico, tmp_path, monkeypatch):
    for more in ((), ("--dry-run",)):
        options = ("--method", "gptq", "--gpus", "2", *more)
        done = program("ppx-convert", pico, *options, cwd=tmp_path, status=2)
        line = "error: 2 GPUs are asked for, and this machine has no GPU of CUDA: give fewer --gpus, or leave it out\n"
        assert done.stderr == line
    done = program("ppx-convert", pico, "--gpus", "2", cwd=tmp_path, status=2)
    assert done.stderr == "error: several GPUs are for the method gptq: leave --gpus out, or choose --method gptq\n"
    monkeypatch.setattr(quantizer, "gpus_here", lambda: 1)
    with pytest.raises(UserError, match="4 GPUs are asked for, and this machine has 1 GPU: ask for fewer"):
        quantizer.quantizer_for(gpus=4)
    quantizer.check_gpus(1)


def test_blocks_are_fine_tuned_by_one_gpu(opened):
    dataset.check_scope(opened[1], 10, None, 2)  # all at once: by one process, after what several have quantized
    with pytest.raises(UserError, match=r"fine-tuned block by block.*one GPU does that: use one GPU, or leave"):
        dataset.check_scope(opened[1], 10, 1 << 20, 2)
