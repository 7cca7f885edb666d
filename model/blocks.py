"""Where in the model something happens: the blocks, in the order in which they are computed."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..convert.source.architecture import Architecture

POSITIONS = 2048  # frames that go through a block at a time
STEP_ROWS = 512  # rows of depformer steps that do: 16 positions each
SUBLAYERS = ("attention", "mlp")


@dataclass(frozen=True)
class Block:
    """One block of a transformer. component: temporal or depformer. sublayer: attention or mlp."""

    component: str
    layer: int
    sublayer: str

    @property
    def prefix(self) -> str:
        """What its tensors' names begin with in the checkpoint."""
        return f"{'transformer' if self.component == 'temporal' else 'depformer'}.layers.{self.layer}"

    def batches(self, shape: Sequence[int]) -> list[slice]:
        """Return rows that go through the block together: so few that what it holds meanwhile is small.

        shape: of the stream.
        """
        height = max(1, POSITIONS // shape[1]) if self.component == "temporal" else STEP_ROWS
        return [slice(first, first + height) for first in range(0, shape[0], height)]

    def __str__(self) -> str:
        return f"{self.component} layer {self.layer} {self.sublayer}"


def blocks_of(architecture: Architecture, component: str) -> list[Block]:
    """Return a component's blocks, first to last."""
    layers = architecture.num_layers if component == "temporal" else architecture.depformer_num_layers
    return [Block(component, layer, sublayer) for layer in range(layers) for sublayer in SUBLAYERS]
