"""A conversation's frames here and in the real moshi_mlx: the same weights, the same frames, in turns.

    python benchmarks/speaking.py [SOURCE] [--layers 2] [--frames 30] [--rounds 3] [--device gpu] [--folder DIR]

Without a source it makes one of PersonaPlex's widths with few layers (random weights). It is converted with the recipe
``moshi-q4``, with all 16 depformer steps and with the agent's 8. moshi_mlx reads the columns that were read here, and
must say the same greedy tokens; it computes once in bfloat16, as its programs do, and once in float32, as we do on
processors (on a GPU we compute in bfloat16). Printed are medians over frames, and how many times as long moshi_mlx
takes. Needs ``moshi_mlx``, and 4 GB of disk for a source.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from moshi_mlx import models
from moshi_mlx.utils import Sampler
from ppx.convert.bundle.reader import Bundle, layout_of
from ppx.convert.parallel import cores
from ppx.convert.source import demo
from ppx.convert.source.architecture import Architecture
from ppx.convert.source.voices import Voice
from ppx.model.mlx_device import computing_on, on_gpu
from ppx.speak import loader
from ppx.speak.generation import Conversation
from ppx.speak.sampling import GREEDY

WARM_UP = 5
Frames = list[tuple[float, Any]]  # seconds and tokens of each


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?")
    parser.add_argument("--layers", type=int, default=2, help="of each transformer, of a source that is made")
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where MLX computes; its own choice if left out")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-speaking"), help="made and removed")
    options = parser.parse_args()
    options.folder.mkdir()
    try:
        with computing_on(options.device):
            measure(options)
    finally:
        shutil.rmtree(options.folder)


def ours(folder: Path, arithmetic: str) -> Callable[[Any], tuple[Frames, list[Any]]]:
    """Return a function of input frames that returns their times, the output tokens and the columns read."""
    with closing(Bundle(folder, *layout_of(folder))) as bundle:
        model, voice = loader.load(bundle, arithmetic), bundle.voices()[0]
    silent = Voice(voice.name, voice.embeddings[:0], voice.cache)

    def run(users: Any) -> tuple[Frames, list[Any]]:
        session, found, columns = Conversation(model, silent, [], GREEDY), [], []
        for user in users:
            start = time.perf_counter()
            session.step(user)
            seconds = time.perf_counter() - start
            columns.append(np.array(session.column))
            found.append((seconds, [int(token) for token in session.tokens]))
        return found, columns

    return run


def theirs(folder: Path, dtype: mx.Dtype) -> Callable[[Any], Frames]:
    """Return a way to read columns in moshi_mlx."""
    config = json.loads((folder / "config.json").read_text())
    model = models.Lm(models.LmConfig.from_config_dict(config))
    nn.quantize(model, bits=4, group_size=32)
    model.load_weights(str(folder / config["moshi_name"]), strict=True)
    model.set_dtype(dtype)
    sampler = Sampler(temp=0.0)

    def run(columns: list[Any]) -> Frames:
        for cache in model.transformer_cache:
            cache.reset()
        found = []
        for column in columns:
            start = time.perf_counter()
            tokens = [mx.array([[int(token)]]) for token in column]
            text, audio, _ = model._sample(tokens[0], tokens[1:], sampler, sampler)
            mx.eval(text, audio)
            seconds = time.perf_counter() - start
            found.append((seconds, [text.item(), *np.array(audio).reshape(-1)[:8].tolist()]))
        return found

    return run


def measure(options: argparse.Namespace) -> None:
    """Convert twice, speak in turns, print medians."""
    source = options.source
    if source is None:
        small = replace(Architecture(), num_layers=options.layers, depformer_num_layers=options.layers)
        demo.make("demo", options.folder / "source", quiet=True, architecture=small)
        source = str(options.folder / "source")
    runs: dict[str, Callable[[Any], Frames]] = {}
    for steps in (16, 8):
        bundle = options.folder / f"steps{steps}"
        command = [sys.executable, "-m", "ppx.recipes.cli.convert", source, "--recipe", "moshi-q4", "--no-verify"]
        chosen = ["--method", "rtn", "--depformer-steps", str(steps), "--output", str(bundle)]
        subprocess.run([*command, *chosen], check=True, stdout=subprocess.DEVNULL)
        for dtype in (mx.bfloat16, mx.float32):
            name = str(dtype).removeprefix("mlx.core.")
            runs[f"moshi_mlx, {name}, {steps} depformer steps"] = theirs(bundle, dtype)
    arithmetic = "bfloat16" if on_gpu() else "float32"
    speak, here = ours(options.folder / "steps8", arithmetic), f"here, {arithmetic}"
    card = json.loads((options.folder / "steps8" / "config.json").read_text())["card"]
    users = np.random.default_rng(0).integers(0, card, (WARM_UP + options.frames, 8))
    seconds: dict[str, list[float]] = {name: [] for name in (here, *runs)}
    same: dict[str, list[bool]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        found, columns = speak(users)
        seconds[here] += [took for took, _ in found[WARM_UP:]]
        for name, run in runs.items():
            other = run(columns)
            seconds[name] += [took for took, _ in other[WARM_UP:]]
            same[name] += [
                a == b
                for (_, first), (_, second) in zip(found[WARM_UP:], other[WARM_UP:], strict=True)
                for a, b in zip(first, second, strict=True)
            ]
    print(f"{platform.system()} {platform.machine()}, {cores()} cores, {mx.default_device()}, moshi-q4, {source}")
    least = statistics.median(seconds[here])
    for name, took in seconds.items():
        median = statistics.median(took)
        agree = f", {np.mean(same[name]):.1%} of tokens the same" if name in same else ""
        print(f"{name}: {1000 * median:.1f} ms a frame, {median / least:.2f} times{agree}")


if __name__ == "__main__":
    main()
