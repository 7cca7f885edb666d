"""Time of the depformer for a frame, with all 16 steps and with the agent's 8, in the real moshi_mlx, in turns.

    python benchmarks/depformer.py [--frames 20] [--rounds 5] [--folder DIR]

Makes a source with PersonaPlex's depformer and one layer of its temporal transformer (random weights), converts it
with the recipe ``moshi-q4`` twice, and lets moshi_mlx speak frames with both. Needs ``moshi_mlx`` and 3 GB of disk.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from moshi_mlx import models
from moshi_mlx.utils import Sampler
from ppx.convert.parallel import cores
from ppx.convert.source import demo
from ppx.convert.source.architecture import Architecture


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-depformer"), help="made and removed")
    options = parser.parse_args()
    options.folder.mkdir()
    try:
        measure(options)
    finally:
        shutil.rmtree(options.folder)


def load(folder: Path) -> Any:
    """Load a bundle as moshi_mlx's programs do, but in float32: its 16-bit products are slow on processors."""
    config = json.loads((folder / "config.json").read_text())
    model = models.Lm(models.LmConfig.from_config_dict(config))
    nn.quantize(model, bits=4, group_size=32)
    model.load_weights(str(folder / config["moshi_name"]), strict=True)
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
    return model


def measure(options: argparse.Namespace) -> None:
    """Convert twice, speak in turns, print the medians."""
    one = replace(Architecture(), num_layers=1)
    demo.make("demo", options.folder / "source", quiet=True, architecture=one)
    loaded = {}
    for steps in (16, 8):
        bundle = options.folder / f"steps{steps}"
        command = [sys.executable, "-m", "ppx.recipes.cli.convert", str(options.folder / "source")]
        chosen = ["--recipe", "moshi-q4", "--method", "rtn", "--depformer-steps", str(steps), "--no-verify"]
        subprocess.run([*command, *chosen, "--output", str(bundle)], check=True, stdout=subprocess.DEVNULL)
        loaded[steps] = load(bundle)
    greedy, hidden, text = Sampler(temp=0.0), mx.random.normal((1, 1, one.dim)), mx.array([[3]])
    seconds: dict[int, list[float]] = {16: [], 8: []}
    for _ in range(options.rounds + 1):  # the first one warms up
        for steps, model in loaded.items():
            start = time.perf_counter()
            for _ in range(options.frames):
                mx.eval(model.depformer.sample(hidden, greedy, text, model.depformer_cache))
            seconds[steps].append((time.perf_counter() - start) / options.frames)
    whole, half = (statistics.median(seconds[steps][1:]) for steps in (16, 8))
    print(f"{platform.system()} {platform.machine()}, {cores()} cores, {mx.default_device()}, moshi-q4")
    print(
        f"depformer: {1000 * whole:.0f} ms a frame with 16 steps, {1000 * half:.0f} ms with 8: {half / whole:.2f} times"
    )


if __name__ == "__main__":
    main()
