"""How much layer-wise GPTQ and self-generated calibration data have to compute, counted from a plan."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.plan import Plan
from ..convert.bundle.quantized_store import MatrixKey, quantizations_of
from ..convert.file_names import WEIGHTS
from ..convert.source.architecture import Architecture
from ..convert.source.tensors import Role, roles
from ..model.session import PAUSE
from ..model.tokens import CALIBRATION_FRAMES, CALIBRATION_SESSIONS
from ..quant.affine import DATA_DRIVEN

STREAM_BYTES = 1 << 29  # of a stream, and of a block's kept inputs: sequences or rows are chosen, evenly spaced, to fit
LAST = ("out_proj", "linear_out")  # of a block: they read what its other matrices make of its input
WEIGHTS_SHARE = 0.4  # of memory, for the weights that generate tokens; what does not fit is computed in bfloat16
KV_SHARE = 0.1  # of memory, for keys and values of the sessions that run side by side
PROMPT_COUNT = 6  # text prompts that generated sessions begin with
_PROMPT_FRAMES = 30  # of one, about: its tokens are not counted for a forecast
GRADIENT_FRAMES = 1024  # whose gradients at outputs are summed, about: blocks of 64 rows need no more
_FEW = 2  # columns for each frame, from which on the inputs themselves take less work than their moments


@dataclass(frozen=True)
class Work:
    """What is computed. In float32 operations: products, factors (Cholesky). In weights: rounded, read.

    groups: of columns, rounded one after another. streamed, stepped: bytes of activations between blocks, of
    the temporal transformer and of the depformer. blocks: how many are
    computed. read: weights made float32, from bfloat16 or from codes. thin: weights that few rows are multiplied by.
    unread: weights read from the disk, each time.
    """

    products: float = 0
    factors: float = 0
    rounded: float = 0
    read: float = 0
    groups: float = 0
    streamed: float = 0
    stepped: float = 0
    blocks: float = 0
    thin: float = 0
    unread: float = 0

    def times(self, count: float) -> "Work":
        """Return the work of so many alike."""
        return Work(*(count * getattr(self, name) for name in self.__dataclass_fields__))

    def divided(self, workers: int, dealt: bool = True) -> "Work":
        """Return what each of some workers does of it; all of them read all weights.

        dealt: whether whole matrices are theirs. Of rows of a matrix all factor the moments, and round each group.
        """
        whole = ("read", "unread") if dealt else ("read", "unread", "factors", "groups")
        fields = self.__dataclass_fields__
        return Work(*(getattr(self, name) / (1 if name in whole else workers) for name in fields))

    def __add__(self, other: "Work") -> "Work":
        """Return the work of both."""
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def operations(work: Work) -> float:
    """Return about how many operations some work takes as long as, on a machine that was not measured."""
    return work.products + 3 * work.factors + 2000 * work.rounded + 100 * work.read


def are_few(frames: int, columns: int) -> bool:
    """Tell whether inputs ``[frames, columns]`` take less work than their moments."""
    return _FEW * frames <= columns


def inputs_are_kept(frames: int, columns: int) -> bool:
    """Tell whether the inputs of a block's last matrices are kept: ``columns`` of all of them for each frame."""
    return 4 * frames * columns <= STREAM_BYTES


@dataclass(frozen=True)
class TensorWork:
    """The work for one source tensor: forward, of both models' passes; matrices, of rounding each of its parts."""

    forward: Work
    matrices: dict[int, Work]


def gptq_work(plan: Plan, sequences: int, frames: int, stored: Collection[MatrixKey] = (), workers: int = 1) -> Work:
    """Return the work of layer-wise GPTQ on so many calibration sequences of so many frames, without fine-tuning.

    stored: matrices that an earlier run has quantized. workers: that share it; the result is the work of one of them.
    """
    works = tensor_works(plan.inventory.architecture, plan.outputs, sequences, frames, stored)
    gradients = gradients_work(plan.inventory.architecture, works, sequences, frames)
    total = gradients.divided(min(workers, sequences, gradient_sequences(frames)))
    for name, work in works.items():
        dealt = name.startswith("depformer")  # a matrix for each of its steps: enough for all workers
        total += work.forward.divided(workers)
        total = sum((each.divided(workers, dealt) for each in work.matrices.values()), total)
    return total


