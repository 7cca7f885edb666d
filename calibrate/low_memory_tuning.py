"""Fine-tuning codes, scales and biases of all matrices together in less than 8 bytes per weight.

As ``tuning.fine_tune`` does, with the same loss and learning rates, but of a weight the device holds the code (1 byte),
what is added to it (2), and Adam's moments (2). Matrices are dequantized while their block is computed, and again for
its gradients; gradients are used as soon as they are there; the original's predictions are read from a file
(``teacher``). What the text's and the agent's predictions do not depend on is neither read nor trained: depformer steps
for the user.
"""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore, quantizations_of
from ..convert.progress import bar
from ..convert.source.architecture import Architecture
from ..convert.source.source import Source
from ..convert.source.tensors import Role
from ..model import torch_device as devices
from ..model.reference import TorchModel, reference_of
from ..model.tokens import TokenSet
from ..model.weights import kept_by, rows_of
from ..quant.affine import DATA_DRIVEN
from .eight_bit_adam import AdamInBackward, adam_in_backward, set_learning_rates, take_step_in_backward
from .layerwise import FINE_TUNED
from .parameters import LowMemoryMatrix, low_memory_matrix, trainable_weights
from .quantized_model import quantized_weights
from .teacher import FILE, batches
from .tuning import BATCH, WARM_UP, Batch, Predictions, Schedule, divergence_of, write_state

_ACTIVATIONS = 0.05  # of the device's memory, for activations: sequences of a step are as few as that takes
_SAVING = 0.05  # of the time, at most, for writing states
_STATE = "fine-tuning.pt"


def fine_tune_in_low_memory(
    source: Source,
    outputs: list[Output],
    token_set: TokenSet,
    store: QuantizedStore,
    schedule: Schedule,
    quiet: bool = False,
) -> None:
    """Fine-tune the data-driven matrices of a store, in it; resumes from the last state that a killed run wrote.

    On the disk: the original's predictions (``POOL_BYTES`` at most), and a state of 5.3 bytes per weight, twice while
    one replaces another; none where there is no room. Raises UserError if torchao is not installed.
    """
    if any(file == FINE_TUNED for file in store.files.values()):
        return
    device = devices.device()
    original = reference_of(source.checkpoint, device=device)
    a, (sequences, _, frames) = source.architecture, token_set.tokens.shape
    height = min(BATCH, sequences, _fitting(a, frames))
    quantizations = quantizations_of(outputs)
    matrices = {key: low_memory_matrix(key, *quantizations[key], store, device) for key in trained(source, outputs)}
    rest = kept_by({}, quantized_weights(source, quantizations, store), device, None)
    quantized = replace(original, weights=trainable_weights(matrices, rest), rows=rows_of(rest))
    adam, state = adam_in_backward(matrices), store.folder / _STATE
    steps = range(_load_state(state, matrices, adam, schedule.steps), schedule.steps)
    with _settings(device), bar("fine-tuning", schedule.steps, "step", quiet) as progress:
        progress.update(steps.start)
        note = partial(progress.set_postfix_str, "predictions of the original")
        with closing(batches(original, token_set, store.folder, height, steps, note)) as pairs:
            _train(quantized, zip(steps, pairs, strict=True), matrices, adam, schedule, state, progress)
    with torch.inference_mode():
        made = {key: matrix.wide().quantized() for key, matrix in matrices.items()}
    store.add(FINE_TUNED.removesuffix(".safetensors"), made)
    for name in (FILE, _STATE):  # which take more room than the bundle
        (store.folder / name).unlink(missing_ok=True)


def trained(source: Source, outputs: list[Output]) -> list[MatrixKey]:
    """Return the data-driven matrices that the text's and the agent's predictions depend on."""
    half = source.architecture.n_q // 2

    def step(role: Role, part: int) -> int:
        return part if role.stacked > 1 else role.step or 0

    return [
        key
        for key, (quantization, _) in quantizations_of(outputs).items()
        if quantization.method in DATA_DRIVEN and step(source.checkpoint.tensors[key[0]].role, key[1]) < half
    ]


