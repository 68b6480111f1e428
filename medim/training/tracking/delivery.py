"""What a run has written down, put into MLflow's terms and sent."""

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

from medim.files import read_json
from medim.training.tracking.outbox import Journal, Record
from medim.version import __version__

log = logging.getLogger(__name__)
REFUSED = {
    *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"),
    *("PERMISSION_DENIED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED"),
}


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def deliver(journal: Journal, records: Sequence[Record]) -> None:
    """Send records in their order, and note each that arrives.

    Args:
        journal: theirs.
        records: of one key each, that says which kind: `run`, `params`, `metrics`, `tags`, `artifact`, `model`, `end`.

    Raises:
        Exception: of any kind, where the server did not take them; what it refuses for good is told and left out.
    """
    client = MlflowClient(tracking_uri=tracking_uri())
    numbers: list[Metric] = []
    held = 0

    def flush() -> None:
        """Send the metrics that were held back, a thousand numbers a request, and note the arrival of their records."""
        nonlocal numbers, held
        with _unless_refused("metrics"):
            for first in range(0, len(numbers), 1000):
                client.log_batch(journal.state["run"], metrics=numbers[first : first + 1000])
        journal.arrived(held)
        numbers, held = [], 0

    for record in records:
        if "metrics" in record:
            numbers += [Metric(name, v, record["time"], record["step"]) for name, v in record["metrics"].items()]
            held += 1
            continue
        if held:
            flush()
        with nullcontext() if "run" in record else _unless_refused(next(iter(record))):
            _deliver(client, journal, record)
        journal.arrived(1)
    if held:
        flush()


@contextmanager
def _unless_refused(kind: str) -> Iterator[None]:
    """Tell what a server will never take, a file that is gone or a store without its library, and go on."""
    try:
        yield
    except (MlflowException, FileNotFoundError, ImportError) as error:
        if isinstance(error, MlflowException) and error.error_code not in REFUSED:
            raise
        log.warning("tracking: %s was refused and left out (%s)", kind, error)


def _deliver(client: MlflowClient, journal: Journal, record: Record) -> None:
    """Send one record that is not of metrics."""
    if "run" in record:
        journal.state["run"] = _run(client, journal.state.get("run"), **record["run"])
        return
    run = journal.state["run"]
    if "params" in record:
        params = [Param(name, value) for name, value in record["params"].items()]
        for first in range(0, len(params), 100):
            client.log_batch(run, params=params[first : first + 100])
    elif "tags" in record:
        client.log_batch(run, tags=[RunTag(key, value) for key, value in record["tags"].items()])
    elif "artifact" in record:
        client.log_artifact(run, str(journal.out / record["artifact"]), record["to"] or None)
    elif "model" in record:
        _register(client, run, journal.out, record["model"])
    else:
        client.set_terminated(run, record["end"])


def _run(client: MlflowClient, known: str | None, *, experiment: str, name: str, tags: Mapping[str, str]) -> str:
    """Take a run up, or make it where it is new or gone."""
    if known:
        try:
            client.update_run(known, status="RUNNING")
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
        else:
            client.log_batch(known, tags=[RunTag(key, value) for key, value in tags.items()])
            return known
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment)
    return str(client.create_run(number, run_name=name, tags=dict(tags)).info.run_id)


def _register(client: MlflowClient, run: str, out: Path, name: str) -> None:
    """Log an encoder as a model without a pickle, and register it as a new version of `name`.

    The model is safetensors and JSON; `medim.training.tracking.pyfunc` loads it. Its signature is explicit, and its
    example, noise and what the encoder makes of it, lies beside it as `example.npz`.
    """
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types import Schema, TensorSpec

    from medim.training.tracking import pyfunc

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        (folder / "data").mkdir(parents=True)
        for part in ("encoder.safetensors", "encoder.json", "card.md"):
            shutil.copy(out / "encoder" / part, folder / "data" / part)
        spec = read_json(folder / "data" / "encoder.json")
        shape = (spec["in_channels"], *spec["input_shape"])
        example = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
        answer = pyfunc.load(folder / "data").predict(example)
        np.savez_compressed(folder / "example.npz", input=example, output=answer)
        single = np.dtype(np.float32)
        signature = ModelSignature(
            Schema([TensorSpec(single, (-1, *shape))]),
            Schema([TensorSpec(single, (-1, *answer.shape[1:]))]),
        )
        made = Model(artifact_path="encoder", run_id=run, signature=signature, metadata={"example": "example.npz"})
        (folder / "requirements.txt").write_text(f"medim[train]=={__version__}\n")
        add_to_model(made, loader_module=pyfunc.__name__, data="data")  # type: ignore[no-untyped-call]
        made.save(str(folder / "MLmodel"))
        client.log_artifacts(run, str(folder), "encoder")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if not client.search_model_versions(f"name = '{name}' and run_id = '{run}'"):
        source = f"{client.get_run(run).info.artifact_uri}/encoder"
        client.create_model_version(name, source=source, run_id=run, await_creation_for=0)
