"""Version of medim, and of the libraries that a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

__version__ = "0.1.0"


def collect_versions() -> dict[str, str]:
    """Versions of medim, Python, torch and Lightning, for the provenance of a result that was computed with them."""
    return {
        "medim": __version__,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "lightning": metadata.version("lightning"),
    }
