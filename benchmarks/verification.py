"""Time and memory of verifying the full-size demo's 4-bit bundle, beside one pass of the bundle alone in the same run.

    python benchmarks/verification.py [--rounds 1] [--frames 64] [--sequences 1] [--folder DIR]

The pass alone reads the packed weights and computes the same frames with the same MLX model, and compares nothing: what
the comparison costs is the ratio. Both are processes of their own. Memory is the largest ``ru_maxrss``, which counts
file-backed pages too, less that of a Python that imports the same modules and does nothing; beside it stands what
holding both models whole would take. Needs 23 GB of disk.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import mlx.core as mx
from ppx.convert.bundle.reader import Bundle, layout_of
from ppx.convert.parallel import cores
from ppx.convert.source import demo
from ppx.convert.source.source import locate, open_source
from ppx.model.blocks import blocks_of
from ppx.model.mlx_model import model_of
from ppx.verify.options import VerifyOptions
from ppx.verify.verification import token_set_of
from processes import run

IMPORTS = "import ppx.recipes.cli.verify, ppx.verify.verification, ppx.verify.plots, matplotlib.figure"
PROGRAM = [sys.executable, "-m", "ppx.recipes.cli.verify"]


def forward(bundle: Path, frames: int, sequences: int) -> None:
    """Run the forward pass of a bundle alone."""
    mx.set_default_device(mx.cpu)
    with open_source(locate(demo.FULL_SIZE)) as source:
        token_set = token_set_of(source, VerifyOptions(sequences=sequences, frames=frames))
    with closing(Bundle(bundle, *layout_of(bundle))) as stored:
        model, a = model_of(stored), stored.architecture
        x = model.embed(token_set.tokens, token_set.vectors(stored.voices(), a.dim))
        for block in blocks_of(a, "temporal"):
            _, x = model.block(block, x)
        hidden = model.out_norm(x)
        model.text_logits(hidden.reshape(-1, a.dim))
        known = token_set.counted[:, 1]
        rows, tokens = hidden[known], token_set.targets.transpose(0, 2, 1)[known]
        steps = [model.step_input(step, rows, tokens[:, step])[:, None] for step in range(a.steps)]
        x = mx.concatenate([mx.array(step) for step in steps], axis=1).__array__()
        for block in blocks_of(a, "depformer"):
            _, x = model.block(block, x)
        for step in range(a.steps):
            model.audio_logits(step, x[:, step])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-verification"), help="made and removed")
    parser.add_argument("--forward", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forward:
        forward(options.forward, options.frames, options.sequences)
        return
    source = demo.cached(demo.FULL_SIZE)
    options.folder.mkdir()
    try:
        measure(source, options.folder / "bundle", options)
    finally:
        shutil.rmtree(options.folder)


def measure(source: Path, bundle: Path, options: argparse.Namespace) -> None:
    """Convert, then verify and run alone in turns; print the medians."""
    converter = [sys.executable, "-m", "ppx.recipes.cli.convert", demo.FULL_SIZE, "--bits", "4", "--no-verify"]
    subprocess.run([*converter, "--output", str(bundle)], check=True)
    sizes = ["--frames", str(options.frames), "--sequences", str(options.sequences)]
    imports = run([sys.executable, "-c", IMPORTS]).memory
    rows = []
    for number in range(options.rounds):
        alone = run([sys.executable, __file__, "--forward", str(bundle), *sizes]).seconds
        command = [*PROGRAM, str(bundle), "--reference", demo.FULL_SIZE, "--device", "cpu", *sizes]
        done = run(command, allowed=(0, 1))  # failing its limits is no error here
        seconds = done.seconds
        rows.append((seconds, alone, done.memory - imports))
        print(
            f"round {number + 1}: verification {seconds:.0f} s, one pass of the bundle alone {alone:.0f} s", flush=True
        )
    report = json.loads((bundle / "parity" / "report.json").read_text())
    seconds, alone, above = (statistics.median(row[place] for row in rows) for place in range(3))
    whole = sum(path.stat().st_size for path in (source / "model.safetensors", *bundle.glob("*.safetensors")))
    print(
        f"{platform.system()} {platform.machine()}, {cores()} cores, {report['material']['frames']} frames of ", end=""
    )
    print(f"{report['material']['sequences']} sequences, medians of {options.rounds} rounds")
    print(f"verification {seconds:.0f} s, {seconds / alone:.2f} times one pass of the bundle alone ({alone:.0f} s)")
    print(f"peak memory above imports {above / 2**30:.2f} GiB, both models whole {whole / 2**30:.1f} GiB", end="")
    print(f" ({whole / above:.0f} times)")


if __name__ == "__main__":
    main()
