"""Track a command that measures or writes something, after its result is complete.

The run is sent at the end, in one go, with the times of the command. Tracking therefore never delays or changes a
result, and a command that fails has no run. Records that do not reach the server stay beside the result, and
`medim sync` sends them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medim.output_folder import record_output_file
from medim.signals import finish_at_signal
from medim.tracking.lineage import PACKAGE_TAG, Source
from medim.tracking.outbox import RECORDS, STATE, Outbox, format_server_error
from medim.tracking.target import forward_logs, is_tracking_enabled, prepare_database, set_short_timeouts, tracking_uri
from medim.tracking.tracker import Tracker
from medim.tracking.tracking import list_version_tags, locate_package_records

if TYPE_CHECKING:
    from medim.tracking.registry import PackageVersion

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrackedResult:
    """Result of a command, without rows of single images.

    Attributes:
        command: name of the command; the experiment is `medim-<command>`.
        folder: output folder, or package.
        name: name of the run.
        start: start of the command, in seconds since the epoch.
        parameters: nested mapping of options, hashes and versions.
        metrics: numbers.
        model_metrics: numbers that are also those of the model that was measured.
        index_hash: hash of the images that were measured.
        tables: rows by name of the table.
        texts: texts that are stored as artifacts, such as figures in SVG, by name.
        files: files of the folder that are stored as artifacts.
        sources: weights and packages that the command used.
        package_sha256: digest of the package that the command wrote.
        version: registered version of that package; None for no registration.
    """

    command: str
    folder: Path
    name: str
    start: float
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    model_metrics: Mapping[str, float] = field(default_factory=dict)
    index_hash: str | None = None
    tables: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[str] = ()
    sources: Sequence[Source] = ()
    package_sha256: str | None = None
    version: PackageVersion | None = None


def track_result(command: str, build_result: Callable[[], TrackedResult]) -> bool:
    """Send the run of a finished command; an error of any kind is logged, and unsent records are kept.

    Args:
        command: name of the command.
        build_result: function that collects the content of the run; it is not called if tracking is off.

    Returns:
        Whether the server has all records.
    """
    if not is_tracking_enabled():
        return False
    if not importlib.util.find_spec("mlflow"):
        log.warning("tracking: mlflow is not installed, so this command is not tracked. pip install mlflow")
        return False
    n_unsent = 0
    is_sent = False
    try:
        result = build_result()
        with finish_at_signal(
            f"tracking: stopped by a signal; the result is complete. To send the records: medim sync {result.folder}"
        ):
            n_unsent = _write_and_send(result)
            is_sent = True
    except Exception as error:  # such as a full disk
        log.warning("tracking: %s is not tracked (%s). The result is complete", command, format_server_error(error))
        log.debug("traceback", exc_info=True)
        return False
    if n_unsent:
        log.warning(
            "tracking: %d records did not reach the server and are kept. To send them: medim sync %s",
            *(n_unsent, result.folder),
        )
    return is_sent and not n_unsent


def _write_and_send(result: TrackedResult) -> int:
    """Write the records of a result to its outbox, send them, and return the number of unsent ones."""
    is_package = result.package_sha256 is not None
    folder = locate_package_records(result.folder) if is_package else result.folder
    if is_package:
        shutil.rmtree(folder, ignore_errors=True)  # records of an earlier package
        folder.mkdir()
    else:
        for name in (RECORDS, STATE):
            record_output_file(folder / name)
    with closing(Outbox(result.folder, folder)) as outbox:
        _write_records(Tracker(outbox), result)
        _send_all(outbox)
        n_unsent = len(outbox.pending())
    if is_package and not n_unsent:
        shutil.rmtree(folder, ignore_errors=True)
    elif not n_unsent:
        (folder / STATE).unlink(missing_ok=True)  # a result has one run; a repeated command has its own
    return n_unsent


def _write_records(tracker: Tracker, result: TrackedResult) -> None:
    run = {"experiment": f"medim-{result.command}", "name": result.name, "tags": list_version_tags()}
    tracker.add({"run": {**run, "start": round(1000 * result.start)}})
    tracker.log_parameters(result.parameters)
    if result.package_sha256:
        tracker.add({"tags": {PACKAGE_TAG: result.package_sha256}})
    if result.index_hash:
        tracker.log_dataset(result.index_hash, "evaluation")
    tracker.log_sources(result.sources)
    if result.model_metrics:
        tracker.log_model_metrics(result.model_metrics)
    tracker.log_metrics({**result.metrics, "seconds": time.time() - result.start})
    for name, rows in result.tables.items():
        tracker.log_table(name, rows)
    for name, text in result.texts.items():
        tracker.log_text(name, text)
    for name in result.files:
        tracker.add({"artifact": name, "to": name.rpartition("/")[0]})
    if result.version:
        tracker.add({"package": result.version})
    tracker.add({"end": "FINISHED", "time": round(1000 * time.time())})


def _send_all(outbox: Outbox) -> None:
    from medim.tracking.delivery import send

    forward_logs()
    set_short_timeouts()
    try:
        prepare_database(tracking_uri())
        send(outbox, outbox.pending())
    except Exception as error:  # any failure of a server, a network or a disk
        log.warning("tracking: the server does not accept records (%s)", format_server_error(error))
        log.debug("traceback", exc_info=True)


def is_tracking_configured() -> bool:
    """Whether a tracking target is configured, and tracking is not off; without one, `predict` is not tracked."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) and is_tracking_enabled()
