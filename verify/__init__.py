"""Is the bundle right, and how good is it? Comparison, report, publishing. Never writes weights.

``verify`` and ``publish`` do what ppx-verify and ppx-publish do; ``docs/python.md`` shows them. Names are imported when
they are first used.
"""

from typing import TYPE_CHECKING, Any

from ..convert.lazy_exports import load as _load

if TYPE_CHECKING:
    from .bundle_report import add_round_trip as add_round_trip
    from .bundle_report import verify as verify
    from .bundle_report import write_card as write_card
    from .options import VerifyOptions as VerifyOptions
    from .publishing.gate import publish as publish
    from .publishing.upload import PublishOptions as PublishOptions

_MODULES = {
    "add_round_trip": "bundle_report",
    "verify": "bundle_report",
    "write_card": "bundle_report",
    "VerifyOptions": "options",
    "publish": "publishing.gate",
    "PublishOptions": "publishing.upload",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    return _load(__name__, _MODULES, name)


def __dir__() -> list[str]:
    """List what there is."""
    return sorted({*globals(), *_MODULES})
