"""Options that several programs share: what can be chosen by name."""

from enum import StrEnum

from ...convert.bundle.recipe import DTYPES
from ...convert.bundle.targets import TARGETS
from ...model.mlx_device import ARITHMETICS, DEVICES
from ...quant.affine import METHODS
from ...verify.options import RECOGNIZERS

TargetName = StrEnum("TargetName", {name: name for name in TARGETS})  # type: ignore[misc]
DtypeName = StrEnum("DtypeName", {name: name for name in DTYPES})  # type: ignore[misc]
MethodName = StrEnum("MethodName", {name: name for name in METHODS})  # type: ignore[misc]
DeviceName = StrEnum("DeviceName", {name: name for name in DEVICES})  # type: ignore[misc]
ArithmeticName = StrEnum("ArithmeticName", {name: name for name in ARITHMETICS})  # type: ignore[misc]
RecognizerName = StrEnum("RecognizerName", {name: name for name in RECOGNIZERS})  # type: ignore[misc]
