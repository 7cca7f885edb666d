"""What data buys: the divergence that rounding by data leaves, by method, and by the number of calibration frames.

    python benchmarks/calibration.py SOURCE --calibration TOKENS ... --heldout TOKENS [--rows NAME ...]
        [--refine STEPS] [--frames-per-column N ...] [--folder DIR] [--picture FILE.svg]

All in PyTorch, on a GPU if there is one: no bundle is written. Divergence from the float32 reference in nats/token, on
held-out sequences. Sequences of several calibration files are cut to the length of the shortest. Frames per column are
of the widest matrix (the second of the MLP). What was measured stays in the folder; a row that is there is not measured
again. The picture shows the curves of all models in the folder.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ppx.calibrate import layerwise, tuning
from ppx.calibrate.quantized_model import quantized_weights
from ppx.convert import preparation
from ppx.convert.bundle.plan import Plan, make_plan
from ppx.convert.bundle.quantized_store import QuantizedStore, quantizations_of
from ppx.convert.bundle.recipe import uniform
from ppx.convert.source.source import Source, locate, open_source
from ppx.model import torch_device
from ppx.model.divergence import kl_divergence
from ppx.model.reference import TorchModel, kept_whole, reference_of
from ppx.model.tokens import TokenSet, evenly_spaced, from_tokens, read_token_file
from ppx.model.weights import kept_by
from ppx.quant.affine import DATA_DRIVEN, QuantizationConfig
from torch.nn.functional import log_softmax

METHODS = ("rtn", "mse-unweighted", "lsq", "gptq", "gptq, refined")
ROWS = [f"{bits} bit, {method}" for bits in (4, 3) for method in METHODS]
FRAMES_PER_COLUMN = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_AT_ONCE = 4  # sequences


def figures(model: TorchModel, reference: TorchModel, held: TokenSet) -> dict[str, float]:
    """Return the mean divergence of text, codebook 0 and agent, and the agent's top-1 agreement."""
    half = reference.architecture.n_q // 2
    sums, counts, same = np.zeros(half + 1), np.zeros(half + 1), 0.0
    for first in range(0, len(held.tokens), _AT_ONCE):
        some = held.chosen(np.arange(first, min(first + _AT_ONCE, len(held.tokens))))
        pair = [one.logits(some.tokens, some.targets, half) for one in (model, reference)]
        counted = torch.from_numpy(some.counted[:, : half + 1]).to(pair[0][0].device)
        for stream in range(half + 1):
            actual, expected = (text if stream == 0 else audio[:, :, stream - 1] for text, audio in pair)
            each = kl_divergence(log_softmax(actual, -1), log_softmax(expected, -1))
            sums[stream] += float((each * counted[:, stream]).double().sum())
            counts[stream] += int(counted[:, stream].sum())
            if stream:
                same += int(((actual.argmax(-1) == expected.argmax(-1)) & counted[:, stream]).sum())
    mean = sums / counts
    return {
        "text": float(mean[0]),
        "codebook_0": float(mean[1]),
        "agent": float(mean[1:].mean()),
        "agreement": same / float(counts[1:].sum()),
    }


def measure(
    source: Source, reference: TorchModel, plan: Plan, calibration: TokenSet, held: TokenSet, steps: int
) -> dict[str, float]:
    """Quantize in a temporary folder; return the figures, and what it took."""
    quantizations = quantizations_of(plan.outputs)
    with tempfile.TemporaryDirectory() as folder, QuantizedStore(Path(folder) / "store", "benchmark") as store:
        begin = time.monotonic()
        if any(quantization.method in DATA_DRIVEN for quantization, _ in quantizations.values()):
            layerwise.quantize_model(source, plan.outputs, calibration, store)
            if steps:
                tuning.fine_tune(source, plan.outputs, calibration, store, tuning.Schedule(steps))
        seconds = time.monotonic() - begin
        weights = kept_by({}, quantized_weights(source, quantizations, store), reference.device)
        with torch.inference_mode():
            found = figures(replace(reference, weights=weights), reference, held)
    return {**found, "seconds": seconds, "frames": calibration.tokens.shape[0] * calibration.tokens.shape[2]}


