"""Layer-wise GPTQ by the command: what it gains, that it resumes, and what it reports."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ppx.calibrate import layerwise, tuning
from ppx.calibrate.block_tuning import BlockTuning
from ppx.calibrate.dataset import quantizer_of
from ppx.calibrate.gradients import output_gradients
from ppx.calibrate.quantized_model import quantized_weights
from ppx.calibrate.read_ahead import ReadAhead
from ppx.calibrate.tuning import Schedule
from ppx.calibrate.workers import Workers
from ppx.convert import preparation
from ppx.convert.bundle.plan import Plan, make_plan
from ppx.convert.bundle.quantized_store import QuantizedStore, quantizations_of
from ppx.convert.bundle.recipe import uniform
from ppx.convert.source.source import Source, locate, open_source
from ppx.model.blocks import blocks_of
from ppx.model.reference import reference_of
from ppx.model.tokens import TokenSet, read_tokens
from ppx.model.weights import Weights, source_weights
from ppx.quant.affine import QuantizationConfig, dequantize, unpack
from ppx.quant.gptq import Inputs, Moments, gptq
from safetensors.numpy import load_file, save_file
from stopping import Moment

FORM = QuantizationConfig(4, 64, "gptq")
LAYER = "transformer.layers.0.self_attn.out_proj.weight"


def calibration(pico: Path, folder: Path, sequences: int, frames: int) -> Path:
    path = folder / "tokens.safetensors"
    held = load_file(pico / "calibration_tokens.safetensors")["tokens"]
    save_file({"tokens": held[:sequences, :, :frames].copy()}, path)
    return path


@pytest.fixture(scope="module")
def few(pico, tmp_path_factory):
    """A file of some calibration sequences, short ones."""
    return calibration(pico, tmp_path_factory.mktemp("few"), 16, 60)


@pytest.fixture(scope="module")
def opened(pico):
    with open_source(locate(str(pico))) as source:
        recipe = uniform(FORM, "speech-swift", "float16", ("temporal", "depformer"))
        yield source, make_plan(preparation.inventory(source), recipe)


@pytest.fixture
def store_at():
    """Opens solutions, and closes them at a test's end."""
    with ExitStack() as stack:
        yield lambda folder, mark: stack.enter_context(QuantizedStore(folder, mark))


@pytest.fixture(scope="module")
def solved(opened, few, tmp_path_factory):
    """The folder of a solution of all blocks, not refined; tests copy it."""
    source, plan = opened
    with QuantizedStore(tmp_path_factory.mktemp("solved") / "solution", "mark") as store:
        layerwise.quantize_model(
            source, plan.outputs, read_tokens(few, source.architecture, None, None), store, quiet=True
        )
    return store.folder


def bundles(program: Callable[..., object], pico: Path, folder: Path, few: Path, **more: object) -> dict[str, bytes]:
    program("ppx-convert", pico, "--method", "gptq", "--calibration", few, "-o", "out", cwd=folder, **more)
    return {path.name: path.read_bytes() for path in sorted((folder / "out").glob("*.safetensors"))}


def divergences(
    program: Callable[..., subprocess.CompletedProcess[str]],
    bundle: str,
    pico: Path,
    folder: Path,
    sequences: int,
    frames: int,
) -> list[float]:
    tokens = ("--tokens", pico / "heldout_tokens.safetensors", "--sequences", sequences, "--frames", frames)
    done = program("ppx-verify", bundle, "--reference", pico, *tokens, "--json", cwd=folder)
    predictions = json.loads(done.stdout)["predictions"]
    return [predictions[stream]["bundle"]["kl"]["mean"] for stream in ("agent", "text")]


