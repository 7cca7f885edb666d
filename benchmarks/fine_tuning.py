"""Fine-tuning codes, scales and biases of a whole model: time, memory, loss, and what it does to held-out predictions.

    python benchmarks/fine_tuning.py demo:7b --steps 50 --scope low-memory
    python benchmarks/fine_tuning.py SOURCE --calibration TOKENS --heldout TOKENS --method gptq --steps 400
        --scope codes low-memory [--folder DIR]

Without calibration tokens they are random ones, and the first quantization is plain rounding. The memory is the most
that PyTorch held on a GPU (on a CPU the largest resident set of the process, with imports and the first quantization),
also for each weight that is trained. Figures on held-out tokens are those of benchmarks/calibration.py. The folder
keeps the first quantization and the original's predictions: a killed run resumes. Without held-out tokens the result
is not written.
"""

import argparse
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from calibration import figures
from ppx.calibrate import layerwise, weight_only
from ppx.calibrate.low_memory_tuning import fine_tune_in_low_memory, trained
from ppx.calibrate.quantized_model import quantized_weights
from ppx.calibrate.tuning import Schedule, fine_tune
from ppx.convert import preparation
from ppx.convert.bundle.plan import Plan, make_plan
from ppx.convert.bundle.quantized_store import QuantizedStore, quantizations_of
from ppx.convert.bundle.recipe import uniform
from ppx.convert.parallel import cores
from ppx.convert.source.source import Source, locate, open_source
from ppx.convert.tensorfile import DTYPES
from ppx.model import torch_device
from ppx.model.reference import kept_whole, reference_of
from ppx.model.tokens import TokenSet, from_tokens, read_token_file
from ppx.model.weights import kept_by, source_weights
from ppx.quant.affine import QuantizationConfig, Quantized
from processes import own_memory

SCOPES = {"codes": fine_tune, "low-memory": fine_tune_in_low_memory}


class _StepsTakenError(Exception):
    """All steps are taken, and nobody needs the result."""


@dataclass(frozen=True)
class Run:
    """What a scope took. losses, seconds: of each step. memory: bytes. reserved: by PyTorch's allocator, on a GPU."""

    losses: list[float]
    seconds: list[float]
    memory: int
    reserved: int


def fill(source: Source, plan: Plan, store: QuantizedStore, method: str, tokens: TokenSet) -> None:
    """Quantize a plan's matrices into a store: by GPTQ, or by a method that needs no data, tensor by tensor."""
    if method == "gptq":
        layerwise.quantize_model(source, plan.outputs, tokens, store)
        return
    read, quantizations = source_weights(source.checkpoint), quantizations_of(plan.outputs)
    names: dict[str, list[int]] = {}
    for name, step in quantizations.keys() - store.files.keys():
        names.setdefault(name, []).append(step)

    def quantize(name: str) -> None:
        made = {}
        for step in sorted(names[name]):
            data_driven, dtype = quantizations[name, step]
            matrix = np.ascontiguousarray(read(name, step).float().numpy())
            plain = replace(data_driven, method=method)
            importance = source.checkpoint.importance(name)
            made[name, step] = weight_only.quantized(name, matrix, plain, DTYPES[dtype], importance)
        results[name] = made

    results: dict[str, dict[tuple[str, int], Quantized]] = {}
    with ThreadPoolExecutor(cores()) as pool:
        ordered = sorted(names)
        for first in range(0, len(ordered), 2 * cores()):
            some = ordered[first : first + 2 * cores()]
            list(pool.map(quantize, some))
            for name in some:
                store.add(name.removesuffix(".weight"), results.pop(name))


def memory_of_run() -> tuple[int, int]:
    """Return the most bytes that were in use, and that PyTorch's allocator reserved on a GPU."""
    if torch_device.device() == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return own_memory(), 0


def measured(
    scope: str, source: Source, plan: Plan, tokens: TokenSet, store: QuantizedStore, steps: int, keep: bool
) -> Run:
    """Fine-tune; return what it took. keep: whether the store is to have the result."""
    losses: list[float] = []
    times = []

    def on_step(step: int, loss: float) -> None:
        times.append(time.monotonic())
        losses.append(loss)
        most = memory_of_run()[0] / 1e9
        print(f"{scope}: step {step}, loss {loss:.5f}, {most:.2f} GB", file=sys.stderr, flush=True)
        if step == steps - 1 and not keep:
            raise _StepsTakenError

    if torch_device.device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    schedule = Schedule(steps, state_seconds=float("inf"), on_step=on_step)
    with suppress(_StepsTakenError):
        SCOPES[scope](source, plan.outputs, tokens, store, schedule)
    return Run(losses, np.diff(times).tolist(), *memory_of_run())


