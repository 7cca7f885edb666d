"""A whole verification: is the bundle whole, are its weights the checkpoint's, and does it predict what that does?"""

import platform
import time
from collections.abc import Iterable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..convert import typed_json
from ..convert.bundle.manifest import TOOLKIT, Manifest
from ..convert.bundle.reader import Bundle, Layout, layout_of
from ..convert.errors import UserError, printable
from ..convert.file_names import MANIFEST, TOKENIZER, WEIGHTS
from ..convert.progress import bar, byte_bar, long_step
from ..convert.source.scan import hash_file
from ..convert.source.source import Source
from ..convert.source.tensors import roles
from ..model import kernel_test
from ..model import torch_device as devices
from ..model.kernel_test import KernelRow
from ..model.matmul import QuantizedMatmul
from ..model.mlx_device import computing_on, on_gpu, streams
from ..model.prompt import PROMPT, prompt_tokens
from ..model.session import PAUSE
from ..model.tokens import DEFAULT_FRAMES, DEFAULT_SEQUENCES, TokenSet, evenly_spaced, from_system_prompt, read_tokens
from . import limits, rollout, structure
from .comparison import Measured, compare
from .options import VerifyOptions

LIBRARIES = ("mlx", "numpy", "torch")


def token_set_of(source: Source, request: VerifyOptions) -> TokenSet:
    """Return what a request asks to read."""
    a, folder = source.architecture, source.location.folder
    if request.tokens:
        return read_tokens(request.tokens, a, request.sequences, request.frames)
    if request.audio:
        from ..speak.recordings import read_audio

        return read_audio(request.audio, source, request.frames)
    voices = [voice.name for voice in source.voices]
    chosen = [voices[index] for index in evenly_spaced(len(voices), request.sequences or DEFAULT_SEQUENCES)]
    text = prompt_tokens(folder / TOKENIZER, a, PROMPT)
    return from_system_prompt(a, source.voices, chosen, text, request.frames or DEFAULT_FRAMES, PROMPT)


def verify(
    source: Source,
    folder: Path,
    request: VerifyOptions,
    command: str,
    quiet: bool = False,
    same_source: bool = False,
    matmul: QuantizedMatmul | None = None,
) -> dict[str, Any]:
    """Compare a bundle with its source; return the report (docs/verification.md).

    command: what the report says to run again. same_source: whether it is known that the bundle was made from this.
    products: how MLX multiplies by packed weights, as it does on the device for None. Raises UserError for what cannot
    be compared: no bundle, another source, tokens of another model.
    """
    with computing_on(request.device):
        return _verify(source, folder, request, command, quiet, same_source, matmul)


