"""A whole verification: the files of a bundle, its weights, and its predictions, against those of its checkpoint."""

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from ..convert.bundle.manifest import TOOLKIT, Manifest
from ..convert.bundle.reader import Bundle, Layout, layout_of
from ..convert.bundle.run_memory import memory_of
from ..convert.errors import Problem, UserError, printable
from ..convert.file_names import MANIFEST
from ..convert.hints import Hint
from ..convert.progress import bar, byte_bar, long_step
from ..convert.source.scan import hash_file
from ..convert.source.source import Source
from ..convert.source.tensors import roles
from ..convert.source.voices import Voice
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
from .figures import Rollout
from .limits import Failure
from .options import VerifyOptions
from .recorded_voices import with_recorded
from .records import BundleIdentity, Devices, Machine, Report, SourceIdentity, Structure, Times, Verdict

LIBRARIES = ("mlx", "numpy", "torch")


def token_set_of(source: Source, request: VerifyOptions) -> TokenSet:
    """Return the tokens that a request asks to read."""
    a = source.architecture
    if request.tokens:
        return read_tokens(request.tokens, a, request.sequences, request.frames)
    if request.audio:
        from ..speak.recordings import read_audio

        return read_audio(request.audio, source, request.frames)
    voices = [voice.name for voice in source.voices]
    chosen = [voices[index] for index in evenly_spaced(len(voices), request.sequences or DEFAULT_SEQUENCES)]
    text = prompt_tokens(source.location.tokenizer, a, PROMPT)
    return from_system_prompt(a, source.voices, chosen, text, request.frames or DEFAULT_FRAMES, PROMPT)