def agent(source: Source, plan: Plan, store: QuantizedStore, held: TokenSet) -> dict[str, float]:
    """Return the figures of a store's model on held-out tokens."""
    reference = kept_whole(reference_of(source.checkpoint, device=torch_device.device()))
    own = kept_by({}, quantized_weights(source, quantizations_of(plan.outputs), store), reference.device)
    with torch.inference_mode():
        return figures(replace(reference, weights=own), reference, held)


def random_tokens(source: Source, sequences: int, frames: int) -> TokenSet:
    """Return random sequences."""
    a = source.architecture
    shape = (sequences, 1 + a.n_q, frames)
    drawn = np.random.default_rng(0).integers(0, min(a.card, a.text_card), shape).astype(np.int32)
    return from_tokens(drawn, a)


def shown(found: dict[str, float]) -> str:
    """Return figures as text."""
    return ", ".join(f"{name} {value:.5f}" for name, value in found.items())


def report(scope: str, run: Run, weights: int) -> None:
    """Print what a scope took."""
    ten = min(10, len(run.losses))
    begin, end = np.mean(run.losses[:ten]), np.mean(run.losses[-ten:])
    print(f"{scope}: {len(run.losses)} steps, {np.median(run.seconds) if run.seconds else 0:.2f} s/step (median)")
    print(f"{scope}: loss of the first {ten} steps {begin:.5f}, of the last {ten} {end:.5f}")
    for name, nbytes in {"memory": run.memory, "reserved": run.reserved}.items():
        print(f"{scope}: {name} {nbytes / 1e9:.2f} GB, {nbytes / weights:.2f} bytes for each of {weights:,} weights")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scope", nargs="+", choices=SCOPES, default=["low-memory"])
    parser.add_argument("--method", choices=("rtn", "mse", "gptq"), default="rtn", help="of the first quantization")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--calibration", type=Path, help="tokens [default: random ones]")
    parser.add_argument("--sequences", type=int, default=192, help="of the calibration tokens, at most")
    parser.add_argument("--frames", type=int, default=250, help="of a sequence, at most")
    parser.add_argument("--heldout", type=Path, help="tokens; their first 24 sequences of 200 frames are used")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-fine-tuning"), help="kept")
    options = parser.parse_args()
    with open_source(locate(options.source)) as source:
        a = source.architecture
        recipe = uniform(
            QuantizationConfig(options.bits, 64, "gptq"), "speech-swift", "float16", ("temporal", "depformer")
        )
        plan = make_plan(preparation.inventory(source), recipe)
        if options.calibration:
            read = read_token_file(options.calibration, a)[: options.sequences, :, : options.frames]
            tokens = from_tokens(read, a)
        else:
            tokens = random_tokens(source, options.sequences, options.frames)
        held = from_tokens(read_token_file(options.heldout, a)[:24, :, :200], a) if options.heldout else None
        name = f"{options.source.replace(os.sep, '-').replace(':', '-')}-{options.bits}-{options.method}"
        begin = time.monotonic()
        mark = f"{name} {tokens.tokens.shape}"
        with QuantizedStore(options.folder / name, mark) as store:
            fill(source, plan, store, {"mse": "lsq"}.get(options.method, options.method), tokens)
            print(f"{options.method}: {time.monotonic() - begin:.0f} s", flush=True)
            if held:
                print(f"before: {shown(agent(source, plan, store, held))}", flush=True)
        keys = set(trained(source, plan.outputs))
        shapes = {name: source.checkpoint.tensors[name].spec for name, _ in keys}
        weights = sum(
            shapes[name].rows * shapes[name].columns // source.checkpoint.tensors[name].role.stacked for name, _ in keys
        )
        print(
            f"{torch_device.device()}, PyTorch {torch.__version__}, calibration tokens {tokens.tokens.shape}",
            flush=True,
        )
        for scope in options.scope:
            folder = options.folder / f"{name}-{scope}"
            if not folder.is_dir():
                shutil.copytree(options.folder / name, folder, copy_function=os.link)
            with QuantizedStore(folder, mark) as store:
                begin = time.monotonic()
                run = measured(scope, source, plan, tokens, store, options.steps, held is not None)
                if run.losses:
                    report(scope, run, weights)
                print(f"{scope}: {time.monotonic() - begin:.0f} s in all", flush=True)
                if held:
                    print(f"{scope}: {shown(agent(source, plan, store, held))}", flush=True)


if __name__ == "__main__":
    main()
