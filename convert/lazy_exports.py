"""Names that a package offers from its modules, imported when they are first used.

``import ppx.convert`` is then quick, and a plan needs neither the network client nor PyTorch.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def load(package: str, modules: Mapping[str, str], name: str) -> Any:
    """Return what a package offers under a name; modules: the module, below the package, that defines each name.

    Raises AttributeError for other names, as modules do.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(f".{modules[name]}", package), name)
