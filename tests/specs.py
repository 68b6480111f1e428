"""Specs of test networks: what a test leaves out is filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medim.model_spec import ModelSpec

DEFAULTS: dict[str, Any] = {"kind": "encoder", "modality": "mri", "preprocessing": [], "inference": {"mode": "whole"}}


def make_spec(content: Mapping[str, Any] | ModelSpec) -> ModelSpec:
    """The spec of JSON that may lack keys; a spec is returned as it is."""
    if isinstance(content, ModelSpec):
        return content
    return ModelSpec.from_json({**DEFAULTS, "classes": [], **content}, "test")
