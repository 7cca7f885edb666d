"""Do intact bundles pass, and by how much? Every source at all bits and methods, on the system prompt and on tokens.

    python benchmarks/verdicts.py SOURCE... [--bits 2 3 4 5 6 8] [--methods rtn lsq gptq] [--folder DIR]

Each cell is a conversion and two verifications by the programs that users run; for gptq the first sequences of the
source's ``calibration_tokens.safetensors``, for tokens those of its ``heldout_tokens.safetensors``. Prints for each
limited figure how much of its bound was used, largest last. What was measured stays in the folder; a cell that is there
is not measured again. Ends with 1 if a bundle is not intact.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ppx.quant.affine import BITS
from ppx.verify.limits import FIGURES, apart
from processes import run_program
from safetensors.numpy import load_file, save_file

METHODS = ("rtn", "lsq", "gptq")
SETS = ("system prompt", "tokens")
NAMES = ("bundle", "control")


def measure(source: Path, bits: int, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Convert and verify one cell; its figures, those of the control, and the bounds, by token set."""
    kept = options.folder / f"{source.name}-{bits}-{method}.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    bundle = options.folder / "bundle"
    words = ["--bits", str(bits), "--group-size", "64", "--method", method, "--no-verify", "--output", str(bundle)]
    if method == "gptq":
        words += ["--tokens", str(calibration(source, options))]
    run_program("convert", str(source), *words)
    tokens = ["--tokens", str(source / "heldout_tokens.safetensors")]
    tokens += ["--sequences", str(options.sequences), "--frames", str(options.frames)]
    found = {}
    for name, more in zip(SETS, ([], tokens), strict=True):
        report = json.loads(
            run_program("verify", str(bundle), "--reference", str(source), "--device", "cpu", *more, "--json")
        )
        found[name] = {"intact": report["verdict"]["passed"], "figures": figures(report)}
    shutil.rmtree(bundle)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return found


def figures(report: dict[str, Any]) -> dict[str, list[float]]:
    """Return bundle, control and bound of each limited figure, each as a distance from 0."""
    found = {}
    for limit, stream in FIGURES.items():
        models = report["predictions"][stream]
        of = [models[name]["top1"]["agreement"] if "top1" in limit else models[name]["kl"]["mean"] for name in NAMES]
        found[limit] = [apart(limit, value) for value in (*of, report["limits"][limit])]
    return found


def calibration(source: Path, options: argparse.Namespace) -> Path:
    """Return a file with the first calibration sequences of a source."""
    path: Path = options.folder / f"{source.name}-calibration.safetensors"
    if not path.is_file():
        tokens = load_file(source / "calibration_tokens.safetensors")["tokens"]
        save_file({"tokens": tokens[: options.calibration]}, path)
    return path


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sequences", type=int, default=12, help="held-out sequences")
    parser.add_argument("--frames", type=int, default=100, help="of each")
    parser.add_argument("--calibration", type=int, default=16, help="sequences for gptq")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-verdicts"))
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    used: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    broken = []
    for source in options.sources:
        for bits in options.bits:
            for method in options.methods:
                cells = measure(source, bits, method, options)
                for name, cell in cells.items():
                    label = f"{source.name} {bits} bit {method}, {name}"
                    broken += [] if cell["intact"] else [label]
                    for limit, (bundle, control, bound) in cell["figures"].items():
                        share, ratio = bundle / bound, bundle / control if control else 0.0
                        used.setdefault((limit, name), []).append((share, ratio, label))
                intact = all(cell["intact"] for cell in cells.values())
                print(f"{source.name} {bits} bit {method}: {'intact' if intact else 'not intact'}", flush=True)
    for (limit, name), shares in used.items():
        share, ratio, label = max(shares)
        print(f"{limit}, {name}: at most {share:.0%} of the bound, {ratio:.2f} times plain rounding ({label})")
    print(f"not intact: {'; '.join(broken) or 'none'}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