def _fitting(a: Architecture, frames: int) -> int:
    """Return of how many sequences, of so many frames each, the activations fit into their share of memory.

    In float32: what goes into each block, what the largest block keeps for its gradients, and predictions (about 8
    arrays of them).
    """
    half = a.n_q // 2
    before = 2 * (a.num_layers * a.dim + a.depformer_num_layers * half * a.depformer_dim)
    block = max(6 * (a.dim + a.hidden), 6 * half * (a.depformer_dim + a.depformer_hidden))
    floats = before + block + 8 * (a.text_card + half * a.card)
    return max(1, int(_ACTIVATIONS * devices.memory()) // (4 * frames * floats))


@contextmanager
def _settings(device: str) -> Iterator[None]:
    """Multiply matrices in TF32 on a GPU, and leave PyTorch's settings and random numbers as they were.

    TF32 is several times as fast as float32, and its error is far below that of rounding to codes.
    """
    before = torch.get_float32_matmul_precision()
    devices_used = [torch.cuda.current_device()] if device == "cuda" else []
    try:
        if device == "cuda":
            torch.set_float32_matmul_precision("high")
        with torch.random.fork_rng(devices_used):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _train(
    quantized: TorchModel,
    pairs: Iterable[tuple[int, tuple[Batch, Predictions]]],
    matrices: dict[MatrixKey, LowMemoryMatrix],
    adam: AdamInBackward,
    schedule: Schedule,
    state: Path,
    progress: "tqdm[Any]",
) -> None:
    """Take steps, each with its number and what ``batches`` gives for it."""
    steps, taken, skipped = schedule.steps, 0, 0
    saved, pause = time.monotonic(), schedule.state_seconds
    for step, (batch, expected) in pairs:
        set_learning_rates(adam, step, steps, WARM_UP)
        torch.manual_seed(step)  # updates are rounded to 16 bit at random
        half = quantized.architecture.n_q // 2
        actual = quantized.logits(batch.tokens, batch.targets, half, recompute=True)
        loss = divergence_of(actual, expected, batch.counted)
        value, taken = loss.item(), taken + 1
        del actual, batch, expected
        skipped += not take_step_in_backward(adam, loss)
        progress.set_postfix_str(f"KL {value:.4f}", refresh=False)
        progress.update(1)
        if time.monotonic() - saved >= pause:
            begin = time.monotonic()
            _save_state(state, matrices, adam, step + 1, steps)
            saved = time.monotonic()
            pause = max(schedule.state_seconds, (saved - begin) / _SAVING)
        if schedule.on_step:
            schedule.on_step(step, value)
    if skipped:
        progress.write(f"fine-tuning: {skipped} of {taken} steps were skipped: predictions are not finite", sys.stderr)
    if broken := adam.skipped():
        progress.write(
            f"fine-tuning: {sum(broken.values())} gradients of {len(broken)} matrices are not finite: taken for zero",
            sys.stderr,
        )


def _save_state(
    state: Path, matrices: dict[MatrixKey, LowMemoryMatrix], adam: AdamInBackward, done: int, steps: int
) -> None:
    """Write the state after some steps: parameters and optimizers. Nothing where the disk has no room for it."""
    parts = [{"values": _values(matrix), "adam": adam.optimizers[key].state_dict()} for key, matrix in matrices.items()]
    nbytes = sum(matrix.codes.numel() * 5 + matrix.scales.numel() * 12 for matrix in matrices.values())
    if shutil.disk_usage(state.parent).free < 1.1 * nbytes:
        return
    write_state(state, {"done": done, "steps": steps, "parts": parts})


def _load_state(state: Path, matrices: dict[MatrixKey, LowMemoryMatrix], adam: AdamInBackward, steps: int) -> int:
    """Restore the state that a killed run wrote, if any; return how many steps it had taken."""
    if not state.is_file():
        return 0
    saved = torch.load(state, map_location="cpu", mmap=True, weights_only=True)
    if saved["steps"] != steps:
        return 0
    for (key, matrix), part in zip(matrices.items(), saved["parts"], strict=True):
        with torch.no_grad():
            for values, saved_values in zip(_values(matrix), part["values"], strict=True):
                values.copy_(saved_values)
        adam.optimizers[key].load_state_dict(part["adam"])
    return int(saved["done"])


def _values(matrix: LowMemoryMatrix) -> list[torch.Tensor]:
    """Return what training changes."""
    return [matrix.codes, matrix.offsets, matrix.scales, matrix.biases]
