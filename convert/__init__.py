"""From a source checkpoint to a bundle: names, plan, stream, voices, Hub. Never runs a model.

``convert`` does what ppx-convert does, without the verification; ``docs/python.md`` shows it. Names are imported when
they are first used.
"""

from typing import TYPE_CHECKING

from .lazy_exports import lazy_exports as _lazy_exports

if TYPE_CHECKING:
    from .bundle.build import Conversion as Conversion
    from .bundle.inspect import Contents as Contents
    from .bundle.inspect import inspect as inspect
    from .bundle.install import Installation as Installation
    from .bundle.install import Removal as Removal
    from .bundle.install import install as install
    from .bundle.install import uninstall as uninstall
    from .bundle.location import locate_bundle as locate_bundle
    from .bundle.plan import Plan as Plan
    from .bundle.recipe import Recipe as Recipe
    from .bundle.recipe_choice import make_recipe as make_recipe
    from .conversion import OpenConversion as OpenConversion
    from .conversion import convert as convert
    from .conversion import open_conversion as open_conversion
    from .errors import CheckFailed as CheckFailed
    from .errors import UserError as UserError
    from .preparation import plan as plan

_MODULES = {
    "Conversion": "bundle.build",
    "Contents": "bundle.inspect",
    "inspect": "bundle.inspect",
    "Installation": "bundle.install",
    "Removal": "bundle.install",
    "install": "bundle.install",
    "uninstall": "bundle.install",
    "locate_bundle": "bundle.location",
    "Plan": "bundle.plan",
    "Recipe": "bundle.recipe",
    "make_recipe": "bundle.recipe_choice",
    "OpenConversion": "conversion",
    "convert": "conversion",
    "open_conversion": "conversion",
    "CheckFailed": "errors",
    "UserError": "errors",
    "plan": "preparation",
}
__all__ = list(_MODULES)
__getattr__, __dir__ = _lazy_exports(__name__, _MODULES)
