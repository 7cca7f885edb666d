"""How long a frame takes a bundle on this machine, and how long it must take at least."""

import platform
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..convert import typed_json
from ..convert.bundle.describe import size
from ..convert.bundle.reader import open_bundle
from ..convert.errors import UserError
from ..convert.file_names import CODEC, CONFIG
from ..convert.parallel import cores
from ..convert.progress import bar
from ..convert.source.architecture import read_config
from ..convert.source.mimi import FRAME, RATE
from ..convert.typed_json import Key
from ..model.matmul import QuantizedMatmul
from ..model.mlx_device import computing_on, streams
from ..model.mlx_model import arithmetic_of
from ..model.session import PAUSE, no_voice, system_prompt
from . import loader
from .codec import Codec
from .generation import Conversation, compilation_progress
from .kernel_cache import on_tested_kernels
from .sampling import sampling_of

DEFAULT_FRAMES = 125  # 10 seconds
_WARM_UP = 3  # frames that are not counted
_PROMPT_TOKENS = 25  # about what the usual prompt has
_MOVED = 1 << 28  # bytes that are copied to measure the memory's speed
_ROUNDS = 5


@dataclass(frozen=True)
class FrameTimes:
    """Seconds of a frame: percentiles and mean."""

    p50: float
    p95: float
    p99: float
    mean: float


@dataclass(frozen=True)
class PartTimes:
    """Seconds that a part of a frame takes: median, and what 95 % take at most."""

    p50: float
    p95: float


@dataclass(frozen=True)
class Prefill:
    """Seconds of the voice and the prompt, and how many frames they are."""

    seconds: float
    frames: int


@dataclass(frozen=True)
class PeakMemory:
    """Peak bytes of the process, and of MLX."""

    process: int
    mlx: int


@dataclass(frozen=True)
class Benchmark:
    """Speed of a bundle on this machine; times in seconds.

    real_time_factor: mean time of a frame, codec included, over its 80 ms. parts: mean time of each part of a frame,
    evaluated apart. table: percentiles of the same parts, and of a whole frame as it runs (``total``), codec included
    where there is one. worked_around: kernels that MLX computes wrongly, a line each. bytes_per_frame: weights and KV
    cache that a frame reads; bandwidth: bytes a second of the memory; bound: their ratio, the least time of a frame.
    """

    frame: FrameTimes
    real_time_factor: float
    first_frame: float
    load: float
    kernel_test: float
    worked_around: tuple[str, ...]
    prefill: Prefill
    parts: dict[str, float]
    table: dict[str, PartTimes]
    bytes_per_frame: Annotated[int, Key("bytes_a_frame")]
    bandwidth: float
    bound: float
    peak_memory: PeakMemory
    frames: int
    steps: int
    recipe: str
    target: str
    arithmetic: str
    ran_on: str

    def to_json(self) -> dict[str, Any]:
        """Return it for a program to read."""
        return dict(typed_json.to_json(self))

    @classmethod
    def from_json(cls, data: Any) -> "Benchmark":
        """Return what ``ppx-bench`` printed as JSON; raises ValueError for anything else."""
        return typed_json.from_json(cls, data)


def measure(
    bundle: str | Path,
    frames: int = DEFAULT_FRAMES,
    *,
    context_frames: int = 0,
    arithmetic: str | None = None,
    codec: Path | None = None,
    device: str | None = None,
    quiet: bool = True,
    silent: bool = True,
    matmul: QuantizedMatmul | None = None,
) -> Benchmark:
    """Speak so many frames with a bundle; return what ``ppx-bench`` prints. Times in seconds.

    context_frames: frames of conversation that lie behind the first; 0 for a voice and a prompt. codec: Mimi's weights,
    None for the bundle's. device: None for MLX's choice. quiet: no progress bar. silent: not to announce what takes
    long. matmul: how MLX multiplies by packed weights, as it does here for None. Raises UserError for what is not a
    bundle, and CheckFailed where MLX computes wrongly and nothing works around it.
    """
    with computing_on(device), bar("speaking", frames, "frame", quiet) as progress:
        return _measure(Path(bundle), frames, context_frames, arithmetic, codec, progress, silent, matmul)