def test_it_beats_least_squares_by_far(program, pico, bundle, tmp_path):
    bundles(program, pico, tmp_path, calibration(pico, tmp_path, 24, 250))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["calibration"]["sequences"] == 24
    assert len(manifest["calibration"]["sha256"]) == 64
    assert {entry["method"] for entry in manifest["tensors"] if "bits" in entry} == {"gptq"}
    assert not list(tmp_path.glob("*.partial"))
    shutil.copytree(bundle(), tmp_path / "lsq")
    plain, solved = (divergences(program, name, pico, tmp_path, 8, 100) for name in ("lsq", "out"))
    # GPTQ is chaotic: sums in another order give other codes. Over four calibration sets, one and two threads and two
    # lengths, the agent's ratio was 0.42 to 0.52, and that of text, which has few uncertain positions, 0.34 to 0.83.
    assert solved[0] < 0.6 * plain[0]
    assert solved[1] < 0.95 * plain[1]


@pytest.mark.parametrize("target", [["--recipe", "moshi-q4"], ["--target", "mlx", "--bits", "3", "--group-size", "32"]])
def test_every_target_takes_it(target, program, pico, few, tmp_path):
    program("ppx-convert", pico, *target, "--method", "gptq", "--calibration", few, "-o", "out", cwd=tmp_path)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    methods = {entry["method"] for entry in manifest["tensors"] if "bits" in entry}
    assert methods == ({"gptq", "lsq"} if "moshi-q4" in target else {"gptq"})  # embeddings have no inputs to go by
    divergences(program, "out", pico, tmp_path, 4, 60)  # which fails if it cannot be loaded, or does not pass


def test_moments_are_those_of_what_each_layer_reads(opened, few, tmp_path, store_at):
    """Against the block run at once: the first output projection, after the quantized input projection."""
    source, plan = opened
    token_set = read_tokens(few, source.architecture, 3, 40)
    store = store_at(tmp_path / "solution", "mark")
    layerwise.quantize_model(source, plan.outputs, token_set, store, quiet=True)
    first, second = "transformer.layers.0.self_attn.in_proj_weight", "transformer.layers.0.self_attn.out_proj.weight"
    read, storage = source_weights(source.checkpoint), np.dtype(np.float16)
    stored = store.read((first, 0), 0, store.rows((first, 0)), storage)
    seen = []

    def keep(name, _, x):
        if name == second:
            seen.append(x.reshape(-1, x.shape[-1]))

    def quantized(name, step):
        return torch.from_numpy(dequantize(stored, FORM)) if name == first else read(name, step)

    with torch.inference_mode():
        for weights in (read, quantized):
            model = replace(reference_of(source.checkpoint), weights=weights, input_hook=keep)
            model.block(blocks_of(source.architecture, "temporal")[0], model.embed(token_set.tokens))
        given = Inputs(*seen)
    gradients = output_gradients(reference_of(source.checkpoint), token_set)[second, 0]
    expected = gptq(read(second, None), given, FORM, storage, gradients=gradients)
    found = store.read((second, 0), 0, store.rows((second, 0)), storage)
    # In one piece, and in float64 by moments: codes and grids that are as good differ, and with them what follows; the
    # loss does not.
    wide, (exact, drifted) = read(second, None).double(), [inputs.double() for inputs in seen]
    of_moments = Moments(drifted.T @ drifted, exact.T @ drifted, frames=len(exact))
    by_moments = gptq(wide, of_moments, FORM, storage, gradients=gradients)
    losses = [
        float((drifted @ torch.from_numpy(dequantize(one, FORM)).double().T - exact @ wide.T).square().sum())
        for one in (found, expected, by_moments)
    ]
    for other, loss in zip((expected, by_moments), losses[1:], strict=True):
        assert losses[0] == pytest.approx(loss, rel=0.01)
        assert (unpack(found.weight, 4) == unpack(other.weight, 4)).mean() > 0.95


def test_every_part_is_solved_once(opened, few, solved, tmp_path, store_at):
    source, plan = opened
    store = store_at(shutil.copytree(solved, tmp_path / "solution"), "mark")
    assert store.files.keys() == quantizations_of(plan.outputs).keys()
    blocks = set(store.files.values())
    before = {name: (tmp_path / "solution" / name).stat().st_mtime_ns for name in blocks}
    again = store_at(tmp_path / "solution", "mark")
    quantizer_of(source, plan, few, quiet=True).quantize(again)
    assert before == {name: (tmp_path / "solution" / name).stat().st_mtime_ns for name in blocks}
    assert store_at(tmp_path / "solution", "another").files == {}


