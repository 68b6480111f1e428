"""Track runs with MLflow.

A run writes records to its `outbox`, and `delivery` sends them from there, so no step waits for a server or fails
because of one. The records contain the configuration, numbers, figures, hashes and versions, and no image data.
`medim sync RUN` sends the records that a run could not send.
"""

from __future__ import annotations

import functools
import logging
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medim.config import RunConfig
from medim.output_folder import INTERNAL_NAMES
from medim.privacy import hide_name
from medim.signals import current_request, exited_after_saving, finish_at_signal
from medim.tracking.delivery import send
from medim.tracking.lineage import STUDY_EXPERIMENT, Source
from medim.tracking.outbox import RECORDS, STATE, Outbox, OutboxSender, format_server_error
from medim.tracking.target import (
    SWITCH,
    check_uri_form,
    convert_server_error,
    forward_logs,
    is_tracking_enabled,
    prepare_database,
    set_short_timeouts,
    tracking_uri,
)
from medim.tracking.tracker import Tracker
from medim.types import UsageError, UserError
from medim.version import __version__

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 60.0  # longest time to send records after a run has finished
SHUTDOWN_TIMEOUT = 5.0  # longest time to send records after a run was stopped or failed


@contextmanager
def track_run(
    command: str,
    config: RunConfig,
    out: Path,
    *,
    inputs: Mapping[str, object],
    sources: Sequence[Source] = (),
    parent: str | None = None,
) -> Iterator[Tracker]:
    """Open an MLflow run of experiment `medim-<command>`, or resume that of `out`, and close it with its final status.

    The index hash is the only information about the data in the record. If the server becomes unreachable, this is
    logged once and the records are sent when it is back; if it stays unreachable, the records are kept in `out`.

    Args:
        command: pretrain or finetune.
        config: configuration, logged as flat parameters.
        out: folder of the run.
        inputs: other parameters: `index_hash`, seeds, label budget.
        sources: weights that the run starts from.
        parent: MLflow run of the study that this run belongs to; the run is then logged in the experiment of studies.
    """
    parameters = {**config.model_dump(mode="json"), **inputs, "config_hash": config.hash}
    name = name_run(out, f"{config.name}-{config.hash}") if parent is None else _name_cell(out)
    run = {"experiment": STUDY_EXPERIMENT if parent else f"medim-{command}", "name": name}
    tags = {"mlflow.parentRunId": parent} if parent else {}
    patience = (
        SHUTDOWN_TIMEOUT if parent else PATIENCE_SECONDS
    )  # a study sends the unsent records of its cells at its end
    with _open_run(out, run, tags, parameters, patience) as tracker:
        tracker.log_dataset(str(inputs["index_hash"]), "training")
        tracker.log_sources(sources)
        if (out / "config.yaml").is_file():
            tracker.log_files([out / "config.yaml"])  # an artifact store that refuses files shows at the first step
        yield tracker


def name_run(out: Path, alternative: str) -> str:
    """Name a run after its output folder, or by an alternative if the folder may be named after a person."""
    folder = out.resolve()
    name = (folder.parent if folder.name in INTERNAL_NAMES else folder).name
    return name if hide_name(name) == name else alternative


def _name_cell(out: Path) -> str:
    """Name the run of a cell of a study by the last parts of its folder: arm, budget, and seeds or learning rate."""
    return "/".join(hide_name(part) for part in out.resolve().parts[-3:])


@contextmanager
def track_study(
    out: Path, name: str, parameters: Mapping[str, Any], sources: Sequence[Source] = ()
) -> Iterator[Tracker]:
    """Open or resume the MLflow run of a study, the parent of the runs of its cells.

    The run exists on the server when the context is entered. At the end, the unsent records of the cells are sent.
    After an error they are not, because a stopped study may be killed within seconds; the call that finishes the study
    sends them.

    Args:
        out: folder of the study.
        name: name of the run.
        parameters: nested mapping, logged as flat parameters.
        sources: encoders of the arms.

    Raises:
        UserError: a new run could not be created.
    """
    run = {"experiment": STUDY_EXPERIMENT, "name": name}
    with _open_run(out, run, {}, parameters, PATIENCE_SECONDS, wait_for_run=True) as tracker:
        tracker.log_sources(sources)
        yield tracker
    for cell in sorted(path.parent for path in out.glob(f"*/**/{RECORDS}")):
        try:
            sync_pending(cell)
        except Exception:  # as in `OutboxSender`
            with closing(Outbox(cell)) as cell_outbox:
                _warn_unsent(len(cell_outbox.pending()), cell)


