"""MLflow: where runs are tracked. MLflow's only home."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lightning.pytorch.loggers import MLFlowLogger
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from medim.config import RunConfig
from medim.types import UserError

ANSWER_SECONDS = 10  # how long a tracking server may take to accept a connection


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def check_target() -> None:
    """Find out within seconds whether runs can be tracked; MLflow itself retries for minutes.

    Raises:
        UserError: the server does not answer, the URI is of no kind that MLflow knows, or the working folder is
            read-only.
    """
    uri = tracking_uri()
    place = urlsplit(uri)
    try:
        if place.scheme in {"http", "https"}:
            port = place.port or (443 if place.scheme == "https" else 80)
            socket.create_connection((place.hostname or "", port), timeout=ANSWER_SECONDS).close()
        elif not os.environ.get("MLFLOW_TRACKING_URI") and not os.access(Path.cwd(), os.W_OK):
            raise UserError(
                f"{Path.cwd()}: expected a folder where mlflow.db can be written, got a read-only one. "
                "Work in another folder, or set MLFLOW_TRACKING_URI."
            )
        else:
            MlflowClient(tracking_uri=uri)
    except (OSError, ValueError, MlflowException) as error:
        shown = urlunsplit(place._replace(netloc=place.netloc.rpartition("@")[2]))
        raise UserError(
            f"MLFLOW_TRACKING_URI={shown}: expected an MLflow target that answers, got: {error}. "
            "Start the server, correct the address, or unset the variable for a local file."
        ) from error


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
