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

    def matrices(self, steps: int) -> tuple[list[str], list[str]]:
        """Return the names of its matrices: those that read its input, and those that read what these make of it.

        steps: of the depformer, each of which has an MLP of its own.
        """
        if self.sublayer == "attention":
            stems, first, second = [f"{self.prefix}.self_attn"], "in_proj_weight", "out_proj.weight"
        else:
            gates = [f".{step}" for step in range(steps)] if self.component == "depformer" else [""]
            stems, first, second = [f"{self.prefix}.gating{s}" for s in gates], "linear_in.weight", "linear_out.weight"
        return [f"{stem}.{first}" for stem in stems], [f"{stem}.{second}" for stem in stems]

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