def verify(
    source: Source,
    folder: Path,
    request: VerifyOptions,
    command: str,
    quiet: bool = False,
    same_source: bool = False,
    matmul: QuantizedMatmul | None = None,
) -> Report:
    """Compare a bundle with its source; return the report (docs/verification.md).

    command: what runs this again. same_source: whether it is known that the bundle was made from this source. matmul:
    how MLX multiplies by packed weights, None for the device's usual way. Raises UserError for a folder that is not a
    bundle, another source, and tokens of another model.
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
) -> Report:
    began = time.time()
    manifest, layout = layout_of(folder)
    if not same_source:
        _check_origin(source, manifest, quiet)
    token_set = token_set_of(source, request)
    source, untrue = with_recorded(source, manifest)
    total = manifest.nbytes
    with byte_bar("hashing bundle", total, quiet) as progress:
        checked = structure.check_files(folder, manifest, layout, source, progress)
    problems = untrue + checked.problems
    half = source.architecture.n_q // 2
    arithmetic = manifest.dtype if request.arithmetic == "bundle" else "float32"
    tests, matmul = _kernels(layout, manifest.dtype, arithmetic, matmul, quiet)
    measured, session = Measured(), None
    if checked.readable:
        with closing(Bundle(folder, manifest, layout)) as stored:
            wrong = structure.voice_problems(stored, source.voices)
            problems += wrong
            voices = source.voices if wrong else stored.voices()  # a broken voice is reported, and hides nothing else
            measured = _compare(source, stored, token_set, voices, request, arithmetic, matmul, quiet)
            if request.rollout and not wrong:  # a session begins with a voice
                session = _roll(source, stored, token_set, request, arithmetic, matmul, quiet)
    bounds: dict[str, float | None] = dict.fromkeys(limits.FIGURES)
    if measured.predictions:
        bounds = limits.bounds_of(
            measured.predictions, limits.factors_for(token_set.description), arithmetic, manifest.recipe
        )
    return Report(
        verdict=_verdict(problems, tests, measured, bounds, manifest, half),
        limits=bounds,
        bundle=_identity(folder, manifest, total),
        source=SourceIdentity(manifest.source.id, manifest.source.revision, manifest.source.files),
        tokens=token_set.description,
        arithmetic=arithmetic,
        structure=Structure(tuple(printable(str(one)) for one in problems), len(manifest.files), _count(layout)),
        kernels=tuple(tests),
        weights=tuple(measured.weights),
        activations=tuple(measured.activations),
        predictions=measured.predictions,
        hidden=measured.hidden,
        memory=memory_of(manifest),
        rollout=session,
        round_trip=None,
        ran_on=_machine(request),
        command=command,
        times=Times(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)), round(time.time() - began, 1)),
    )


def _kernels(
    layout: Layout, dtype: str, arithmetic: str, matmul: QuantizedMatmul | None, quiet: bool
) -> tuple[list[KernelRow], QuantizedMatmul]:
    """Test the kernels that a bundle needs; return the rows, and products that work around what is wrong."""
    shapes = kernel_test.shapes_of(layout, dtype, arithmetic, len(streams()))
    label = "compiling and testing kernels" if on_gpu() else "testing kernels"
    step = long_step(label, len(shapes), "shape", False) if on_gpu() else bar(label, len(shapes), "shape", quiet)
    with step as progress:
        return kernel_test.check(shapes, matmul, progress.update)


def _compare(
    source: Source,
    stored: Bundle,
    token_set: TokenSet,
    voices: Sequence[Voice],
    request: VerifyOptions,
    arithmetic: str,
    matmul: QuantizedMatmul,
    quiet: bool,
) -> Measured:
    size = sum(2 * role.shape[0] * role.shape[-1] for role in roles(source.architecture).values())
    with byte_bar("comparing", size, quiet) as progress:
        device, more = _torch_device(request), request.controls
        return compare(source, stored, token_set, voices, progress, arithmetic, device, matmul, more)


def _roll(
    source: Source,
    stored: Bundle,
    token_set: TokenSet,
    request: VerifyOptions,
    arithmetic: str,
    matmul: QuantizedMatmul,
    quiet: bool,
) -> Rollout:
    a = source.architecture
    text = prompt_tokens(source.location.tokenizer, a, PROMPT)
    played = rollout.script(source, token_set, text, request.rollout)
    total = 2 * (len(text) + 2 * PAUSE + request.rollout)
    with bar("speaking", total, "frame", quiet) as progress:
        return rollout.run(source, stored, played, progress, arithmetic, _torch_device(request), matmul)


def _verdict(
    problems: Sequence[Problem],
    tests: Sequence[KernelRow],
    measured: Measured,
    bounds: Mapping[str, float | None],
    manifest: Manifest,
    agent_steps: int,
) -> Verdict:
    """Return whether a bundle passes, and every reason why it does not, the most important first."""
    failures = [limits.failure("structure", problem.place or "bundle", str(problem)) for problem in problems]
    broken = _broken_kernels(tests)  # nothing that was computed can be judged then
    failures += broken
    if measured.weights:
        failures += limits.weight_failures(measured.weights, manifest)
    if measured.predictions and not broken:
        failures += limits.prediction_failures(measured.predictions, bounds, measured.activations, agent_steps)
    elif not failures:
        failures.append(limits.failure("predictions", "bundle", "nothing was compared"))
    return Verdict(passed=not failures, failures=tuple(failures))


def _check_origin(source: Source, manifest: Manifest, quiet: bool) -> None:
    """Raise UserError if a bundle was made from other weights than the source's."""
    with byte_bar("hashing source", source.checkpoint.file.nbytes, quiet) as progress:
        for name in source.location.files.weights:
            recorded = manifest.source.files.get(name)
            actual = hash_file(source.location.folder / name, progress).sha256
            if recorded is None or actual != recorded.sha256:
                raise UserError(
                    f"{source.location.identity}: its {name} is not the one that the bundle was made from "
                    f"({manifest.source.id})",
                    Hint.OTHER_REFERENCE,
                )


def _identity(folder: Path, manifest: Manifest, total: int) -> BundleIdentity:
    return BundleIdentity(
        recipe=manifest.recipe.name,
        bytes=total + (folder / MANIFEST).stat().st_size,
        fingerprint=manifest.fingerprint,
        target=manifest.target,
        dtype=manifest.dtype,
        bits_per_weight=manifest.bits_per_weight,
        parameters=manifest.parameters,
        files=manifest.files,
    )


def _count(layout: Layout) -> int:
    return sum(len(output.specs()) for output in layout.every())


def _machine(request: VerifyOptions) -> Machine:
    return Machine(
        system=platform.system(),
        machine=platform.machine(),
        device=Devices(mlx=str(mx.default_device()), torch=_torch_device(request)),
        python=platform.python_version(),
        toolkit=f"{TOOLKIT} {version(TOOLKIT)}",
        libraries={name: version(name) for name in LIBRARIES},
    )


def _torch_device(request: VerifyOptions) -> str:
    return "cpu" if request.device == "cpu" else devices.device()


def _broken_kernels(rows: Sequence[KernelRow]) -> list[Failure]:
    """Return the failures of kernels that nothing works around."""
    return [
        limits.failure("kernels", str(row.shape), str(kernel_test.complaint(row)), row.relative_l2, row.bound)
        for row in kernel_test.failures(rows)
    ]
