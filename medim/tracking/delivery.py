"""Send the records of an outbox to MLflow."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from medim.model_spec import read_spec
from medim.training.tracking.outbox import Outbox, OutboxRecord
from medim.version import DISTRIBUTION, __version__

log = logging.getLogger(__name__)
REJECTION_CODES = {
    *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"),
    *("PERMISSION_DENIED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED"),
}


def tracking_uri() -> str:
    """Get `MLFLOW_TRACKING_URI`, or the URI of a SQLite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def send(outbox: Outbox, records: Sequence[OutboxRecord]) -> None:
    """Send records in order, and acknowledge each record that arrived.

    Args:
        outbox: outbox of the records.
        records: records with one key for the kind: `run`, `params`, `metrics`, `tags`, `artifact`, `model` or `end`.

    Raises:
        Exception: of any kind, if the server did not accept the records. A record that the server rejects permanently
            is logged and left out.
    """
    client = MlflowClient(tracking_uri=tracking_uri())
    numbers: list[Metric] = []
    n_pending = 0

    def flush_metrics() -> None:
        """Send the collected metrics, 1,000 numbers per request, and acknowledge their records."""
        nonlocal numbers, n_pending
        with _skip_rejected("metrics"):
            for start in range(0, len(numbers), 1000):
                client.log_batch(outbox.state["run"], metrics=numbers[start : start + 1000])
        outbox.acknowledge(n_pending)
        numbers, n_pending = [], 0

    for record in records:
        if "metrics" in record:
            numbers += [Metric(name, v, record["time"], record["step"]) for name, v in record["metrics"].items()]
            n_pending += 1
            continue
        if n_pending:
            flush_metrics()
        with nullcontext() if "run" in record else _skip_rejected(next(iter(record))):
            _send_record(client, outbox, record)
        outbox.acknowledge(1)
    if n_pending:
        flush_metrics()


@contextmanager
def _skip_rejected(kind: str) -> Iterator[None]:
    """Log and skip a record that can never be sent: rejected by the server, file missing, or library missing."""
    try:
        yield
    except (MlflowException, FileNotFoundError, ImportError) as error:
        if isinstance(error, MlflowException) and error.error_code not in REJECTION_CODES:
            raise
        log.warning("tracking: %s was rejected and left out (%s)", kind, error)


def _send_record(client: MlflowClient, outbox: Outbox, record: OutboxRecord) -> None:
    """Send one record of any kind except metrics."""
    if "run" in record:
        outbox.state["run"] = _resume_or_create_run(client, outbox.state.get("run"), **record["run"])
        return
    run = outbox.state["run"]
    if "params" in record:
        params = _select_new_parameters(client, run, record["params"])
        for start in range(0, len(params), 100):
            client.log_batch(run, params=params[start : start + 100])
    elif "tags" in record:
        client.log_batch(run, tags=[RunTag(key, value) for key, value in record["tags"].items()])
    elif "artifact" in record:
        client.log_artifact(run, str(_locate_artifact(outbox.out, record["artifact"])), record["to"] or None)
    elif "model" in record:
        _register_encoder(client, run, outbox.out, record["model"])
    else:
        client.set_terminated(run, record["end"])


def _select_new_parameters(client: MlflowClient, run: str, parameters: Mapping[str, str]) -> list[Param]:
    """Select the parameters that the run does not have; MLflow refuses to change the others, which are logged."""
    logged: Mapping[str, str] = client.get_run(run).data.params
    changed = sorted(name for name, value in parameters.items() if logged.get(name, value) != value)
    if changed:
        log.warning("tracking: MLflow keeps the earlier values of the parameters %s", ", ".join(changed))
    return [Param(name, value) for name, value in parameters.items() if name not in logged]


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
    client: MlflowClient, run_id: str | None, *, experiment: str, name: str, tags: Mapping[str, str]
) -> str:
    """Resume a run, or create it if it is new or was deleted."""
    if run_id:
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code not in REJECTION_CODES:
                raise
        else:
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
            return run_id
    experiment_entry = client.get_experiment_by_name(experiment)
    experiment_id = experiment_entry.experiment_id if experiment_entry else client.create_experiment(experiment)
    return str(client.create_run(experiment_id, run_name=name, tags=dict(tags)).info.run_id)


def _register_encoder(client: MlflowClient, run: str, out: Path, name: str) -> None:
    """Log an encoder as a model without a pickle, and register it as a new version of `name`.

    The model consists of safetensors and JSON and is loaded by `medim.training.tracking.pyfunc`. It has an explicit
    signature. `example.npz` contains an example: noise as input and the output of the encoder.
    """
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types import Schema, TensorSpec

    from medim.training.tracking import pyfunc

    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = Path(temporary_folder) / "model"
        (folder / "data").mkdir(parents=True)
        for part in ("encoder.safetensors", "encoder.json", "card.md"):
            shutil.copy(out / "encoder" / part, folder / "data" / part)
        spec = read_spec(folder / "data" / "encoder.json")
        shape = (spec.in_channels, *spec.input_shape)
        example = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
        output = pyfunc.load_encoder_pyfunc(folder / "data").predict(example)
        np.savez_compressed(folder / "example.npz", input=example, output=output)
        dtype = np.dtype(np.float32)
        signature = ModelSignature(
            Schema([TensorSpec(dtype, (-1, *shape))]),
            Schema([TensorSpec(dtype, (-1, *output.shape[1:]))]),
        )
        model = Model(artifact_path="encoder", run_id=run, signature=signature, metadata={"example": "example.npz"})
        (folder / "requirements.txt").write_text(f"{DISTRIBUTION}[train]=={__version__}\n")
        add_to_model(model, loader_module=pyfunc.__name__, data="data")  # type: ignore[no-untyped-call]
        model.save(str(folder / "MLmodel"))
        client.log_artifacts(run, str(folder), "encoder")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if not client.search_model_versions(f"name = '{name}' and run_id = '{run}'"):
        source = f"{client.get_run(run).info.artifact_uri}/encoder"
        client.create_model_version(name, source=source, run_id=run, await_creation_for=0)
