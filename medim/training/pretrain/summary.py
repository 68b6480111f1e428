"""Summary of a pretraining run: losses, verdict, diagnostics and costs."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from medim.config import PretrainConfig
from medim.data.loading.cohort import Cohort
from medim.model_spec import SCHEMA_VERSION
from medim.training.engine.checkpoints import get_resume_steps
from medim.training.engine.trainer import peak_memory
from medim.training.pretrain.history import MetricHistory
from medim.training.pretrain.module import PretrainModule
from medim.training.pretrain.online_probe import OnlineProbe
from medim.version import collect_versions


def format_online_probe(probe: OnlineProbe | None, selection: dict[str, Any]) -> dict[str, Any] | None:
    """The online probe of the encoder that the run leaves; None where labels do not suffice."""
    value = selection["metrics"].get("probe")
    return None if probe is None or value is None else {"value": value, **probe.protocol}


def build_pretrain_summary(
    config: PretrainConfig, cohort: Cohort, history: MetricHistory, module: PretrainModule, trainer: pl.Trainer
) -> dict[str, Any]:
    """Build the summary of a run's losses, diagnostics, costs and versions."""
    report = history.compute_verdict()
    losses = {
        name: {
            "first": _replace_non_finite(history.curve(name)[0]),
            "last": _replace_non_finite(history.curve(name)[-1]),
            "val": _replace_non_finite(history.held_out[name][0]) if name in history.held_out else None,
        }
        for name in history.chance_levels()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "pretrain",
        "objectives": module.weights,
        "steps": trainer.global_step,
        "resumed_from_steps": get_resume_steps(trainer),
        "input_shape": list(config.views.shape),
        "loss": losses,
        "chance": history.chance_levels(),
        "diagnostics": history.diagnostics(),
        "verdict": report.verdict,
        "verdict_reason": report.why,
        "advice": history.advice(report.verdict),
        "verdict_changes": [
            dict(zip(("step", "verdict", "reason"), change, strict=True)) for change in history.verdict_changes
        ],
        "rankme": _replace_non_finite(history.rankme),
        "feature_std": _replace_non_finite(history.feature_std),
        "alignment": _replace_non_finite(history.measures.get("alignment", math.nan)),
        "uniformity": _replace_non_finite(history.measures.get("uniformity", math.nan)),
        "seconds_per_step": history.seconds_per_step,
        "dataloader_wait_fraction": history.dataloader_wait_fraction,
        "peak_memory_bytes": peak_memory(),
        "device": str(trainer.strategy.root_device),
        "precision": str(trainer.precision),
        "config_hash": config.hash,
        "index_hash": cohort.index.hash,
        "where": cohort.index.where,
        "train_val_duplicates": cohort.overlap,
        "versions": collect_versions(),
    }


def _replace_non_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
