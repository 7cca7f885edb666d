"""One output tensor of a conversion, still to be made."""

from dataclasses import dataclass

from ...quant.affine import WEIGHTED, QuantizationConfig
from ..source.tensors import Role
from ..tensorfile import Spec


@dataclass(frozen=True)
class Output:
    """Rows of a source tensor under a new name.

    name: the full parameter name, which ends in ``weight`` where it can be quantized; scales and biases take its
    place there. rows: first and last (not included) of the source tensor seen as a matrix. step: the depformer step
    that the rows belong to, None for none or for all of a stacked tensor. form: None where it stays float.
    """

    role: Role
    name: str
    rows: tuple[int, int]
    shape: tuple[int, ...]
    step: int | None = None
    dtype: str = "BF16"
    quantization: QuantizationConfig | None = None

    @property
    def parts(self) -> int:
        """How many depformer steps are stacked on the rows; each is quantized, and measured, for itself."""
        return self.role.stacked if self.step is None else 1

    @property
    def path(self) -> str:
        """The module's path: the name without ``.weight`` or ``_weight``."""
        return self.name.removesuffix("weight").rstrip("._")

    @property
    def weighted_by(self) -> str:
        """The norm whose squared gains weigh the quantization errors of columns, empty where nothing weighs them."""
        return self.role.norm if self.quantization and self.quantization.method in WEIGHTED else ""

    def specs(self) -> list[Spec]:
        """Return what the output puts into its file, in order: the weight, then its scales and biases."""
        if self.quantization is None:
            return [Spec(self.name, self.dtype, self.shape)]
        rows, columns = self.shape
        stem = self.name.removesuffix("weight")
        sides = (rows, columns // self.quantization.group_size)
        return [
            Spec(self.name, "U32", (rows, columns * self.quantization.bits // 32)),
            Spec(f"{stem}scales", self.dtype, sides),
            Spec(f"{stem}biases", self.dtype, sides),
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all that it puts into its file."""
        return sum(spec.nbytes for spec in self.specs())


def whole(role: Role, name: str, shape: tuple[int, ...] | None = None) -> Output:
    """Return the output that takes all of a source tensor."""
    rows = Spec(role.name, "BF16", role.shape).rows
    return Output(role, name, (0, rows), shape or role.shape, role.step)
