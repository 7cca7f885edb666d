"""How near to its original each recipe and method comes, for how many bytes: a table, and a picture.

    python benchmarks/fidelity.py SOURCE --heldout TOKENS [--calibration TOKENS] [--rows NAME ...] [--folder DIR]
        [--refine STEPS] [--picture FILE.svg] [--recipes-picture FILE.svg]

Each row is a conversion and a verification by the programs that users run, on held-out tokens that nothing was
calibrated on. Sizes are those of the bundle's model without the codec and the voices. What was measured stays in the
folder; a row that is there is not measured again. ``--refine`` adds the rows that tune codes, scales and biases: on a
processor each of its steps takes as long as a pass over 16 sequences, there and back.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ppx.convert.bundle import shipped
from ppx.convert.bundle.manifest import manifest_of
from ppx.convert.bundle.plan import inventory_of_7b, make_plan
from processes import run_program

RTN, LSQ, UNWEIGHTED, GPTQ = (["--method", method] for method in ("rtn", "lsq", "lsq_unweighted", "gptq"))
FOUR, THREE = (["--bits", bits, "--group-size", "64"] for bits in ("4", "3"))
SAME_SIZE = ["--target", "mlx", "--dtype", "float16", "--depformer-steps", "8", "--target-size", "{size}"]
ROWS: dict[str, list[str]] = {
    "4 bit, rtn": [*FOUR, *RTN],
    "4 bit, lsq_unweighted": [*FOUR, *UNWEIGHTED],
    "4 bit, lsq": [*FOUR, *LSQ],
    "4 bit, gptq": [*FOUR, *GPTQ],
    "4 bit, gptq, refined": [*FOUR, *GPTQ, "--refine"],
    "3 bit, rtn": [*THREE, *RTN],
    "3 bit, lsq_unweighted": [*THREE, *UNWEIGHTED],
    "3 bit, lsq": [*THREE, *LSQ],
    "3 bit, gptq": [*THREE, *GPTQ],
    "3 bit, gptq, refined": [*THREE, *GPTQ, "--refine"],
    "moshi-q4, rtn": ["--recipe", "moshi-q4", *RTN],
    "moshi-q4, lsq": ["--recipe", "moshi-q4", *LSQ],
    "moshi-q4, gptq": ["--recipe", "moshi-q4", *GPTQ],
    "moshi-q4, gptq, refined": ["--recipe", "moshi-q4", *GPTQ, "--refine"],
    "4bit-depformer16, lsq": ["--recipe", "4bit-depformer16", *LSQ],
    "5bit, lsq": ["--recipe", "5bit", *LSQ],
    "6bit, lsq": ["--recipe", "6bit", *LSQ],
    "mixed, lsq": ["--recipe", "mixed", *LSQ],
    "mixed, gptq": ["--recipe", "mixed", *GPTQ],
    "4.5 bits per weight, lsq": [*SAME_SIZE[:-2], "--bits-per-weight", "4.5", *LSQ],
    "4.5 bits per weight, gptq": [*SAME_SIZE[:-2], "--bits-per-weight", "4.5", *GPTQ],
    "size of 4 bit, lsq": [*SAME_SIZE, *LSQ],
    "8bit, lsq": ["--recipe", "8bit", *LSQ],
    "moshi-q8, lsq": ["--recipe", "moshi-q8", *LSQ],
}
COLUMNS = ("text", "codebook_0", "agent")
COLOURS = {"rtn": "#7a8288", "lsq_unweighted": "#8fbfe0", "lsq": "#2b7bba", "gptq": "#d9730d", "refined": "#1a7f37"}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Convert and verify for one row; what the table needs of it."""
    held = options.folder / f"{name.replace(' ', '-').replace(',', '')}.json"
    if held.is_file():
        found: dict[str, Any] = json.loads(held.read_text())
        return found
    words = [str(options.size) if word == "{size}" else word for word in ROWS[name]]
    if words[-1] == "--refine":
        words.append(str(options.fine_tune))
    if options.calibration and ("gptq" in words or "--target-size" in words or "--bits-per-weight" in words):
        words += ["--calibration", str(options.calibration)]
    bundle, reusable = options.folder / "bundle", options.folder / "sensitivity.json"
    if reusable.is_file():
        shutil.copy(reusable, options.folder / "bundle.sensitivity.json")
    run_program("convert", str(options.source), *words, "--output", str(bundle), "--no-verify")
    tokens = ["--tokens", str(options.heldout), "--sequences", str(options.sequences), "--frames", str(options.frames)]
    report = json.loads(run_program("verify", str(bundle), "--reference", str(options.source), *tokens, "--json"))
    manifest = manifest_of(bundle)
    found = {stream: report["predictions"][stream]["bundle"]["kl"]["mean"] for stream in COLUMNS}
    found["agreement"] = report["predictions"]["agent"]["bundle"]["top1"]["agreement"]
    found["passed"] = report["verdict"]["passed"]
    found["bits_per_weight"] = manifest.bits_per_weight
    found["bytes"] = int(manifest.bits_per_weight * manifest.parameters / 8)
    found["whole"] = manifest.nbytes
    if (left := options.folder / "bundle.sensitivity.json").is_file():
        left.replace(reusable)
    shutil.rmtree(bundle)
    held.write_text(json.dumps(found, indent=1) + "\n")
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| | MB | bits per weight | text | codebook 0 | agent | agreement |", "| --- |" + " --- |" * 6]
    for name, row in found.items():
        figures = " | ".join(f"{row[stream]:.2g}" if row[stream] < 1e-3 else f"{row[stream]:.4f}" for stream in COLUMNS)
        size = f"{row['bytes'] / 1e6:.1f} | {row['bits_per_weight']:.2f}"
        lines.append(f"| {name} | {size} | {figures} | {row['agreement']:.3f} |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the agent's divergence over the size."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ppx", "font.size": 8})
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
    for name, row in found.items():
        kind = name.rpartition(", ")[2]
        axis.plot(row["bytes"] / 1e6, row["agent"], "o", color=COLOURS[kind], markersize=5)
        axis.annotate(name, (row["bytes"] / 1e6, row["agent"]), xytext=(5, 3), textcoords="offset points", fontsize=6.5)
    axis.set_yscale("log")
    axis.set_xlabel("MB of the model")
    axis.set_ylabel("divergence of the agent's codebooks, nats/token")
    axis.grid(alpha=0.25, which="both")
    figure.savefig(path, metadata={"Date": None})


def draw_recipes(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the agent's divergence, measured, over the size of PersonaPlex-7B's bundle, computed."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ppx", "font.size": 10})
    from matplotlib import pyplot

    inventory = inventory_of_7b("nvidia/personaplex-7b-v1")
    figure, axis = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    for name, row in found.items():
        recipe, _, kind = name.rpartition(", ")
        recipe = recipe.replace(" ", "")
        gigabytes = make_plan(inventory, shipped.load(recipe)).nbytes / 1e9
        label = f"{recipe}, plain rounding" if kind == "rtn" else recipe
        axis.plot(gigabytes, row["agent"], "o", color=COLOURS[kind], markersize=7)
        place = {"moshi-q4": (-6, -12), "4bit-depformer16": (-6, 8)}.get(label, (8, 2 if kind == "rtn" else -4))
        side = "right" if recipe == "moshi-q4" else "left"
        axis.annotate(label, (gigabytes, row["agent"]), xytext=place, textcoords="offset points", ha=side)
    axis.set_xlim(4.5, 11)
    axis.set_yscale("log")
    axis.set_xlabel("size of a PersonaPlex-7B bundle on disk, GB (computed)")
    axis.set_ylabel("divergence, nats/token (small model)")
    axis.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="[default: the model speaks some itself, for every row]")
    parser.add_argument("--rows", nargs="*", choices=ROWS, help="[default: all]")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--refine", dest="fine_tune", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-fidelity"), help="kept")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--recipes-picture", type=Path, help="of --rows with recipes, by the size of 7B's bundles")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    found = {}
    for name in options.rows or [row for row in ROWS if options.fine_tune or not row.endswith("refined")]:
        if name.startswith("size of"):
            options.size = measure("4 bit, lsq", options)["whole"]
        found[name] = measure(name, options)
        row = found[name]
        print(f"{name}: text {row['text']:.5f}, agent {row['agent']:.5f}", file=sys.stderr, flush=True)
    print(table(found))
    if options.picture:
        draw(found, options.picture)
    if options.recipes_picture:
        draw_recipes(found, options.recipes_picture)


if __name__ == "__main__":
    main()