@contextmanager
def _open_run(
    out: Path,
    run: Mapping[str, str],
    tags: Mapping[str, str],
    parameters: Mapping[str, Any],
    patience: float,
    *,
    wait_for_run: bool = False,
) -> Iterator[Tracker]:
    """Open a run, or resume that of `out`, send its records from a thread, and close it with its final status."""
    if not is_tracking_enabled():
        yield Tracker(None)
        return
    from medim.tracking.system_metrics import SystemMetrics  # imports torch

    set_short_timeouts()
    outbox, system_metrics = Outbox(out), SystemMetrics(out)
    is_new, tracker = "run" not in outbox.state, Tracker(outbox)
    tracker.add({"run": {**run, "tags": {**list_version_tags(), **tags}}})
    tracker.log_parameters(parameters)
    if wait_for_run and is_new:
        try:
            send(outbox, outbox.pending())
        except Exception as error:  # MLflow raises errors of its database libraries
            raise convert_server_error(error) from error
    sender = OutboxSender(outbox, send, measure=lambda: tracker.measure(system_metrics()))
    sender.start()
    try:
        yield tracker
    except BaseException as error:
        is_killed = current_request().signal_name or exited_after_saving(error)
        tracker.add({"end": "KILLED" if is_killed else "FAILED"})
        _warn_unsent(sender.finish(SHUTDOWN_TIMEOUT), outbox.out)
        raise
    tracker.add({"end": "FINISHED"})
    with finish_at_signal(f"tracking: stopped by a signal; the run is complete. To send the records: medim sync {out}"):
        _warn_unsent(sender.finish(patience), outbox.out)


def _warn_unsent(n_unsent: int, out: Path) -> None:
    if n_unsent:
        log.warning(
            "tracking: %d records did not reach the server and are kept in %s. `--resume` sends them first. To send "
            "those of a finished run: medim sync %s",
            *(n_unsent, out, out),
        )


def list_version_tags() -> dict[str, str]:
    """List the tags of the version of medim, and of its commit if it is imported from a clone."""
    return {"medim.version": __version__, **_read_git_commit()}


@functools.cache
def _read_git_commit() -> dict[str, str]:
    """Read the git commit of medim if it is imported from a clone."""
    root = Path(__file__).resolve().parents[2]
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
    return {"mlflow.source.git.commit": outputs[0], "medim.git.changed": str(bool(outputs[1])).lower()}


def log_results(tracker: Tracker, metrics: Mapping[str, object], files: Sequence[Path]) -> None:
    """Log the final numbers and files of a run."""
    numbers = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "schema_version"
    }
    tracker.log_metrics(numbers)
    tracker.log_files(files)


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
        UsageError: tracking is off.
        UserError: the folder is not that of a tracked run, or the server does not accept the records, which are kept.
    """
    if not is_tracking_enabled():
        raise UsageError(f"sync: {SWITCH}=off turns tracking off. Unset it to send the records.")
    folder = out if (out / RECORDS).is_file() else locate_package_records(out)
    if not (folder / RECORDS).is_file():
        if (out / STATE).is_file():  # all records were sent
            return 0
        raise UserError(f"{out}: expected the folder of a tracked run, with {RECORDS}. Use the folder of a run.")
    check_uri_form(tracking_uri())
    forward_logs()
    set_short_timeouts()
    n_sent = 0
    with closing(Outbox(out, folder)) as outbox:
        while records := outbox.pending(200):
            try:
                prepare_database(tracking_uri())
                n_rejected = send(outbox, records)
            except Exception as error:  # as in `OutboxSender`: MLflow raises many kinds
                raise UserError(
                    f"{out}: the tracking server does not accept records ({format_server_error(error)}). They are kept."
                ) from error
            n_sent += len(records) - n_rejected
    if folder != out:
        shutil.rmtree(folder, ignore_errors=True)
    return n_sent


def locate_package_records(package: Path) -> Path:
    """Locate the folder with the unsent records of a package, which must not contain other files: beside it."""
    package = package.resolve()
    return package.with_name(f".{package.name}.medim-mlflow")
