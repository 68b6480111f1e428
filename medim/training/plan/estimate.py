"""Estimated costs of a run, as `medim plan --json` writes them."""

from __future__ import annotations

from typing import TypedDict


class SizeSuggestions(TypedDict):
    """Largest sizes that fit in memory; None if there is no such size, see `medim.training.plan.plan.suggest_sizes`."""

    batch_size: int | None
    views: list[int] | None


class PlanEstimate(TypedDict):
    """Estimated time, memory and disk space of a run; see `medim.training.plan.plan.plan_pretraining`."""

    schema_version: int
    command: str
    config_hash: str
    input_shape: list[int]
    batch_size: int
    steps: int
    measured_steps: int
    measured_batch_size: int
    seconds_per_step: float
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    hours: float
    peak_memory_bytes: int
    memory_bytes: int
    disk_bytes: dict[str, int]
    available: dict[str, int]
    suggestions: SizeSuggestions
    refusals: list[str]
