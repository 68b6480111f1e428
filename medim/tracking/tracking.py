"""Track runs with MLflow.

A run writes records to its `outbox`, and `delivery` sends them from there, so no step waits for a server or fails
because of one. The records contain the configuration, numbers, figures, hashes and versions, and no image data.
`medim sync RUN` sends the records that a run could not send.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lightning.pytorch.loggers import Logger
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID

from medim.config import RunConfig
from medim.output_folder import acquire_lock
from medim.signals import current_request, exited_after_saving
from medim.training.tracking.delivery import send, tracking_uri
from medim.training.tracking.outbox import RECORDS, STATE, Outbox, OutboxRecord, OutboxSender
from medim.training.tracking.system_metrics import SystemMetrics
from medim.types import UserError
from medim.version import __version__

log = logging.getLogger(__name__)
STUDY_EXPERIMENT = "medim-study"  # experiment of all studies
ANSWER_SECONDS = 10  # longest time for a tracking server to accept a connection
PATIENCE_SECONDS = 60.0  # longest time to send records after a run has finished
SHUTDOWN_TIMEOUT = 5.0  # longest time to send records after a run was stopped or failed
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; the outbox retries
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
}
MAX_PARAMETER_LENGTH = 6000  # characters of a parameter that every server accepts


def check_target(resume_folder: Path | None = None) -> None:
    """Check within seconds whether runs can be tracked; MLflow itself retries for minutes.

    Args:
        resume_folder: folder of a resumed run. If the run was tracked before, an unreachable server is only logged, and
            its records are sent later.

    Raises:
        UserError: the server does not respond, MLflow does not support the URI, or the working folder is read-only.
    """
    _forward_logs()
    uri = tracking_uri()
    uri_parts = urlsplit(uri)
    try:
        if uri_parts.scheme in {"http", "https"}:
            port = uri_parts.port or (443 if uri_parts.scheme == "https" else 80)
            socket.create_connection((uri_parts.hostname or "", port), timeout=ANSWER_SECONDS).close()
        elif not os.environ.get("MLFLOW_TRACKING_URI") and not os.access(Path.cwd(), os.W_OK):
            raise UserError(
                f"{Path.cwd()}: cannot write mlflow.db, because the folder is read-only. "
                "Work in another folder, or set MLFLOW_TRACKING_URI."
            )
        else:
            _make_database(uri)
            MlflowClient(tracking_uri=uri)
    except UserError:
        raise
    except Exception as error:  # MLflow raises errors of its database libraries
        public_uri = urlunsplit(uri_parts._replace(netloc=uri_parts.netloc.rpartition("@")[2]))
        if resume_folder and (resume_folder / STATE).is_file():
            log.warning(
                "MLFLOW_TRACKING_URI=%s does not respond (%s); the records are kept and sent later",
                *(public_uri, _first_line(error)),
            )
            return
        raise UserError(
            f"MLFLOW_TRACKING_URI={public_uri}: no MLflow server or database available: {_first_line(error)}. "
            "Start the server, correct the address, or unset the variable to track in a local file; move a damaged "
            "mlflow.db away."
        ) from error


def _first_line(error: Exception) -> str:
    """Return the first line of a message, without the SQL below it."""
    return str(error).partition("\n")[0]


def _make_database(uri: str) -> None:
    """Create a missing SQLite file under a temporary name, and move it to its place when it is complete.

    MLflow creates the file table by table, so if two runs start at the same time in a new folder, one of them fails.
    The second run waits. Files of a run that was killed are removed by the next one.

    Raises:
        Exception: of any kind, if the file cannot be created.
    """
    scheme, _, location = uri.partition(":///")
    path = Path(location)
    if scheme != "sqlite" or not location or path.exists():
        return
    lock, folder = path.with_name(f".{path.name}.lock"), path.with_name(f".{path.name}.new")
    path.parent.stat()  # raises an error if it is missing
    with acquire_lock(lock, wait=True):
        try:
            shutil.rmtree(folder, ignore_errors=True)
            if not path.exists():
                folder.mkdir()
                MlflowClient(tracking_uri=f"sqlite:///{(folder / path.name).resolve()}")
                with suppress(OSError):  # another program was first, or the disk has no hard links: MLflow creates it
                    os.link(folder / path.name, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink()


class Tracker(Logger):
    """Lightning logger that writes the records of a run to its outbox.

    Args:
        outbox: outbox of the run.
    """

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox
        self._system_metrics = SystemMetrics(outbox.out)

    @property
    def name(self) -> str:
        """Name of the kind of logger."""
        return "mlflow"

    @property
    def version(self) -> str:
        """Run id of MLflow; empty until MLflow has created the run."""
        return str(self._outbox.state.get("run", ""))

    def add(self, record: OutboxRecord) -> None:
        """Add a record of any kind; see `send`."""
        self._outbox.add(record)

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Log a nested mapping as flat parameters with keys joined by a slash."""
        flat = {key: str(value)[:MAX_PARAMETER_LENGTH] for key, value in _flatten_parameters(params)}
        self.add({"params": flat})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the numbers of a step; steps that a resumed run repeats are left out."""
        record_step = step or 0
        new_metrics = {
            name: float(value)
            for name, value in metrics.items()
            if step is None or record_step > self._outbox.last.get(name, -1)
        }
        if new_metrics:
            self.add({"metrics": new_metrics, "step": record_step, "time": int(time.time() * 1000)})

    def measure(self) -> OutboxRecord:
        """Measure the load of the machine, as a record."""
        metrics = self._system_metrics()
        record_step = 1 + max(self._outbox.last.get(name, -1) for name in metrics)
        return {"metrics": metrics, "step": record_step, "time": int(time.time() * 1000)}


def _flatten_parameters(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten_parameters(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


@contextmanager
def track_run(
    command: str, config: RunConfig, out: Path, *, seed: int, index_hash: str, parent: str | None = None
) -> Iterator[Tracker]:
    """Open an MLflow run of experiment `medim-<command>`, or resume that of `out`, and close it with its final status.

    The index hash is the only information about the data in the record. If the server becomes unreachable, this is
    logged once and the records are sent when it is back; if it stays unreachable, the records are kept in `out`.

    Args:
        command: pretrain or finetune.
        config: configuration, logged as flat parameters.
        out: folder of the run.
        seed: random seed of the run.
        index_hash: hash of the index of the images.
        parent: MLflow run of the study that this run belongs to; the run is then logged in the experiment of studies.
    """
    tags = {MLFLOW_PARENT_RUN_ID: parent} if parent else {}
    parameters = {**config.model_dump(mode="json"), "seed": seed, "config_hash": config.hash, "index_hash": index_hash}
    run = {"experiment": STUDY_EXPERIMENT if parent else f"medim-{command}", "name": f"{config.name}-{config.hash}"}
    patience = (
        SHUTDOWN_TIMEOUT if parent else PATIENCE_SECONDS
    )  # a study sends the unsent records of its cells at its end
    with _open_run(Outbox(out), run, tags, parameters, patience) as tracker:
        if (out / "config.yaml").is_file():
            log_files(tracker, [out / "config.yaml"])  # an artifact store that refuses files shows at the first step
        yield tracker


@contextmanager
def track_study(out: Path, name: str, parameters: Mapping[str, Any]) -> Iterator[Tracker]:
    """Open or resume the MLflow run of a study, the parent of the runs of its cells.

    The run exists on the server when the context is entered. At the end, the unsent records of the cells are sent.
    After an error they are not, because a stopped study may be killed within seconds; the call that finishes the study
    sends them.

    Args:
        out: folder of the study.
        name: name of the run.
        parameters: nested mapping, logged as flat parameters.

    Raises:
        Exception: of any kind, if a new run could not be created.
    """
    outbox = Outbox(out)
    has_run = "run" in outbox.state
    run = {"experiment": STUDY_EXPERIMENT, "name": name}
    with _open_run(outbox, run, {}, parameters, PATIENCE_SECONDS, send_now=not has_run) as tracker:
        yield tracker
    for cell in sorted(path.parent for path in out.glob(f"*/**/{RECORDS}")):
        try:
            sync_pending(cell)
        except Exception:  # as in `OutboxSender`
            with closing(Outbox(cell)) as cell_outbox:
                _warn_unsent(len(cell_outbox.pending()), cell)


@contextmanager
def _open_run(
    outbox: Outbox,
    run: Mapping[str, str],
    tags: Mapping[str, str],
    parameters: Mapping[str, Any],
    patience: float,
    *,
    send_now: bool = False,
) -> Iterator[Tracker]:
    """Open a run, or resume that of the outbox, send its records from a thread, and close it with its final status."""
    _set_short_timeouts()
    tracker = Tracker(outbox)
    tracker.add({"run": {**run, "tags": {"medim.version": __version__, **_read_git_commit(), **tags}}})
    tracker.log_hyperparams(parameters)
    if send_now:
        send(outbox, outbox.pending())
    sender = OutboxSender(outbox, send, measure=tracker.measure)
    sender.start()
    try:
        yield tracker
    except BaseException as error:
        is_killed = current_request().signal_name or exited_after_saving(error)
        tracker.add({"end": "KILLED" if is_killed else "FAILED"})
        _warn_unsent(sender.finish(SHUTDOWN_TIMEOUT), outbox.out)
        raise
    tracker.add({"end": "FINISHED"})
    _warn_unsent(sender.finish(patience), outbox.out)


def _warn_unsent(n_unsent: int, out: Path) -> None:
    if n_unsent:
        log.warning(
            "tracking: %d records did not reach the server and are kept in %s. `--resume` sends them first. To send "
            "those of a finished run: medim sync %s",
            *(n_unsent, out, out),
        )


@functools.cache
def _read_git_commit() -> dict[str, str]:
    """Read the git commit of medim if it is imported from a clone."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return {}
    git = ["git", "-C", str(root)]
    try:
        outputs = [
            subprocess.run([*git, *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return {}
    return {MLFLOW_GIT_COMMIT: outputs[0], "medim.git.changed": str(bool(outputs[1])).lower()}


def set_tag(logger: Any, name: str, value: str) -> None:
    """Set a tag of the current run; other loggers are ignored."""
    if isinstance(logger, Tracker):
        logger.add({"tags": {name: value}})


def log_results(tracker: Tracker, metrics: Mapping[str, object], files: Sequence[Path]) -> None:
    """Log the final numbers and files of a run."""
    numbers = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    tracker.log_metrics(numbers)
    log_files(tracker, files)


def log_files(tracker: Tracker, files: Sequence[Path]) -> None:
    """Log files of a run as artifacts; those of its folder `figures` are stored under that name."""
    for file in files:
        target = file.parent.name if file.parent.name == "figures" else ""
        tracker.add({"artifact": f"{target}/{file.name}".lstrip("/"), "to": target})


def log_encoder(tracker: Tracker, name: str) -> None:
    """Register the encoder of a pretraining run if the tracking target is a server, not a local file.

    Args:
        tracker: tracker of the run.
        name: name of the configuration; the model is registered as `medim-<name>`.
    """
    if urlsplit(tracking_uri()).scheme in {"http", "https"}:
        tracker.add({"model": f"medim-{name}"})


def sync_pending(out: Path) -> int:
    """Send the unsent tracking records of a run.

    Args:
        out: folder of the run.

    Returns:
        Number of records sent; 0 if there were none.

    Raises:
        UserError: the folder is not that of a tracked run, or the server does not accept the records, which are kept.
    """
    if not (out / RECORDS).is_file():
        raise UserError(f"{out}: expected the folder of a tracked run, with {RECORDS}. Use the folder of a run.")
    _set_short_timeouts()
    n_sent = 0
    with closing(Outbox(out)) as outbox:
        while records := outbox.pending(200):
            try:
                send(outbox, records)
            except Exception as error:  # as in `OutboxSender`: MLflow raises many kinds
                raise UserError(
                    f"{out}: the tracking server does not accept records ({error}). They are kept."
                ) from error
            n_sent += len(records)
    return n_sent


def _set_short_timeouts() -> None:
    """Limit MLflow to one attempt of a few seconds per request, unless the user has set other values."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)


def _forward_logs() -> None:
    """Let MLflow log through the handlers of the program instead of its own, which print tracebacks."""
    logger = logging.getLogger("mlflow")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
