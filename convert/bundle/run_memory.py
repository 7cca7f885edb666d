"""How much memory a conversation with a bundle takes, computed from its plan."""

from dataclasses import dataclass

from ..file_names import CODEC
from ..tensorfile import Spec
from .plan import Plan
from .recipe import DTYPES


@dataclass(frozen=True)
class RunMemory:
    """Bytes that stay in memory during a conversation.

    weights: all of the model, as they are stored. kv_cache: keys and values of the temporal transformer, for a whole
    context in the bundle's dtype. codec: Mimi's weights. Activations, the program and its libraries come on top.
    """

    weights: int
    kv_cache: int
    codec: int

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.weights + self.kv_cache + self.codec


def run_memory(plan: Plan) -> RunMemory:
    """Return what a program needs that loads every tensor of a bundle and has a conversation as long as its context."""
    a = plan.inventory.architecture
    frame = Spec("", DTYPES[plan.recipe.dtype], (2 * a.num_layers, a.dim)).nbytes  # a key and a value a layer
    weights = sum(output.nbytes for output in plan.outputs)
    return RunMemory(weights, a.context * frame, plan.inventory.sizes[CODEC])
