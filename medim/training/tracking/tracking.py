"""MLflow: where runs are tracked.

A run writes its records down, `outbox` keeps them until `delivery` has sent them: no step waits for a server, or fails
with it. What is sent: configuration, numbers, figures, hashes, versions; of images, nothing.
`python -m medim.training.tracking.tracking RUN` sends what a run could not.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lightning.pytorch.loggers import Logger
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID

from medim.config import RunConfig
from medim.signals import current, saved_and_left
from medim.training.tracking.delivery import deliver, tracking_uri
from medim.training.tracking.outbox import RECORDS, STATE, Courier, Journal, Record
from medim.training.tracking.system_metrics import Machine
from medim.types import UserError
from medim.version import __version__

log = logging.getLogger(__name__)
STUDIES = "medim-study"  # the experiment of all studies
ANSWER_SECONDS = 10  # how long a tracking server may take to accept a connection
PATIENCE_SECONDS = 60.0  # for a server that is away when a run has ended
LEAVE_SECONDS = 5.0  # the same where the run was stopped or failed
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; the journal tries again
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # results alone are printed
}
LONGEST = 6000  # characters of a parameter that every server takes


def check_target(resumed: Path | None = None) -> None:
    """Find out within seconds whether runs can be tracked; MLflow itself retries for minutes.

    Args:
        resumed: folder of a run that is taken up: where it has been tracked, a server that is away is waited for.

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
            _make_database(uri)
            MlflowClient(tracking_uri=uri)
    except (OSError, ValueError, MlflowException) as error:
        shown = urlunsplit(place._replace(netloc=place.netloc.rpartition("@")[2]))
        if resumed and (resumed / STATE).is_file():
            log.warning(
                "MLFLOW_TRACKING_URI=%s does not answer (%s); the records are kept and sent later", shown, error
            )
            return
        raise UserError(
            f"MLFLOW_TRACKING_URI={shown}: expected an MLflow target that answers, got: {error}. "
            "Start the server, correct the address, or unset the variable for a local file."
        ) from error


def _make_database(uri: str) -> None:
    """Make a SQLite file that is not there yet beside its place, and put it there whole.

    MLflow itself makes it table by table: of two runs that start at once in a new folder, one then fails.
    """
    scheme, _, place = uri.partition(":///")
    path = Path(place)
    if scheme != "sqlite" or not place or path.exists():
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        made = Path(beside, path.name)
        MlflowClient(tracking_uri=f"sqlite:///{made.resolve()}")
        with suppress(OSError):  # another run was first, or no hard links here: MLflow makes it
            os.link(made, path)


class Tracker(Logger):
    """Writes what a run says of itself into its journal.

    Args:
        journal: of the run.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal
        self._machine = Machine(journal.out)

    @property
    def name(self) -> str:
        """Of the kind of logger."""
        return "mlflow"

    @property
    def version(self) -> str:
        """MLflow's id of the run; empty until it has one."""
        return str(self._journal.state.get("run", ""))

    def add(self, record: Record) -> None:
        """Write a record of any kind down; see `deliver`."""
        self._journal.add(record)

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Log a nested mapping as flat parameters, keys joined by a slash."""
        flat = {key: str(value)[:LONGEST] for key, value in _flat(params)}
        self.add({"params": flat})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers of a step; what a run did a second time after a resume is left out."""
        at = step or 0
        new = {
            name: float(value)
            for name, value in metrics.items()
            if step is None or at > self._journal.last.get(name, -1)
        }
        if new:
            self.add({"metrics": new, "step": at, "time": int(time.time() * 1000)})

    def measure(self) -> Record:
        """A record of how busy the machine is."""
        found = self._machine()
        at = 1 + max(self._journal.last.get(name, -1) for name in found)
        return {"metrics": found, "step": at, "time": int(time.time() * 1000)}


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value


@contextmanager
def track(
    command: str, config: RunConfig, out: Path, *, seed: int, index_hash: str, parent: str | None = None
) -> Iterator[Tracker]:
    """Open an MLflow run of experiment `medim-<command>`, or take up that of `out`, and close it by how it ended.

    Nothing of the data goes in but the index's hash. A server that goes away meanwhile is told once, and its records
    are sent when it is back; those of a server that stays away are kept in `out`.

    Args:
        command: pretrain or finetune.
        config: logged as parameters, flattened.
        out: the run's folder.
        seed: of the run.
        index_hash: which data.
        parent: run of a study that this one is a part of; it is then logged to the study's experiment.
    """
    tags = {MLFLOW_PARENT_RUN_ID: parent} if parent else {}
    parameters = {**config.model_dump(mode="json"), "seed": seed, "config_hash": config.hash, "index_hash": index_hash}
    run = {"experiment": STUDIES if parent else f"medim-{command}", "name": f"{config.name}-{config.hash}"}
    patience = LEAVE_SECONDS if parent else PATIENCE_SECONDS  # a study sends at its end what its cells could not
    with _open(Journal(out), run, tags, parameters, patience) as tracker:
        yield tracker


