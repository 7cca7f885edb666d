"""The toolkit's folder in the user's cache."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where what can be made again is kept; it need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppx-convert"
