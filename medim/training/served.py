"""Loader of MLflow models that earlier versions registered under this module name."""

from medim.training.tracking.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
