"""What a conversation with a bundle takes in memory, computed from its plan or manifest, not measured."""

from dataclasses import dataclass
from typing import Annotated

from ..file_names import CODEC
from ..schema import whole
from ..source.architecture import Architecture
from .manifest import Manifest
from .plan import Plan
from .targets import TARGETS

_Bytes = Annotated[int, whole()]
_WIDTH = 2  # bytes of a value in any dtype that a bundle can have: bfloat16 or float16


@dataclass(frozen=True)
class RunMemory:
    """Bytes of a conversation whose KV cache is full. What a program needs beside them is not counted.

    weights: the model's files as they are stored. kv_cache: keys and values of ``context`` frames in the temporal
    transformer, in the bundle's dtype; the depformer's are those of one frame. codec: Mimi's weights.
    """

    weights: _Bytes
    kv_cache: _Bytes
    codec: _Bytes
    context: Annotated[int, whole(1)]

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.weights + self.kv_cache + self.codec


def memory_of(manifest: Manifest) -> RunMemory:
    """Return what a conversation with a bundle takes in memory.

    Programs that read only the agent's depformer steps, as ``ppx-speak`` does, take less; activations in float32, which
    ``ppx-speak`` computes on a CPU, double the KV cache.
    """
    target, names = TARGETS.get(manifest.target), {tensor.file for tensor in manifest.tensors}
    weights = sum(file.size for name, file in manifest.files.items() if name in names)
    codec = manifest.files.get(target.copies[CODEC]) if target else None
    return _memory(weights, codec.size if codec else 0, manifest.architecture)


def planned_memory(plan: Plan) -> RunMemory:
    """Return what a conversation takes with the bundle that a plan makes."""
    weights = sum(file.nbytes for file in plan.files if file.outputs)
    return _memory(weights, plan.inventory.sizes[CODEC], plan.inventory.architecture)


def _memory(weights: int, codec: int, architecture: Architecture) -> RunMemory:
    a = architecture
    temporal, depformer = a.num_layers * a.context * a.dim, a.depformer_num_layers * a.steps * a.depformer_dim
    return RunMemory(weights, 2 * (temporal + depformer) * _WIDTH, codec, a.context)
