"""medim: Deep InfoMax pretraining of medical image encoders, from DICOM to a package a hospital can run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "read_volume": "medim.data.readers",
    "build_index": "medim.data.index",
    "preprocess": "medim.data.preprocessing",
    "load_encoder": "medim.models.saved",
    "load_package": "medim.deployment.package",
}

__all__ = ["__version__", "build_index", "load_encoder", "load_package", "preprocess", "read_volume"]

if TYPE_CHECKING:
    from medim.data.index import build_index
    from medim.data.preprocessing import preprocess
    from medim.data.readers import read_volume
    from medim.deployment.package import load_package
    from medim.models.saved import load_encoder


def __getattr__(name: str) -> Any:
    """Import the five names lazily, so that `import medim` stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'medim' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
