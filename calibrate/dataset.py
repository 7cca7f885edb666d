"""What a model is quantized by: conversations."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..convert.bundle.plan import Plan
from ..convert.bundle.quantized_store import LayerwiseQuantizer, QuantizedStore
from ..convert.bundle.records import CalibrationRecord
from ..convert.errors import UserError
from ..convert.hints import Hint
from ..convert.source.source import Source
from ..convert.tensorfile import Spec, TensorWriter
from ..model.forward import Tokens
from ..model.tokens import TokenSet, read_token_file, read_tokens
from .block_tuning import BlockTuning
from .eight_bit_adam import torchao_optimizer
from .forecast import forecast, seconds_of
from .layerwise import quantize_model
from .layerwise_processes import quantize_together
from .low_memory_tuning import fine_tune_in_low_memory
from .tuning import Schedule, fine_tune, trainable_scope
from .work import operations

_REFINED = {  # what a manifest records of fine-tuning, by its scope
    "codes": "codes, scales and biases, all together",
    "low-memory": "codes, scales and biases, all together, in low memory",
    None: "codes, scales and biases, block by block",
}
ENOUGH = 4  # frames for each column of the widest matrix, from which on more help little


def quantizer_of(
    source: Source,
    plan: Plan,
    tokens: Path,
    steps: int = 0,
    quiet: bool = False,
    memory: int | None = None,
    processes: int = 1,
) -> LayerwiseQuantizer:
    """Return what quantizes a plan's matrices with GPTQ, and fine-tunes them for some steps.

    memory: bytes, by which the scope of fine-tuning is chosen; None for the device's. processes: that quantize
    together, each with the GPU of its rank where there are GPUs; what is fine-tuned by one is fine-tuned here. Raises
    UserError for tokens of another model, if a package is missing, and as ``check_scope``.
    """
    check_scope(plan, steps, memory, processes)
    token_set = read_tokens(tokens, source.architecture, None, None)
    whole = trainable_scope(plan.outputs, memory) if steps else None
    if whole == "low-memory":
        torchao_optimizer()  # before the hours that GPTQ may take

    def run(store: QuantizedStore) -> None:
        if not quiet and (expected := forecast(plan, tokens, store.files, processes)):
            sys.stderr.write(f"{expected.text}\n")
        tuning = BlockTuning(0 if whole else steps)
        weigh = operations if quiet else seconds_of(source.architecture)
        if processes == 1:
            quantize_model(source, plan.outputs, token_set, store, tuning, quiet, weigh)
        else:
            quantize_together(processes, source, plan.outputs, token_set, store, quiet, weigh)
        if whole:
            tune = fine_tune if whole == "codes" else fine_tune_in_low_memory
            tune(source, plan.outputs, token_set, store, Schedule(steps), quiet)

    refined = _REFINED[whole] if steps else "nothing"
    return LayerwiseQuantizer(replace(record(token_set), refined_steps=steps, refined=refined), run)


def check_scope(plan: Plan, steps: int, memory: int | None, processes: int) -> None:
    """Raise UserError for several processes where blocks are fine-tuned, which one process does."""
    if processes > 1 and steps and trainable_scope(plan.outputs, memory) is None:
        raise UserError(
            "this model is fine-tuned block by block, as it does not fit into memory whole: one GPU does that",
            Hint.ONE_GPU,
        )


def fingerprint(token_set: TokenSet) -> str:
    """Return the sha256 of calibration tokens."""
    digest = hashlib.sha256()
    for array in (token_set.tokens, token_set.targets, token_set.counted):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def record(token_set: TokenSet) -> CalibrationRecord:
    """Return what a manifest records of calibration tokens: their description, and a sha256."""
    about = token_set.description
    return CalibrationRecord(about.kind, about.file, about.sequences, about.frames, fingerprint(token_set))


def enough(source: Source) -> int:
    """Return how many frames there should be for the widest matrix to be sure of its inputs."""
    return ENOUGH * source.architecture.hidden


def is_scarce(calibration: CalibrationRecord, source: Source) -> bool:
    """Tell whether there are fewer frames than enough."""
    return calibration.sequences * calibration.frames < enough(source)


def gather(source: Source, files: Sequence[Path], recordings: Sequence[Path], frames: int) -> Tokens:
    """Return conversations ``[sequences, streams, frames]``, not delayed, of token files and recordings.

    What is longer is cut into sequences; what is left over, and what is shorter, is not used. Raises UserError for
    files that cannot be read, and if nothing is left.
    """
    found = [read_token_file(path, source.architecture) for path in files]
    if recordings:
        from ..speak.recordings import recorded  # its packages are optional

        found += [recorded(path, source) for path in recordings]
    cut = []
    for tokens in found:
        count = tokens.shape[2] // frames
        pieces = tokens[:, :, : count * frames].reshape(*tokens.shape[:2], count, frames)
        cut.append(pieces.transpose(0, 2, 1, 3).reshape(-1, tokens.shape[1], frames))
    whole = np.concatenate(cut)
    if not len(whole):
        raise UserError(f"no conversation is {frames} frames long ({frames / 12.5:.0f} s)", Hint.LONGER_RECORDINGS)
    return whole


def write(tokens: Tokens, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a token file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.partial")
    small = tokens.max() < 1 << 15
    writer = TensorWriter(temporary, [Spec("tokens", "I16" if small else "I32", tokens.shape)], metadata or {})
    try:
        writer.append("tokens", tokens.astype(np.int16 if small else np.int32))
        writer.finish()
    finally:
        writer.close()
    temporary.replace(path)


@dataclass(frozen=True)
class Statistics:
    """How much calibration data there is, and how much of the model's vocabulary it uses.

    frames: of all sequences. enough: frames above which more help little. coverage: for the text and each codebook,
    the share of its tokens that occur. alike: sequences that occur more than once.
    """

    sequences: int
    frames: int
    enough: int
    coverage: tuple[float, ...]
    alike: int


def statistics(tokens: Tokens, source: Source) -> Statistics:
    """Return the statistics of tokens ``[sequences, streams, frames]``."""
    a = source.architecture
    cards = [a.text_card] + [a.card] * a.n_q
    coverage = [len(np.unique(tokens[:, stream])) / card for stream, card in enumerate(cards)]
    return Statistics(
        sequences=len(tokens),
        frames=int(tokens.shape[0] * tokens.shape[2]),
        enough=enough(source),
        coverage=tuple(float(f"{share:.4g}") for share in coverage),
        alike=len(tokens) - len({piece.tobytes() for piece in tokens}),
    )