@pytest.mark.slow
def test_weights_that_stay_on_a_gpu_change_no_byte(opened, few, solved, tmp_path, store_at, monkeypatch):
    monkeypatch.setattr(layerwise.LayerwiseRun, "keeps_weights", True)  # as on a GPU with enough memory
    source, plan = opened
    read: list[tuple[str, int | None]] = []

    def ahead(source: Source, weights: Weights, _: Workers) -> ReadAhead:
        def counted(name: str, step: int | None) -> torch.Tensor:
            read.append((name, step))
            return weights(name, step)

        return ReadAhead(counted, source.architecture, kept_on="cpu")

    monkeypatch.setattr(layerwise, "reading_ahead", ahead)
    store = store_at(tmp_path / "kept", "mark")
    layerwise.quantize_model(source, plan.outputs, read_tokens(few, source.architecture, None, None), store, quiet=True)
    names = {path.name for path in solved.iterdir()}
    assert {path.name for path in store.folder.iterdir()} == names
    assert all((store.folder / name).read_bytes() == (solved / name).read_bytes() for name in names)
    assert len(read) == len(set(read))


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(program, pico, few, tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = bundles(program, pico, tmp_path / "whole", few)
    folder = tmp_path / "broken"
    solved = folder / "out.solution.partial"
    done: dict[Path, int] = {}
    for count in (3, 2):
        stop = (Moment("os.rename", "solution.json", 1 + count, after=True), signal.SIGKILL)  # the first is empty
        assert bundles(program, pico, folder, few, status=-signal.SIGKILL, stop=stop) == {}
        found = {path: path.stat().st_mtime_ns for path in solved.glob("*.safetensors")}
        assert found.items() > done.items()
        done = found
    assert not (folder / "out").exists()
    assert bundles(program, pico, folder, few) == whole
    assert not solved.exists()


def loss_of(source: Source, plan: Plan, token_set: TokenSet, store: QuantizedStore) -> float:
    """The divergence that fine-tuning minimizes, on its calibration tokens."""
    original = reference_of(source.checkpoint)
    weights = quantized_weights(source, quantizations_of(plan.outputs), store)
    batch = tuning.Batch(token_set.tokens, token_set.targets, torch.from_numpy(token_set.counted))
    with torch.no_grad():
        return tuning.divergence(replace(original, weights=weights), original, batch).item()


def test_refining_brings_predictions_nearer_and_resumes(opened, few, solved, tmp_path, store_at):
    source, plan = opened
    token_set = read_tokens(few, source.architecture, None, None)
    folders = [shutil.copytree(solved, tmp_path / name) for name in ("whole", "broken")]
    stores = [store_at(folder, "mark") for folder in folders]
    losses: dict[int, float] = {}
    broken: dict[int, float] = {}
    before = loss_of(source, plan, token_set, stores[0])

    def cut_off(step: int, loss: float) -> None:
        broken[step] = loss
        if step == 4:
            raise KeyboardInterrupt

    whole = Schedule(8, on_step=losses.__setitem__)
    tuning.fine_tune(source, plan.outputs, token_set, stores[0], whole, quiet=True)
    assert list(losses) == list(range(8))
    # On the calibration set itself, not on the few sequences that a step draws: 0.95 to 0.96 over vector widths.
    assert loss_of(source, plan, token_set, stores[0]) < 0.99 * before

    schedule = Schedule(8, state_seconds=0.0, on_step=cut_off)
    with pytest.raises(KeyboardInterrupt):
        tuning.fine_tune(source, plan.outputs, token_set, stores[1], schedule, quiet=True)
    assert list(broken) == [0, 1, 2, 3, 4]
    rest: dict[int, float] = {}
    tuning.fine_tune(source, plan.outputs, token_set, stores[1], Schedule(8, on_step=rest.__setitem__), quiet=True)
    assert list(rest) == [5, 6, 7]
    for part in quantizations_of(plan.outputs):
        made = [store.read(part, 0, store.rows(part), np.dtype(np.float32)) for store in stores]
        assert (made[0].weight == made[1].weight).mean() > 0.999
        assert np.allclose(made[0].scales, made[1].scales, rtol=1e-3)


def test_scales_come_out_in_their_storage_dtype(opened, few, solved, tmp_path, store_at):
    source, plan = opened
    store = store_at(shutil.copytree(solved, tmp_path / "solution"), "mark")
    quantizer_of(source, plan, few, steps=2, quiet=True).quantize(store)
    for part in quantizations_of(plan.outputs):
        made = store.read(part, 0, store.rows(part), np.dtype(np.float32))
        for side in (made.scales, made.biases):
            assert (side == side.astype(np.float16).astype(np.float32)).all()


def test_what_is_tuned_is_what_fits(opened, few, solved, tmp_path, store_at):
    """All at once, with everything in float32 or in low memory; or blocks alone. Each is nearer than GPTQ alone."""
    source, plan = opened
    assert tuning.trainable_scope(plan.outputs) == "codes"
    token_set = read_tokens(few, source.architecture, None, None)
    weights = sum(output.shape[0] * output.shape[1] for output in plan.outputs if output.quantization)
    stores, records = {"solved": store_at(solved, "mark")}, {}
    for what, memory in (("blocks", weights), ("low-memory", 20 * weights)):  # bytes; they take 8 per weight, or 36
        quantizer = quantizer_of(source, plan, few, steps=10, quiet=True, memory=memory)
        if what == "low-memory":
            shutil.copytree(solved, tmp_path / what)
        stores[what], records[what] = store_at(tmp_path / what, "mark"), quantizer.record
        quantizer.quantize(stores[what])
    assert records["blocks"].refined == "codes, scales and biases, block by block"
    assert records["low-memory"].refined == "codes, scales and biases, all together, in low memory"
    loss = {what: loss_of(source, plan, token_set, store) for what, store in stores.items()}
    # 4 % to 7 % less, which vector widths change by 1 %.
    assert loss["blocks"] < loss["solved"]
    assert loss["low-memory"] < loss["solved"]
    same, tuned = 0, set(stores["blocks"].files.values())
    for part in quantizations_of(plan.outputs):
        made = {what: one.read(part, 0, one.rows(part), np.dtype(np.float32)) for what, one in stores.items()}
        same += int((made["solved"].weight == made["blocks"].weight).all())
    assert same < 0.5 * len(quantizations_of(plan.outputs))
    assert {name for name in tuned if "layers" in name} == {
        name for name in tuned if name.endswith(".tuned.safetensors")
    }


def test_a_killed_run_tunes_no_block_twice(opened, few, tmp_path, store_at):
    source, plan = opened
    token_set = read_tokens(few, source.architecture, 4, 40)
    store = store_at(tmp_path / "solution", "mark")
    blocks: list[str] = []

    def cut_off(block):
        if len(blocks) == 3:
            raise KeyboardInterrupt
        blocks.append(str(block))

    with pytest.raises(KeyboardInterrupt):
        layerwise.quantize_model(source, plan.outputs, token_set, store, BlockTuning(2, cut_off), quiet=True)
    tuning = BlockTuning(2, lambda block: blocks.append(str(block)))
    layerwise.quantize_model(
        source, plan.outputs, token_set, store_at(tmp_path / "solution", "mark"), tuning, quiet=True
    )
    layers = source.architecture.num_layers + source.architecture.depformer_num_layers
    assert len(blocks) == len(set(blocks)) == 2 * layers


def test_computing_blocks_again_changes_no_gradient(opened):
    source, _ = opened
    random = np.random.default_rng(0)
    tokens = random.integers(0, source.architecture.card, (2, 17, 12)).astype(np.int32)
    gradients = []
    for again in (False, True):
        read = source_weights(source.checkpoint)
        leaf = read(LAYER, None).float().requires_grad_()

        def weights(name, step, read=read, leaf=leaf):
            return leaf if name == LAYER else read(name, step)

        text, audio = replace(reference_of(source.checkpoint), weights=weights).logits(tokens, tokens, 8, again)
        (text.square().mean() + audio.square().mean()).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-9)