def tensor_works(
    a: Architecture, outputs: list[Output], sequences: int, frames: int, stored: Collection[MatrixKey] = ()
) -> dict[str, TensorWork]:
    """Return the same by source tensor, of a model and the outputs of its plan."""
    sequences = max(1, min(sequences, STREAM_BYTES // (4 * frames * a.dim)))
    positions = sequences * frames
    rows = max(1, min(positions, STREAM_BYTES // (4 * a.steps * a.depformer_dim)))
    quantized = {
        key: quantization.group_size
        for key, (quantization, _) in quantizations_of(outputs).items()
        if quantization.method in DATA_DRIVEN and key not in stored
    }
    return {
        role.name: _of_tensor(role, a, positions if role.component == "temporal" else rows, frames, quantized)
        for role in roles(a).values()
        if role.kind == "linear"
    }


def gradient_sequences(frames: int) -> int:
    """Return of how many calibration sequences, of so many frames each, gradients are summed."""
    return max(1, GRADIENT_FRAMES // frames)


def gradients_work(a: Architecture, works: Mapping[str, TensorWork], sequences: int, frames: int) -> Work:
    """Return the work of a pass forward and one back through the original, for the text and the agent's codebooks.

    In the backward pass a block is computed again, then its gradients at its input and outputs. Nothing where no
    matrix is left to quantize.
    """
    total, steps = Work(), a.n_q // 2
    if not any(work.matrices for work in works.values()):
        return total
    positions = frames * min(sequences, gradient_sequences(frames))
    for role in roles(a).values():
        if role.kind == "linear" and (role.step or 0) < steps:
            weights = role.shape[0] * role.shape[1] * min(role.stacked, steps) // role.stacked
            total += Work(products=3 * 2 * positions * weights, read=2 * weights)
            if role.module.endswith(LAST):
                activations = 3 * 2 * 4 * positions * role.shape[0] * min(role.stacked, steps) // role.stacked
                in_depformer = role.component == "depformer"
                total += Work(stepped=activations) if in_depformer else Work(streamed=activations)
    return total


def generation_work(plan: Plan, memory: int) -> Work:
    """Return the work of generating calibration tokens, on a device with so many bytes of memory.

    Sessions of voices and prompts of one length run side by side, as many as their keys and values leave room for.
    """
    inventory, a = plan.inventory, plan.inventory.architecture
    size = inventory.sizes[WEIGHTS]
    held, itemsize = size < WEIGHTS_SHARE * memory, 4 if 2 * size < WEIGHTS_SHARE * memory else 2
    prompted = max((frames for frames, _ in inventory.voices.values()), default=0) + _PROMPT_FRAMES + 2 * PAUSE
    half = (CALIBRATION_SESSIONS + 1) // 2
    groups = [(prompted, half // PROMPT_COUNT)] * PROMPT_COUNT + [(0, CALIBRATION_SESSIONS - half)]
    weights = sum(role.shape[0] * role.shape[1] for role in roles(a).values() if role.kind == "linear")
    total = Work()
    for begin, sessions in groups:
        steps = begin + max(a.delays) + CALIBRATION_FRAMES
        most = max(1, int(KV_SHARE * memory) // (2 * itemsize * a.num_layers * a.dim * min(a.context, steps)))
        passes = steps * math.ceil(sessions / most)
        blocks = 2 * (a.num_layers + a.steps * a.depformer_num_layers)
        total += Work(thin=passes * weights, blocks=passes * blocks, unread=0 if held else passes * weights)
        total += Work(products=2 * sessions * steps * weights)
    return total


def _of_tensor(role: Role, a: Architecture, frames: int, length: int, quantized: dict[MatrixKey, int]) -> TensorWork:
    """Return the work for one source tensor: both models' forward passes, and its matrices' quantization."""
    sizes = {part: quantized[role.name, part] for part in range(role.stacked) if (role.name, part) in quantized}
    height, columns = role.height, role.shape[1]
    weights, total = height * columns * role.stacked, Work()
    if role.layer is not None or role.module == "depformer_in":
        passes = 1
        in_depformer = role.component == "depformer"
        hidden = a.depformer_hidden if in_depformer else a.hidden
        if role.layer is not None and not role.module.endswith(LAST):
            last = hidden if role.module.startswith("gating") else columns
            passes = 1 if inputs_are_kept(frames, last * (a.steps if in_depformer else 1)) else 2
        total += Work(products=2 * passes * 2 * frames * weights, read=2 * passes * weights)
        if role.module.endswith(LAST):
            steps = 1 if role.stacked > 1 or not in_depformer else 1 / a.steps
            activations = 2 * 2 * 4 * steps * frames * height * role.stacked
            total += Work(stepped=activations) if in_depformer else Work(streamed=activations)
        if role.module == "self_attn.out_proj":
            seen = role.stacked if in_depformer else length
            total += Work(products=2 * 4 * frames * role.stacked * seen * columns)
    matrices = {}
    for part, size in sizes.items():
        matrices[part] = matrix_work(height, columns, frames, size)
        if role.module.endswith(LAST) and not are_few(frames, columns):
            matrices[part] += Work(products=2 * frames * height * columns)  # what the residual stream lacks
        if not (role.module == "depformer_in" and role.step):  # whose 16 matrices read the same
            matrices[part] += inputs_work(columns, frames)
    return TensorWork(total, matrices)


def inputs_work(columns: int, frames: int) -> Work:
    """Return the work of preparing what matrices read, ``[frames, columns]``: moments and their factor."""
    square = columns * columns
    if are_few(frames, columns):
        return Work(
            products=frames * square + 4 * frames * frames * columns,
            factors=square * columns / 3 + frames**3 / 3,
        )
    return Work(products=3 * frames * square, factors=square * columns / 3)


def matrix_work(height: int, columns: int, frames: int, group_size: int) -> Work:
    """Return the work of rounding one matrix ``[height, columns]``, with what it reads prepared."""
    weights, groups = height * columns, columns // group_size
    if are_few(frames, columns):
        goal = 4 * weights * frames
    else:
        goal = 2 * columns * min(2 * weights, columns * columns + weights)
    return Work(products=goal + weights * columns, rounded=weights, read=weights, groups=groups)
