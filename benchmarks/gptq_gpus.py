"""Time of layer-wise GPTQ by one process and by several, each with a GPU of its own where there are GPUs.

    python benchmarks/gptq_gpus.py [SOURCE] [--processes 1 2] [--frames 32000] [--sequence 250] [--folder DIR]

Quantizes all matrices of a source (demo:7b, which is made if it is not there) on random tokens, as a conversion does;
for each number of processes in a fresh Python. GPUs quantize the small demo before, so that their kernels are
compiled. Prints the seconds of quantizing, with those of starting the processes apart, how many times as fast it is as
with the first number, and the largest memory: PyTorch's on the GPU of each process, and resident in each. On a machine
without GPUs the processes divide the processors. Needs 6 GB of disk for demo:7b, beside the 17 GB of the demo itself.
"""

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gptq_gpus  # this file: other processes find its functions by that name
import torch
from fine_tuning import random_tokens
from ppx.calibrate import layerwise_processes
from ppx.calibrate.layerwise import quantize_model
from ppx.calibrate.processes import compute_together
from ppx.calibrate.work import operations
from ppx.calibrate.workers import Workers
from ppx.convert import preparation
from ppx.convert.bundle.plan import make_plan
from ppx.convert.bundle.quantized_store import QuantizedStore
from ppx.convert.bundle.recipe import uniform
from ppx.convert.parallel import cores
from ppx.convert.source.source import locate, open_source
from ppx.quant.affine import QuantizationConfig
from processes import own_memory, run

Measured = dict[str, float]  # of one process: seconds, and bytes


def main() -> None:
    """Run the benchmark, or, in a fresh Python, one number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="demo:7b")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--frames", type=int, default=32000)
    parser.add_argument("--sequence", type=int, default=250, help="frames of a sequence")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-gptq-gpus"), help="made and removed")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(quantized(options.source, options.one, options.frames, options.sequence, options.folder)))
        return
    locate(options.source)  # makes the demo
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{platform.machine()}, {cores()} cores, {device}, {options.source}, {options.frames} frames", flush=True)
    if torch.cuda.is_available():  # kernels are compiled once
        small = ["demo", "--folder", str(options.folder), "--frames", "500", "--sequence", "100"]
        run([sys.executable, __file__, *small, "--one", "1"])
    first = 0.0
    for count in options.processes:
        done = run([sys.executable, __file__, *sys.argv[1:], "--one", str(count)])
        seconds, each = json.loads(done.output)
        quantizing = max(one["seconds"] for one in each)
        first = first or quantizing
        print(line(count, quantizing, seconds - quantizing, first / quantizing, each), flush=True)


def line(count: int, quantizing: float, starting: float, ratio: float, each: list[Measured]) -> str:
    """Return what is printed of a number of processes."""
    memory = {kind: ", ".join(f"{one[kind] / 2**30:.2f}" for one in each) for kind in ("gpu", "resident")}
    return (
        f"{count} process{'es' if count > 1 else ''}: {quantizing:.1f} s, {ratio:.2f} times as fast; "
        f"{starting:.1f} s to start; GiB of each: GPU {memory['gpu']}; resident {memory['resident']}"
    )


def quantized(where: str, count: int, frames: int, sequence: int, folder: Path) -> tuple[float, list[Measured]]:
    """Quantize a source by some processes; return the seconds of all of it, and what each of them measured."""
    each: list[Measured] = []

    def together(function: Callable[[Workers], object], size: int) -> None:
        each.extend(compute_together(partial(gptq_gpus.measured, function), size))

    layerwise_processes.compute_together = together  # type: ignore[attr-defined, assignment]
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with open_source(locate(where)) as source, QuantizedStore(folder, "x") as store:
            recipe = uniform(QuantizationConfig(4, 64, "gptq"), "speech-swift", "float16", ("temporal", "depformer"))
            plan = make_plan(preparation.inventory(source), recipe)
            tokens = random_tokens(source, frames // sequence, sequence)
            start = time.perf_counter()
            if count == 1:
                each.append(measured(lambda _: quantize_model(source, plan.outputs, tokens, store), Workers()))
            else:
                layerwise_processes.quantize_together(count, source, plan.outputs, tokens, store, False, operations)
            return time.perf_counter() - start, each
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measured(function: Callable[[Workers], Any], workers: Workers) -> Measured:
    """Call a function; return what that took in this process."""
    start = time.perf_counter()
    function(workers)
    seconds = time.perf_counter() - start
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"seconds": seconds, "gpu": gpu, "resident": own_memory()}


if __name__ == "__main__":
    main()
