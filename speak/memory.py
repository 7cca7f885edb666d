"""What a conversation takes in memory, computed from a bundle's manifest: nothing is loaded or measured."""

from dataclasses import dataclass
from typing import Annotated

from ..convert.bundle.manifest import Manifest
from ..convert.bundle.targets import TARGETS
from ..convert.file_names import CODEC
from ..convert.schema import whole

_Bytes = Annotated[int, whole()]
_WIDTH = 2  # bytes of a value in any dtype that a bundle can have: bfloat16 or float16


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a conversation whose KV cache is full. What a program needs beside them is not counted.

    weights: the tensors of the model as they are stored. kv_cache: keys and values of ``context`` frames in the
    temporal transformer, in the bundle's dtype; the depformer's are those of one frame. codec: Mimi's weights.
    """

    weights: _Bytes
    kv_cache: _Bytes
    codec: _Bytes
    context: Annotated[int, whole(1)]

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.weights + self.kv_cache + self.codec


def memory_of(manifest: Manifest) -> MemoryEstimate:
    """Return what a conversation with a bundle takes in memory.

    Programs that read only the agent's depformer steps, as ``ppx-speak`` does, take less; activations in float32, which
    ``ppx-speak`` computes on a CPU, double the KV cache.
    """
    a, target = manifest.architecture, TARGETS.get(manifest.target)
    names = {tensor.file for tensor in manifest.tensors}
    temporal = a.num_layers * a.context * a.dim
    depformer = a.depformer_num_layers * a.steps * a.depformer_dim
    codec = manifest.files.get(target.copies[CODEC]) if target else None
    return MemoryEstimate(
        weights=sum(file.size for name, file in manifest.files.items() if name in names),
        kv_cache=2 * (temporal + depformer) * _WIDTH,
        codec=codec.size if codec else 0,
        context=a.context,
    )
