"""Where in the model something happens: the blocks, in the order in which they are computed."""

from dataclasses import dataclass

from ..convert.architecture import Architecture

PARTS = ("attention", "mlp")


@dataclass(frozen=True)
class Place:
    """One block of a transformer. component: temporal or depformer. part: attention or mlp."""

    component: str
    layer: int
    part: str

    @property
    def prefix(self) -> str:
        """What its tensors' names begin with in the checkpoint."""
        return f"{'transformer' if self.component == 'temporal' else 'depformer'}.layers.{self.layer}"

    def __str__(self) -> str:
        return f"{self.component} layer {self.layer} {self.part}"


def places(architecture: Architecture, component: str) -> list[Place]:
    """Return a component's blocks, first to last."""
    layers = architecture.num_layers if component == "temporal" else architecture.depformer_num_layers
    return [Place(component, layer, part) for layer in range(layers) for part in PARTS]
