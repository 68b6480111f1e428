"""MLflow: where runs are tracked. MLflow's only home."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lightning.pytorch.loggers import MLFlowLogger
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from medim.config import RunConfig
from medim.types import UserError

STUDIES = "medim-study"  # the experiment of all studies
STOPPED = 75  # exit code of what was asked to stop
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
def track(
    command: str, config: RunConfig, *, seed: int, index_hash: str, parent: str | None = None
) -> Iterator[MLFlowLogger]:
    """Open an MLflow run of experiment `medim-<command>`, and close it as finished or failed.

    Nothing of the data goes in but the index's hash.

    Args:
        command: pretrain or finetune.
        config: logged as parameters, flattened.
        seed: of the run.
        index_hash: which data.
        parent: run of a study that this one is a part of; it is then logged to the study's experiment.
    """
    logger = MLFlowLogger(
        STUDIES if parent else f"medim-{command}",
        run_name=f"{config.name}-{config.hash}",
        tracking_uri=tracking_uri(),
        tags={MLFLOW_PARENT_RUN_ID: parent} if parent else None,
        log_model=False,
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


@contextmanager
def track_study(name: str, parameters: Mapping[str, Any], *, run: str | None = None) -> Iterator[str]:
    """Open the run of a study, whose cells are its children, and close it as finished, killed or failed.

    Args:
        name: of the run.
        parameters: logged where the run is new.
        run: id of the run to take up; where it is gone, a new one is made.

    Yields:
        The run's id.
    """
    client = MlflowClient(tracking_uri=tracking_uri())
    try:
        client.update_run(run or "", status="RUNNING")
    except MlflowException:
        found = client.get_experiment_by_name(STUDIES)
        experiment = found.experiment_id if found else client.create_experiment(STUDIES)
        run = str(client.create_run(experiment, run_name=name).info.run_id)
        for key, value in parameters.items():
            client.log_param(run, key, value)
    assert run is not None
    try:
        yield run
    except BaseException as error:
        client.set_terminated(run, "KILLED" if getattr(error, "exit_code", 1) == STOPPED else "FAILED")
        raise
    client.set_terminated(run, "FINISHED")


def log_study(run: str, metrics: Mapping[str, float], files: list[Path]) -> None:
    """Log final numbers and files of a study."""
    client = MlflowClient(tracking_uri=tracking_uri())
    for name, value in metrics.items():
        client.log_metric(run, name, value)
    for file in files:
        client.log_artifact(run, str(file))


def tag(logger: Any, name: str, value: str) -> None:
    """Set a tag of a run that is going on; nothing where the logger is none of MLflow's."""
    if isinstance(logger, MLFlowLogger):
        logger.experiment.set_tag(logger.run_id, name, value)


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
