"""Options that several programs share: what can be chosen by name."""

from enum import StrEnum

from ..convert.recipe import DTYPES
from ..convert.targets import TARGETS
from ..quant.affine import METHODS

TargetName = StrEnum("TargetName", {name: name for name in TARGETS})  # type: ignore[misc]
DtypeName = StrEnum("DtypeName", {name: name for name in DTYPES})  # type: ignore[misc]
MethodName = StrEnum("MethodName", {name: name for name in METHODS})  # type: ignore[misc]
