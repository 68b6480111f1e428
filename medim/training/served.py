"""Loader of MLflow models that earlier versions registered under this module name."""

from medim.tracking.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
