"""Send the records of an outbox to MLflow."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from medim.tracking.lineage import link_sources, log_weights, set_tags
from medim.tracking.outbox import Outbox, OutboxRecord, format_server_error
from medim.tracking.registry import register_encoder, register_package
from medim.tracking.target import tracking_uri
from medim.types import UserError

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # MLflow 3 would guess an experiment of GenAI
TABLES_TAG = "mlflow.loggedArtifacts"  # tables that MLflow displays
REJECTION_CODES = {
    *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"),
    *("PERMISSION_DENIED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED"),
}


def send(outbox: Outbox, records: Sequence[OutboxRecord]) -> int:
    """Send records in order, and acknowledge each record that arrived.

    Args:
        outbox: outbox of the records.
        records: records whose first key is the kind: `run`, `params`, `metrics`, `tags`, `table`, `text`,
            `artifact`, `dataset`, `sources`, `weights`, `model`, `package` or `end`.

    Returns:
        Number of records that the server rejected permanently.

    Raises:
        Exception: of any kind, if the server did not accept the records. A record that the server rejects permanently
            is logged and left out, except `run` and `package`.
    """
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri())
    numbers: list[Metric] = []
    n_pending = 0
    rejections: list[int] = []  # numbers of records

    def flush_metrics() -> None:
        """Send the collected metrics, 1,000 numbers per request, and acknowledge their records."""
        nonlocal numbers, n_pending
        with _skip_rejected("metrics", rejections, n_pending):
            for start in range(0, len(numbers), 1000):
                client.log_batch(outbox.state["run"], metrics=numbers[start : start + 1000])
        outbox.acknowledge(n_pending)
        numbers, n_pending = [], 0

    for record in records:
        if "metrics" in record and not record.get("on_models"):
            numbers += [Metric(name, v, record["time"], record["step"]) for name, v in record["metrics"].items()]
            n_pending += 1
            continue
        if n_pending:
            flush_metrics()
        is_required = "run" in record or "package" in record  # a registration was asked for by name
        with nullcontext() if is_required else _skip_rejected(next(iter(record)), rejections):
            _send_record(client, outbox, record)
        outbox.acknowledge(1)
    if n_pending:
        flush_metrics()
    return sum(rejections)


@contextmanager
def _skip_rejected(kind: str, rejections: list[int], count: int = 1) -> Iterator[None]:
    """Log, count and skip records that can never be sent: rejected by the server, file missing, or library missing."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, UserError, FileNotFoundError, ImportError) as error:
        if isinstance(error, MlflowException) and error.error_code not in REJECTION_CODES:
            raise
        rejections.append(count)
        log.warning("tracking: %s was rejected and left out (%s)", kind, format_server_error(error))


def _send_record(client: MlflowClient, outbox: Outbox, record: OutboxRecord) -> None:
    """Send one record of any kind except metrics."""
    if "run" in record:
        outbox.state["run"] = _resume_or_create_run(client, outbox.state.get("run"), **record["run"])
        return
    run_id = outbox.state["run"]
    if "params" in record:
        params = _select_new_parameters(client, run_id, record["params"])
        for start in range(0, len(params), 100):
            client.log_batch(run_id, params=params[start : start + 100])
    elif "tags" in record:
        set_tags(client, run_id, record["tags"])
    elif "table" in record:
        _log_table(client, run_id, _check_artifact_name(record["table"]), record["content"])
    elif "text" in record:
        client.log_text(run_id, record["content"], _check_artifact_name(record["text"]))
    elif "artifact" in record:
        target = _check_artifact_name(record["to"])
        client.log_artifact(run_id, str(_locate_artifact(outbox.out, record["artifact"])), target or None)
    elif "metrics" in record:
        _log_model_metrics(client, run_id, record)
    elif "dataset" in record:
        _log_dataset(client, run_id, record["dataset"], record["context"])
    elif "sources" in record:
        link_sources(client, client.get_run(run_id), record["sources"])
    elif "weights" in record:
        log_weights(client, client.get_run(run_id), record["weights"], record["sha256"])
    elif "model" in record:
        register_encoder(client, run_id, outbox.out, record["model"])
    elif "package" in record:
        register_package(client, client.get_run(run_id), outbox.out, record["package"])
    else:
        client.set_terminated(run_id, record["end"], record.get("time"))


