"""How much a measurement of sensitivities computes, in operations: its progress goes by them, not by blocks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..convert.source.architecture import Architecture
from ..convert.source.tensors import roles
from ..model.blocks import SUBLAYERS, blocks_of
from .sensitivity import TensorGroup, settings_of
from .weight_error import ROWS

READ_FIRST = ("text_emb", "emb")  # tables that the temporal transformer reads
TABLES = (*READ_FIRST, "depformer_emb", "depformer_text_emb")  # of which the rows are quantized that are read
_QUANTIZED = 2000  # operations that quantizing a weight by lsq takes as long as, about

Members = Mapping[TensorGroup, Sequence[tuple[str, int | None]]]


@dataclass(frozen=True)
class MeasurementWork:
    """Operations for one pass over some frames and rows (positions in the depformer).

    block: of one stream and one block, by component. text, audio: of the logits of one stream. weights: of each group,
    those that are quantized. sampled: of each group, weights of which the errors are taken, all settings together.
    """

    block: dict[str, int]
    blocks: dict[str, int]
    text: int
    audio: int
    quantized: dict[TensorGroup, int]
    sampled: dict[TensorGroup, int]

    def original(self, component: str) -> int:
        """Return the operations of one stream through a component."""
        return self.block[component] * self.blocks[component]

    def from_layer(self, group: TensorGroup) -> int:
        """Return the operations of one stream of a temporal group, from its own block on."""
        first = (group.layer or 0) * len(SUBLAYERS) + (group.modules == "gating.*")
        return self.block["temporal"] * (self.blocks["temporal"] - first)

    def of(self, groups: Collection[TensorGroup], variants: int, temporal: bool) -> int:
        """Return the operations for so many variants of each of some groups, and the original beside them.

        temporal: whether the original goes through the temporal transformer too, or its outputs are known.
        """
        total = self.original("depformer") + (self.original("temporal") if temporal else 0)
        for group in groups:
            one = self.quantized[group]
            if group.modules == "text_linear":
                one += self.text
            else:
                one += self.original("depformer") + self.audio
            if group.component == "temporal":
                one += self.from_layer(group) + self.text
            elif group.modules in READ_FIRST:
                one += self.original("temporal") + self.text
            total += variants * one
        return total


def work_of(a: Architecture, members: Members, frames: int, rows: int) -> MeasurementWork:
    """Count the operations of a pass over so many frames, and rows of the depformer."""
    half, described = a.n_q // 2, roles(a)
    params = {"temporal": 0, "depformer": 0}
    for role in described.values():
        if role.kind == "linear" and role.layer is not None and (role.step is None or role.step < half):
            seen = half if role.stacked > 1 else 1  # of the stacked steps
            params[role.component] += role.shape[0] // role.stacked * role.shape[1] * seen
    blocks = {component: len(blocks_of(a, component)) for component in params}
    quantized, sampled = dict[TensorGroup, int](), dict[TensorGroup, int]()
    for group, tensors in members.items():
        shapes = [
            (described[name].shape[0] // described[name].stacked, described[name].shape[1]) for name, _ in tensors
        ]
        whole = sum(height * columns for height, columns in shapes)
        quantized[group] = _QUANTIZED * (0 if group.modules in TABLES else whole)
        settings = len(settings_of(columns for _, columns in shapes))
        sampled[group] = _QUANTIZED * settings * sum(min(height, ROWS) * columns for height, columns in shapes)
    return MeasurementWork(
        block={
            "temporal": 2 * frames * params["temporal"] // blocks["temporal"],
            "depformer": 2 * rows * params["depformer"] // blocks["depformer"],
        },
        blocks=blocks,
        text=2 * frames * a.dim * a.text_card,
        audio=2 * rows * half * a.depformer_dim * a.card,
        quantized=quantized,
        sampled=sampled,
    )
