"""MLflow: where runs are tracked. MLflow's only home."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

from medim.config import RunConfig


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


@contextmanager
def track(command: str, config: RunConfig, *, seed: int, index_hash: str) -> Iterator[MLFlowLogger]:
    """Open an MLflow run of experiment `medim-<command>`, and close it as finished or failed.

    Nothing of the data goes in but the index's hash.

    Args:
        command: pretrain or finetune.
        config: logged as parameters, flattened.
        seed: of the run.
        index_hash: which data.
    """
    logger = MLFlowLogger(
        f"medim-{command}", run_name=f"{config.name}-{config.hash}", tracking_uri=tracking_uri(), log_model=False
    )
    logger.log_hyperparams(
        {**config.model_dump(mode="json"), "seed": seed, "config_hash": config.hash, "index_hash": index_hash}
    )
    try:
        yield logger
    except BaseException:
        logger.finalize("failed")
        raise
    logger.finalize("success")


def log_results(logger: MLFlowLogger, metrics: dict[str, Any], files: list[Path]) -> None:
    """Log final numbers and files of a run."""
    numbers = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    logger.log_metrics(numbers)
    for file in files:
        logger.experiment.log_artifact(logger.run_id, str(file))