def _log_model_metrics(client: MlflowClient, run_id: str, record: OutboxRecord) -> None:
    """Log metrics of a run, also as those of the logged models that it measured."""
    from mlflow.entities import Metric

    inputs = client.get_run(run_id).inputs
    models: list[str | None] = [model.model_id for model in inputs.model_inputs] if inputs else []
    for start in range(0, len(names := list(record["metrics"])), 1000):
        metrics = [
            Metric(name, record["metrics"][name], record["time"], record["step"], model_id=model, run_id=run_id)
            for name in names[start : start + 1000]
            for model in models or [None]
        ]
        client.log_batch(run_id, metrics=metrics)


def _log_dataset(client: MlflowClient, run_id: str, index_hash: str, context: str) -> None:
    """Log the hash of an index as the dataset of a run; it is all that is sent about the images."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"index_hash": index_hash})
    dataset = Dataset(name="index", digest=index_hash[:12], source_type="medim", source=source)
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def _log_table(client: MlflowClient, run_id: str, name: str, content: Mapping[str, object]) -> None:
    """Log a table; unlike `MlflowClient.log_table`, which appends, sending it again changes nothing."""
    client.log_dict(run_id, dict(content), name)
    logged = json.loads(client.get_run(run_id).data.tags.get(TABLES_TAG, "[]"))
    entry = {"path": name, "type": "table"}
    if entry not in logged:
        set_tags(client, run_id, {TABLES_TAG: json.dumps([*logged, entry])})


def _select_new_parameters(client: MlflowClient, run: str, parameters: Mapping[str, str]) -> list[Param]:
    """Select the parameters that the run does not have; MLflow refuses to change the others, which are logged."""
    from mlflow.entities import Param

    logged: Mapping[str, str] = client.get_run(run).data.params
    changed = sorted(name for name, value in parameters.items() if logged.get(name, value) != value)
    if changed:
        log.warning("tracking: MLflow keeps the earlier values of the parameters %s", ", ".join(changed))
    return [Param(name, value) for name, value in parameters.items() if name not in logged]


def _check_artifact_name(name: str) -> str:
    """Return a name relative to the artifacts of a run.

    Raises:
        FileNotFoundError: it leaves them. MLflow rejects such a name, too, but with the code of an internal error, so
            it would be sent for ever.
    """
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise FileNotFoundError(f"{name[:80]!r} is no name of an artifact")
    return name


def _locate_artifact(out: Path, name: str) -> Path:
    """Locate a file of a run by its name relative to the run's folder.

    Raises:
        FileNotFoundError: it does not exist or is outside the folder. The records of a run from elsewhere must not send
            other files of this machine to the tracking server.
    """
    path = (out / name).resolve()
    if not path.is_relative_to(out.resolve()) or not path.is_file():
        raise FileNotFoundError(f"{name[:80]!r} is no file of the run")
    return path


def _resume_or_create_run(
    client: MlflowClient,
    run_id: str | None,
    *,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    start: int | None = None,
) -> str:
    """Resume a run, or create it if it is new or was deleted; `start` is the time of its start in milliseconds."""
    from mlflow.exceptions import MlflowException

    if run_id:
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code not in REJECTION_CODES:
                raise
        else:
            set_tags(client, run_id, tags)
            return run_id
    experiment_entry = client.get_experiment_by_name(experiment)
    experiment_id = (
        experiment_entry.experiment_id
        if experiment_entry
        else client.create_experiment(experiment, tags=EXPERIMENT_TAGS)
    )
    return str(client.create_run(experiment_id, start_time=start, run_name=name, tags=dict(tags)).info.run_id)
