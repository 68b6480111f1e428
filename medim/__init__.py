"""medim: Deep InfoMax pretraining of medical image encoders, from DICOM files to a deployable package."""

from __future__ import annotations

from importlib import import_module

from medim.version import __version__

TYPE_CHECKING = False  # that of `typing`, whose import would delay the handling of signals
_HOME = {
    "read_volume": "medim.data.readers",
    "build_index": "medim.data.index.index",
    "preprocess": "medim.data.preprocessing.steps",
    "load_encoder": "medim.models.serialization",
    "load_package": "medim.package.package",
}

__all__ = ["__version__", "build_index", "load_encoder", "load_package", "preprocess", "read_volume"]

if TYPE_CHECKING:
    from typing import Any

    from medim.data.index.index import build_index
    from medim.data.preprocessing.steps import preprocess
    from medim.data.readers import read_volume
    from medim.models.serialization import load_encoder
    from medim.package.package import load_package


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import the five public functions on first access, so that `import medim` stays fast."""
    if name not in _HOME:
        raise AttributeError(f"module 'medim' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