def some_frames(source: Source, paths: Sequence[Path], frames: int | None) -> TokenSet:
    """Return about so many calibration frames: parts of as few sequences as hold them, evenly spaced; None for all."""
    files = [read_token_file(path, source.architecture) for path in paths]
    shortest = min(one.shape[2] for one in files)
    tokens = np.concatenate([one[:, :, :shortest] for one in files])
    if frames is not None:
        count = min(len(tokens), -(-frames // tokens.shape[2]))
        tokens = tokens[evenly_spaced(len(tokens), count), :, : max(frames // count, 4)]
    return from_tokens(tokens, source.architecture)


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| | frames | text | codebook 0 | agent | agreement | seconds |", "| --- |" + " --- |" * 6]
    for name, row in found.items():
        values = " | ".join(f"{row[stream]:.4f}" for stream in ("text", "codebook_0", "agent"))
        lines.append(f"| {name} | {row['frames']:.0f} | {values} | {row['agreement']:.3f} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def draw(folder: Path, path: Path) -> None:
    """Draw the agent's divergence over the frames per column, of each model in the folder."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ppx", "font.size": 8})
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    curves: dict[str, dict[float, float]] = {}
    plain: dict[str, float] = {}
    for file in sorted(folder.glob("*.json")):
        row, (model, name) = json.loads(file.read_text()), file.stem.split("+")
        if name.endswith("frames-per-column"):
            curves.setdefault(model, {})[float(name.split("-")[0])] = row["agent"]
        elif name == "4-bit-lsq":
            plain[model] = row["agent"]
    for number, (model, curve) in enumerate(sorted(curves.items())):
        colour = f"C{number}"
        axis.plot(*zip(*sorted(curve.items()), strict=True), "o-", color=colour, markersize=4, label=f"{model}, gptq")
        if model in plain:
            axis.axhline(plain[model], color=colour, linestyle=":", label=f"{model}, mse (no data)")
    axis.set_xscale("log", base=2)
    axis.set_xticks(FRAMES_PER_COLUMN, ["¼", "½", "1", "2", "4", "8", "16"])
    axis.set_yscale("log")
    axis.set_xlabel("calibration frames per column of the widest matrix")
    axis.set_ylabel("agent's divergence, nats/token")
    axis.grid(alpha=0.25, which="both")
    axis.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=[], help="[default: none]")
    parser.add_argument("--refine", type=int, default=400, help="steps of the rows that are refined")
    parser.add_argument("--frames-per-column", nargs="*", type=float, default=[])
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-calibration"), help="kept")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    with open_source(locate(str(options.source))) as source:
        a = source.architecture
        held = from_tokens(read_token_file(options.heldout, a)[: options.sequences, :, : options.frames], a)
        reference = kept_whole(reference_of(source.checkpoint, device=torch_device.device()))
        wanted: list[tuple[str, float | None]] = [(row, None) for row in options.rows]
        wanted += [(f"{few:g} frames per column", few) for few in options.frames_per_column]
        for name, few in wanted:
            file = options.folder / f"{options.source.name}+{name.replace(' ', '-').replace(',', '')}.json"
            bits, method = (4, "gptq") if few is not None else (int(name[0]), name.split(", ")[1])
            if not file.is_file():
                recipe = uniform(
                    QuantizationConfig(bits, 64, method), "speech-swift", "float16", ("temporal", "depformer")
                )
                plan = make_plan(preparation.inventory(source), recipe)
                calibration = some_frames(source, options.calibration, None if few is None else int(few * a.hidden))
                steps = options.refine if name.endswith("refined") else 0
                row = measure(source, reference, plan, calibration, held, steps)
                file.write_text(json.dumps(row, indent=1) + "\n")
            found[name] = json.loads(file.read_text())
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    print(table(found))
    if options.picture:
        draw(options.folder, options.picture)


if __name__ == "__main__":
    main()