class Bar:
    """A progress bar that counts."""

    def __init__(self, total):
        self.total, self.counts, self.details = total, [], []

    def update(self, more):
        self.counts.append(more)

    def set_postfix_str(self, text, **_):
        self.details.append(text)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("begun", [False, True], ids=["anew", "resumed"])
def test_progress_counts_the_work(begun, opened, few, solved, store_at, monkeypatch, tmp_path):
    """All that is computed is counted, what an earlier run did is not, and no piece is most of it."""
    bars = []

    def shown(_label, total, _unit, _quiet):
        bars.append(Bar(total))
        return bars[-1]

    source, plan = opened
    tokens = read_tokens(few, source.architecture, None, None)
    store, kept = store_at(tmp_path / "store", "mark"), 0
    if begun:
        shutil.copytree(solved, tmp_path / "store", dirs_exist_ok=True)
        index = json.loads((tmp_path / "store" / "solution.json").read_text())
        files = list(dict.fromkeys(file for _, _, file in index["parts"]))
        index["parts"] = [part for part in index["parts"] if part[2] in files[: len(files) // 2]]
        (tmp_path / "store" / "solution.json").write_text(json.dumps(index))
        kept = len(index["parts"])
        store = store_at(tmp_path / "store", "mark")
    monkeypatch.setattr(layerwise, "bar", shown)
    layerwise.quantize_model(source, plan.outputs, tokens, store, quiet=True)
    bar = bars[0]
    assert sum(bar.counts) == pytest.approx(bar.total)
    assert max(bar.counts) < 0.2 * bar.total
    assert bar.counts[0] > 0
    count = len(store.files)
    assert bar.details[-1] == f"{count} of {count} matrices"
    assert bar.details[0] == f"{kept + 1} of {count} matrices"


def test_an_interrupt_says_how_many_matrices_are_kept(program, pico, few, tmp_path):
    options = ("ppx-convert", pico, "--method", "gptq", "--tokens", few, "-o", "out")
    moment = Moment("os.rename", "solution.json", 4, after=True)
    done = program(*options, cwd=tmp_path, status=130, stop=(moment, signal.SIGINT))
    line = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"interrupted: \d+ of \d+ matrices are kept; run the same command again to resume", line), (
        done.stderr
    )


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--recipe", "8bit"), ("--no-quantize",)])
def test_tokens_without_gptq_are_an_error_everywhere(more, program, pico, few, tmp_path):
    """Before anything is read: the source is not looked at."""
    done = program("ppx-convert", pico, "--tokens", few, *more, "-o", "out", cwd=tmp_path, status=2)
    assert done.stderr == ("error: only the method gptq takes --tokens: leave --tokens out, or choose --method gptq\n")
    assert list(tmp_path.iterdir()) == []


def test_options_for_another_method_are_refused(program, pico, few, tmp_path):
    for options, given in (
        (("--calibration", few), "--tokens"),
        (("--refine", "2"), "--refine"),
        (("--calibration", few, "--refine", "2"), "--tokens and --refine"),
    ):
        done = program("ppx-convert", pico, *options, "-o", "out", cwd=tmp_path, status=2)
        assert f"only the method gptq takes {given}: leave {given} out, or choose --method gptq" in done.stderr
    done = program("ppx-convert", pico, "--method", "gptq", "--calibration", "nothing", cwd=tmp_path, status=2)
    assert "nothing: no such file" in done.stderr
