"""Which numbers are stored, judged by data: layer-wise GPTQ, fine-tuning, sensitivities, size budgets.

``calibrate`` and ``allocate`` do what ppx-calibrate and ppx-allocate do, ``dry_run`` what ppx-convert does before a
conversion; ``quantizer_for`` is for conversions with the method ``gptq``. ``docs/python.md`` shows them. Names are
imported when they are first used.
"""

from typing import TYPE_CHECKING

from ..convert.lazy_exports import lazy_exports as _lazy_exports

if TYPE_CHECKING:
    from .allocation import Allocation as Allocation
    from .calibration import calibrate as calibrate
    from .dry_runs import dry_run as dry_run
    from .quantizer import quantizer_for as quantizer_for
    from .size_budget import allocate as allocate

_MODULES = {
    "Allocation": "allocation",
    "calibrate": "calibration",
    "dry_run": "dry_runs",
    "quantizer_for": "quantizer",
    "allocate": "size_budget",
}
__all__ = list(_MODULES)
__getattr__, __dir__ = _lazy_exports(__name__, _MODULES)
