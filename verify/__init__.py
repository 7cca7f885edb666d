"""Is the bundle right, and how good is it? Comparison, report, publishing. Never writes weights.

``verify``, ``listen``, ``publish`` and ``sweep`` do what ppx-verify, ppx-publish and ppx-sweep do; ``docs/python.md``,
``docs/listening.md`` and ``docs/sweeps.md`` show them. Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from ..convert.lazy_exports import lazy_exports as _lazy_exports

if TYPE_CHECKING:
    from .bundle_report import add_round_trip as add_round_trip
    from .bundle_report import verify as verify
    from .bundle_report import write_card as write_card
    from .listening import ListenOptions as ListenOptions
    from .listening import listen as listen
    from .options import VerifyOptions as VerifyOptions
    from .publishing.gate import publish as publish
    from .publishing.upload import PublishOptions as PublishOptions
    from .sweeping.sweep import sweep as sweep

_MODULES = {
    "add_round_trip": "bundle_report",
    "verify": "bundle_report",
    "write_card": "bundle_report",
    "ListenOptions": "listening",
    "listen": "listening",
    "VerifyOptions": "options",
    "publish": "publishing.gate",
    "PublishOptions": "publishing.upload",
    "sweep": "sweeping.sweep",
}
__all__ = list(_MODULES)
__getattr__, __dir__ = _lazy_exports(__name__, _MODULES)
