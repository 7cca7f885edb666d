"""Time and memory of ``--method gptq`` on whole layers of real size, and what follows for the 7B model.

    python benchmarks/gptq.py [--frames 2048] [--sequence 256] [--refine STEPS] [--folder DIR]

Makes a source with PersonaPlex's widths and one layer of each transformer (random weights, random tokens), and
quantizes it as a conversion does: every matrix of a layer by what its inputs are. Beside each block's seconds stands
how many times as long that is as one pass of the original through it, in the same run. The whole model's time is the
sum of what it has of each. The forecast, made before, stands beside what it took: by the clock, and in processors'
time, which other work on the machine changes less. Memory is the largest ``ru_maxrss`` above a Python that imports the
same and does nothing. Needs 3 GB of disk.
"""

import argparse
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ppx.calibrate import layerwise, rates
from ppx.calibrate.block_tuning import BlockTuning
from ppx.calibrate.dataset import write
from ppx.calibrate.work import gptq_work
from ppx.convert import preparation
from ppx.convert.bundle.plan import make_plan
from ppx.convert.bundle.quantized_store import QuantizedStore
from ppx.convert.bundle.recipe import uniform
from ppx.convert.parallel import cores
from ppx.convert.source import demo
from ppx.convert.source.architecture import Architecture
from ppx.convert.source.source import Source, locate, open_source
from ppx.model import torch_device
from ppx.model.blocks import Block
from ppx.model.tokens import read_tokens
from ppx.quant.affine import QuantizationConfig
from processes import own_memory, run

WHOLE = Architecture()
CLOCKS = {"by the clock": time.perf_counter, "processors": time.process_time}
IMPORTS = "import torch, ppx.calibrate.dataset"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2048)
    parser.add_argument("--sequence", type=int, default=256, help="frames of a sequence")
    parser.add_argument("--refine", type=int, default=0, help="steps that each block is tuned for")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-gptq"), help="made and removed")
    options = parser.parse_args()
    idle = run([sys.executable, "-c", IMPORTS]).memory
    options.folder.mkdir()
    try:
        solve(options, idle)
    finally:
        shutil.rmtree(options.folder)


def solve(options: argparse.Namespace, idle: int) -> None:
    """Make the source, quantize it, and print what it took."""
    one = replace(WHOLE, num_layers=1, depformer_num_layers=1)
    demo.make("demo", options.folder / "source", quiet=True, architecture=one)
    with open_source(locate(str(options.folder / "source"))) as source:
        solve_source(source, one, options, idle)


def solve_source(source: Source, one: Architecture, options: argparse.Namespace, idle: int) -> None:
    """Quantize a source, and print what it took."""
    random, count = np.random.default_rng(0), options.frames // options.sequence
    shape = (count, 1 + one.n_q, options.sequence)
    tokens = np.minimum(random.integers(0, one.text_card, shape), one.card - 1).astype(np.int32)
    write(tokens, options.folder / "tokens.safetensors")
    token_set = read_tokens(options.folder / "tokens.safetensors", one, None, None)
    recipe = uniform(QuantizationConfig(4, 64, "gptq"), "speech-swift", "float16", ("temporal", "depformer"))
    plan = make_plan(preparation.inventory(source), recipe)
    seconds: dict[str, float] = {}
    processors: dict[str, float] = {}
    work = gptq_work(plan, count, options.sequence)
    expected = [rates.measure(one, clock=clock).seconds(work) for clock in CLOCKS.values()]
    at_block, extra = layerwise.LayerwiseRun.at_block, {"original": 0.0, "processors": 0.0}

    @contextmanager
    def timed(run: layerwise.LayerwiseRun, block: Block, streams: layerwise.Streams) -> Iterator[layerwise.Streams]:
        stream = streams["original"].clone()
        start, used = time.perf_counter(), time.process_time()
        run.models["original"].advance(block, stream)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        alone = time.perf_counter() - start
        extra["processors"] += time.process_time() - used
        run.release_weights()
        start, used = time.perf_counter(), time.process_time()
        with at_block(run, block, streams) as computed:
            yield computed
        took = time.perf_counter() - start
        processors[block.component] = processors.get(block.component, 0.0) + time.process_time() - used
        extra["original"] += alone
        seconds[block.component] = seconds.get(block.component, 0.0) + took
        print(f"{block}: {took:.1f} s, {took / alone:.1f} times one pass ({alone:.1f} s)", flush=True)

    layerwise.LayerwiseRun.at_block = timed  # type: ignore[method-assign, assignment]
    start, used = time.perf_counter(), time.process_time()
    tuning = BlockTuning(options.refine)
    with QuantizedStore(options.folder / "solution", "x") as store:
        layerwise.quantize_model(source, plan.outputs, token_set, store, tuning)
    total = time.perf_counter() - start - extra["original"]
    total_of_processors = time.process_time() - used - extra["processors"]
    rest = total - sum(seconds.values())
    for name, forecast, took in zip(CLOCKS, expected, (total, total_of_processors), strict=True):
        print(f"{name}: forecast {forecast:.0f} s, took {took:.0f} s")
    print(f"the 7B model: {_of_all(seconds, total) / 3600:.2f} h, extrapolated; if all {cores()} cores were free,")
    print(f"{_of_all(processors, total_of_processors) / cores() / 3600:.2f} h")
    peak = own_memory()
    memory = peak - idle
    frames = int(token_set.tokens.shape[0] * token_set.tokens.shape[2])
    print(f"{platform.system()} {platform.machine()}, {cores()} cores, {torch_device.device()}, {frames} frames")
    print(f"all else (depformer_in, embeddings): {rest:.1f} s")
    print(f"peak memory above imports {memory / 2**30:.2f} GiB")


def _of_all(layers: dict[str, float], total: float) -> float:
    """Return what all layers take, from what one of each transformer and everything took."""
    more = (WHOLE.num_layers - 1) * layers["temporal"] + (WHOLE.depformer_num_layers - 1) * layers["depformer"]
    return total + more


if __name__ == "__main__":
    main()