def _measure(
    folder: Path,
    frames: int,
    context_frames: int,
    arithmetic: str | None,
    codec: Path | None,
    progress: "tqdm[Any]",
    silent: bool,
    matmul: QuantizedMatmul | None,
) -> Benchmark:
    began = time.perf_counter()
    with closing(open_bundle(folder)) as bundle:
        manifest, layout = bundle.manifest, bundle.layout
        model = loader.load(bundle, arithmetic_of(arithmetic, manifest.dtype))
        voice = next(iter(bundle.voices()), no_voice(bundle.architecture))
    loaded = time.perf_counter() - began
    began = time.perf_counter()
    model = on_tested_kernels(model, silent, matmul)
    testing = time.perf_counter() - began
    random = np.random.default_rng(0)
    a = model.architecture
    text = random.integers(0, a.text_card, _PROMPT_TOKENS)
    extra = max(0, context_frames - len(voice.embeddings) - len(text) - 2 * PAUSE)
    prompt = system_prompt(a, [*text.tolist(), *[a.text_padding] * extra])
    began = time.perf_counter()
    with compilation_progress(silent) as compiled:
        conversation = Conversation(model, voice, prompt, sampling_of(read_config(folder / CONFIG)))
        prefill = time.perf_counter() - began
        compiled.update()
        began = time.perf_counter()
        conversation.compile()
        first_frame = time.perf_counter() - began
        compiled.update()
    users = random.integers(0, a.card, (_WARM_UP + frames, a.n_q // 2))
    took = []
    for number, user in enumerate(users):
        began = time.perf_counter()
        conversation.step(user)
        took.append(time.perf_counter() - began)
        progress.update(number >= _WARM_UP)
    apart = _parts(conversation, users[_WARM_UP:])
    with nullcontext() if codec else suppress(UserError):  # a bundle's own may be a stand-in
        apart |= _codec_parts(codec or folder / layout.target.copies[CODEC], a.n_q // 2, min(frames, 25))
    times, share = np.array(took[_WARM_UP:]), {name: float(np.mean(seconds)) for name, seconds in apart.items()}
    table = {name: _percentiles(seconds) for name, seconds in apart.items()}
    whole, codec_times = _percentiles(times), table.get("codec", PartTimes(0.0, 0.0))
    table["total"] = PartTimes(whole.p50 + codec_times.p50, whole.p95 + codec_times.p95)
    speed, read = bandwidth(), sum(model.weights.values()) + _kv_cache_bytes(conversation)
    p50, p95, p99 = (float(np.percentile(times, part)) for part in (50, 95, 99))
    return Benchmark(
        frame=FrameTimes(p50, p95, p99, mean=float(times.mean())),
        real_time_factor=float((times.mean() + share.get("codec", 0.0)) / (FRAME / RATE)),
        first_frame=first_frame,
        load=loaded,
        kernel_test=testing,
        worked_around=tuple(model.matmul.workarounds()),
        prefill=Prefill(prefill, len(voice.embeddings) + len(prompt)),
        parts=share,
        table=table,
        bytes_per_frame=read,
        bandwidth=speed,
        bound=read / speed,
        peak_memory=PeakMemory(_peak(), mx.get_peak_memory()),
        frames=frames,
        steps=len(model.steps),
        recipe=manifest.recipe.name,
        target=manifest.target,
        arithmetic=str(model.dtype).removeprefix("mlx.core."),
        ran_on=f"{platform.system()} {platform.machine()}, {cores()} cores, {mx.default_device()}",
    )


def _percentiles(seconds: Sequence[float] | NDArray[np.float64]) -> PartTimes:
    return PartTimes(*(float(np.percentile(seconds, part)) for part in (50, 95)))


def _parts(conversation: Conversation, users: NDArray[np.int64]) -> dict[str, list[float]]:
    """Return the seconds of each transformer, evaluated apart, by frame."""
    timed = [conversation.timed(user) for user in users]
    return {name: [times[name] for times in timed] for name in ("temporal", "depformer")}


def _codec_parts(path: Path, codebooks: int, frames: int) -> dict[str, list[float]]:
    """Return the codec's seconds, encoding and decoding, by frame."""
    codec = Codec(path, codebooks)
    sound = np.random.default_rng(0).standard_normal((frames + _WARM_UP, FRAME), np.float32) * 0.1
    took = []
    for frame in sound:
        began = time.perf_counter()
        codec.decode(codec.encode(frame))
        took.append(time.perf_counter() - began)
    return {"codec": took[_WARM_UP:]}


def _kv_cache_bytes(conversation: Conversation) -> int:
    """Return the bytes of keys and values that a frame reads."""
    kv_cache = conversation.kv_cache
    return sum(array.nbytes for array in (*kv_cache.keys, *kv_cache.values))


def bandwidth() -> float:
    """Return how many bytes a second this device's memory reads and writes: the best of some large copies."""
    among = streams()
    blocks = [mx.zeros(_MOVED // 4 // len(among), mx.float32) for _ in among]
    mx.eval(blocks)
    best = 0.0
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        mx.eval([mx.add(block, 1, stream=stream) for block, stream in zip(blocks, among, strict=True)])
        best = max(best, 2 * _MOVED / (time.perf_counter() - began))
    return best


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def verdict(figures: Benchmark) -> str:
    """Return whether one can talk to it: by what 95 % of the frames take, since one late frame is heard."""
    total, lasts = figures.table["total"], FRAME / RATE
    measured = "codec" in figures.table
    codec = "" if measured else "; sound is not in it: the bundle's codec does not load"
    factor = f"95 % of frames take at most {_ms(total.p95)} of {_ms(lasts)}, real time factor {total.p95 / lasts:.2f}"
    if total.p95 < lasts:
        return f"{'fast enough to talk to' if measured else 'the model alone is fast enough'}: {factor}{codec}"
    if total.p50 < lasts:
        return f"too slow to talk to, it would stutter: {factor}{codec}; half of them take at most {_ms(total.p50)}"
    return f"too slow to talk to: {factor}{codec}"


def text(figures: Benchmark) -> str:
    """Return what is printed for people: one table, one verdict, and what stands behind them."""
    prefill, memory, lasts = figures.prefill, figures.peak_memory, FRAME / RATE
    lines = [
        f"{figures.recipe} for {figures.target}, activations in {figures.arithmetic}; {figures.ran_on}",
        f"{'ms a frame':<12}{'median':>9}{'95 %':>9}{'of 80 ms':>10}",
        *(
            f"{name:<12}{1000 * times.p50:>9.1f}{1000 * times.p95:>9.1f}{times.p50 / lasts:>10.0%}"
            for name, times in figures.table.items()
        ),
        verdict(figures),
        f"at least {_ms(figures.bound)}: {size(figures.bytes_per_frame)} a frame at {size(figures.bandwidth)}/s",
        f"voice and prompt: {prefill.seconds:.2f} s for {prefill.frames} frames; first frame "
        f"{figures.first_frame:.2f} s; loading {figures.load:.2f} s",
        *(f"MLX computes quantized_matmul wrongly here; worked around: {line}" for line in figures.worked_around),
        f"peak memory: {size(memory.process)} of the process, {size(memory.mlx)} in MLX",
    ]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