def _verify(
    source: Source,
    folder: Path,
    request: VerifyOptions,
    command: str,
    quiet: bool,
    same_source: bool,
    matmul: QuantizedMatmul | None,
) -> dict[str, Any]:
    began = time.time()
    manifest, layout = layout_of(folder)
    if not same_source:
        _check_origin(source, manifest, quiet)
    token_set = token_set_of(source, request)
    total = manifest.nbytes
    with byte_bar("hashing bundle", total, quiet) as progress:
        problems, readable = structure.problems(folder, manifest, layout, source, progress)
    problems = [printable(problem) for problem in problems]
    half = source.architecture.n_q // 2
    held_to = limits.limits_of(manifest, layout.every(), half)
    arithmetic = manifest.dtype if request.arithmetic == "bundle" else "float32"
    tests, matmul = _kernels(layout, manifest.dtype, arithmetic, matmul, quiet)
    report: dict[str, Any] = {
        "verdict": {},
        "limits": held_to,
        "looser_limits": limits.looser(held_to, manifest, layout.every(), half),
        "bundle": _identity(folder, manifest, total),
        "source": {key: manifest.source.to_json()[key] for key in ("id", "revision", "files")},
        "material": typed_json.to_json(token_set.description),
        "arithmetic": arithmetic,
        "structure": {"problems": problems, "files": len(manifest.files), "tensors": _count(layout)},
        "kernels": typed_json.to_json(tests),
        "weights": [],
        "activations": [],
        "predictions": {},
        "rollout": None,
        "round_trip": None,
        "ran_on": _ran_on(request),
        "command": command,
    }
    if readable:
        with closing(Bundle(folder, manifest, layout)) as stored:
            _measure(report, source, stored, token_set, request, matmul, quiet)
    if report["predictions"] and arithmetic != "float32":
        report["limits"] = limits.with_noise(held_to, report["predictions"])
    report["verdict"] = _verdict(report, tests, manifest, half)
    report["times"] = {"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))}
    report["times"]["seconds"] = round(time.time() - began, 1)
    return report


def _kernels(
    layout: Layout, dtype: str, arithmetic: str, matmul: QuantizedMatmul | None, quiet: bool
) -> tuple[list[KernelRow], QuantizedMatmul]:
    """Test the kernels that a bundle needs; return the report's rows, and products that work around what is wrong."""
    shapes = kernel_test.shapes_of(layout, dtype, arithmetic, len(streams()))
    label = "compiling and testing kernels" if on_gpu() else "testing kernels"
    with long_step(label, len(shapes), "shape", quiet and not on_gpu()) as progress:
        return kernel_test.check(shapes, matmul, progress.update)


def _measure(
    report: dict[str, Any],
    source: Source,
    stored: Bundle,
    token_set: TokenSet,
    request: VerifyOptions,
    matmul: QuantizedMatmul,
    quiet: bool,
) -> None:
    """Fill in what only a bundle tells that can be read."""
    wrong = structure.voice_problems(stored, source.voices)
    report["structure"]["problems"] += wrong
    voices = source.voices if wrong else stored.voices()  # a broken voice is said, and hides nothing else
    size = sum(2 * role.shape[0] * role.shape[-1] for role in roles(source.architecture).values())
    with byte_bar("comparing", size, quiet) as progress:
        where = _torch_device(request)
        found: Measured = compare(source, stored, token_set, voices, progress, report["arithmetic"], where, matmul)
    report["weights"], report["activations"] = found.weights, found.activations
    report["predictions"] = found.predictions
    if request.rollout and not wrong:  # a session begins with a voice
        report["rollout"] = _roll(source, stored, token_set, request, report["arithmetic"], matmul, quiet)


def _roll(
    source: Source,
    stored: Bundle,
    token_set: TokenSet,
    request: VerifyOptions,
    arithmetic: str,
    matmul: QuantizedMatmul,
    quiet: bool,
) -> dict[str, Any]:
    a = source.architecture
    text = prompt_tokens(source.location.folder / TOKENIZER, a, PROMPT)
    played = rollout.script(source, token_set, text, request.rollout)
    total = 2 * (len(text) + 2 * PAUSE + request.rollout)
    with bar("speaking", total, "frame", quiet) as progress:
        return rollout.run(source, stored, played, progress, arithmetic, _torch_device(request), matmul)


def _verdict(report: dict[str, Any], tests: list[KernelRow], manifest: Manifest, agent_steps: int) -> dict[str, Any]:
    """Return whether a report passes, and every reason why it does not, the most telling first."""
    found = [
        limits.failure("structure", problem.split(": ")[0], problem) for problem in report["structure"]["problems"]
    ]
    broken = _broken_kernels(tests)  # nothing that was computed can be judged then
    found += broken
    if report["weights"]:
        found += limits.weight_failures(report["weights"], manifest)
    if report["predictions"] and not broken:
        held_to, activations = report["limits"], report["activations"]
        found += limits.prediction_failures(report["predictions"], held_to, activations, agent_steps)
    elif not found:
        found.append(limits.failure("predictions", "bundle", "nothing was compared"))
    return {"passed": not found, "failures": found}


def _check_origin(source: Source, manifest: Manifest, quiet: bool) -> None:
    """Raise UserError if a bundle was made from other weights than the source's."""
    recorded = manifest.source.files.get(WEIGHTS)
    path = source.location.folder / WEIGHTS
    with byte_bar("hashing source", path.stat().st_size, quiet) as progress:
        found = hash_file(path, progress).sha256
    if recorded is None or found != recorded.sha256:
        raise UserError(
            f"{source.location.identity}: its {WEIGHTS} is not the one that the bundle was made from "
            f"({manifest.source.id}): give that one as --reference"
        )


def _identity(folder: Path, manifest: Manifest, total: int) -> dict[str, Any]:
    keys = ("fingerprint", "target", "dtype", "bits_per_weight", "parameters", "files")
    size = total + (folder / MANIFEST).stat().st_size
    recorded = manifest.to_json()
    return {"recipe": manifest.recipe.name, "bytes": size} | {key: recorded[key] for key in keys}


def _count(layout: Layout) -> int:
    return sum(len(output.specs()) for output in layout.every())


def _ran_on(request: VerifyOptions) -> dict[str, Any]:
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "device": {"mlx": str(mx.default_device()), "torch": _torch_device(request)},
        "python": platform.python_version(),
        "toolkit": f"{TOOLKIT} {version(TOOLKIT)}",
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _torch_device(request: VerifyOptions) -> str:
    return "cpu" if request.device == "cpu" else devices.device()


def _broken_kernels(rows: Iterable[KernelRow]) -> list[dict[str, Any]]:
    """Return what a verdict says of kernels that nothing works around."""
    return [
        limits.failure("kernels", str(row.shape), kernel_test.complaint(row), row.relative_l2, row.bound)
        for row in kernel_test.failures(rows)
    ]