@contextmanager
def track_study(out: Path, parameters: Mapping[str, Any]) -> Iterator[Tracker]:
    """The same for the run of a study, whose cells are its children: it is there when this returns.

    What its cells could not send goes out at the end. A study that ends by an error leaves at once, for one that was
    stopped may be killed within seconds: the call that finishes it sends what waits in the cells' folders.

    Args:
        out: the study's folder.
        parameters: logged, flattened.

    Raises:
        Exception: of any kind, where a new run could not be made.
    """
    journal = Journal(out)
    known = "run" in journal.state
    run = {"experiment": STUDIES, "name": out.resolve().name}
    with _open(journal, run, {}, parameters, PATIENCE_SECONDS, now=not known) as tracker:
        yield tracker
    for cell in sorted(path.parent for path in out.glob(f"*/**/{RECORDS}")):
        try:
            send_left(cell)
        except Exception:  # as in `Courier`
            with closing(Journal(cell)) as kept:
                _told(len(kept.waiting()), cell)


@contextmanager
def _open(
    journal: Journal,
    run: Mapping[str, str],
    tags: Mapping[str, str],
    parameters: Mapping[str, Any],
    patience: float,
    *,
    now: bool = False,
) -> Iterator[Tracker]:
    """Open a run, or take up the journal's, send what is added from a thread, and close it by how it ended."""
    _be_brief()
    tracker = Tracker(journal)
    tracker.add({"run": {**run, "tags": {"medim.version": __version__, **_commit(), **tags}}})
    tracker.log_hyperparams(parameters)
    if now:
        deliver(journal, journal.waiting())
    courier = Courier(journal, deliver, measure=tracker.measure)
    courier.start()
    try:
        yield tracker
    except BaseException as error:
        killed = current().asked or saved_and_left(error)
        tracker.add({"end": "KILLED" if killed else "FAILED"})
        _told(courier.finish(LEAVE_SECONDS), journal.out)
        raise
    tracker.add({"end": "FINISHED"})
    _told(courier.finish(patience), journal.out)


def _told(left: int, out: Path) -> None:
    if left:
        log.warning(
            "tracking: %d records did not reach the server and are kept in %s. `--resume` sends them first; for a run "
            "that has ended: python -m medim.training.tracking.tracking %s",
            *(left, out, out),
        )


@functools.cache
def _commit() -> dict[str, str]:
    """The commit that medim runs from, where it is a clone."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return {}
    git = ["git", "-C", str(root)]
    try:
        found = [
            subprocess.run([*git, *asked], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for asked in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return {}
    return {MLFLOW_GIT_COMMIT: found[0], "medim.git.changed": str(bool(found[1])).lower()}


def tag(logger: Any, name: str, value: str) -> None:
    """Set a tag of a run that is going on; nothing where the logger is not a run's."""
    if isinstance(logger, Tracker):
        logger.add({"tags": {name: value}})


def log_results(tracker: Tracker, metrics: dict[str, Any], files: Sequence[Path]) -> None:
    """Log final numbers and files of a run's folder; those of its folder `figures` go into one of that name."""
    numbers = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    tracker.log_metrics(numbers)
    for file in files:
        to = file.parent.name if file.parent.name == "figures" else ""
        tracker.add({"artifact": f"{to}/{file.name}".lstrip("/"), "to": to})


def log_encoder(tracker: Tracker, name: str) -> None:
    """Register the encoder of a pretraining run, where the target is a server: a local file serves nobody.

    Args:
        tracker: of the run.
        name: of the configuration; the model is `medim-<name>`.
    """
    if urlsplit(tracking_uri()).scheme in {"http", "https"}:
        tracker.add({"model": f"medim-{name}"})


def send_left(out: Path) -> int:
    """Send what a run could not.

    Args:
        out: the run's folder.

    Returns:
        How many records were sent.
    """
    sent = 0
    with closing(Journal(out)) as journal:
        while records := journal.waiting(200):
            deliver(journal, records)
            sent += len(records)
    return sent


def _be_brief() -> None:
    """Let MLflow try a request once and for seconds, unless the user has set it otherwise."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def main(folders: Sequence[str]) -> int:
    """Send what runs could not, and say of each what became of it; the exit code."""
    _be_brief()
    failed = not folders
    for folder in folders or ["python -m medim.training.tracking.tracking RUN ..."]:
        if not (Path(folder) / RECORDS).is_file():
            print(f"{folder}: expected a run's folder with {RECORDS}; nothing waits here.")
            continue
        try:
            print(f"{folder}: {send_left(Path(folder))} records sent")
        except Exception as error:  # as in `Courier`
            failed = True
            print(f"{folder}: the server does not take records ({error}); they are kept.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
