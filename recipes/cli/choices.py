"""What options can be, by the lists of the library."""

from collections.abc import Sequence
from enum import StrEnum

from ...convert.bundle.recipe import DTYPES
from ...convert.bundle.targets import TARGETS
from ...model.mlx_device import ARITHMETICS, DEVICES
from ...quant.affine import METHOD_NAMES, METHODS
from ...verify.options import RECOGNIZERS

TargetName = StrEnum("TargetName", {name: name for name in TARGETS})  # type: ignore[misc]
DtypeName = StrEnum("DtypeName", {name: name for name in DTYPES})  # type: ignore[misc]
MethodName = StrEnum("MethodName", {name: name for name in (*METHOD_NAMES, *METHODS)})  # type: ignore[misc]
DeviceName = StrEnum("DeviceName", {name: name for name in DEVICES})  # type: ignore[misc]
ArithmeticName = StrEnum("ArithmeticName", {name: name for name in ARITHMETICS})  # type: ignore[misc]
RecognizerName = StrEnum("RecognizerName", {name: name for name in RECOGNIZERS})  # type: ignore[misc]


def either(values: Sequence[int]) -> str:
    """Return numbers as people list them."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}"


DEFAULT_RECIPES = "; ".join(f"{target.recipe} for {name}" for name, target in TARGETS.items())
