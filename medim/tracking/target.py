"""Target of the tracking: the MLflow server or database, and the switch that turns tracking off."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from medim.output_folder import acquire_lock
from medim.tracking.outbox import STATE, format_server_error
from medim.types import UsageError, UserError

log = logging.getLogger(__name__)
SWITCH = "MEDIM_TRACKING"  # environment variable: off for no tracking
ANSWER_SECONDS = 10  # longest time for a tracking server to accept a connection
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; the outbox retries
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
}


def is_tracking_enabled() -> bool:
    """Whether runs are tracked: unless `MEDIM_TRACKING` is `off`.

    Raises:
        UsageError: the variable has another value than on or off.
    """
    value = os.environ.get(SWITCH, "").strip().lower()
    if value not in {"", "on", "off"}:
        raise UsageError(f"{SWITCH}={value}: expected on or off. Unset it to track runs.")
    return value != "off"


def tracking_uri() -> str:
    """Get `MLFLOW_TRACKING_URI`, or the URI of a SQLite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def check_target(resume_folder: Path | None = None) -> None:
    """Check within seconds whether runs can be tracked, if tracking is on; MLflow itself retries for minutes.

    Args:
        resume_folder: folder of a resumed run. If the run was tracked before, an unreachable server is only logged, and
            its records are sent later.

    Raises:
        UserError: the server does not respond, MLflow does not support the URI, or the working folder is read-only.
    """
    if not is_tracking_enabled():
        return
    from mlflow.tracking import MlflowClient

    forward_logs()
    set_short_timeouts()
    uri = tracking_uri()
    uri_parts = urlsplit(uri)
    check_uri_form(uri)
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
            prepare_database(uri)
            MlflowClient(tracking_uri=uri)
    except UserError:
        raise
    except Exception as error:  # MLflow raises errors of its database libraries
        if resume_folder and (resume_folder / STATE).is_file():
            log.warning(
                "MLFLOW_TRACKING_URI=%s does not respond (%s); the records are kept and sent later",
                *(_format_uri(), format_server_error(error)),
            )
            return
        raise convert_server_error(error) from error


def check_uri_form(uri: str) -> None:
    """Refuse URIs for which MLflow keeps nothing, or fails late.

    Raises:
        UserError: the URI has no scheme, or is that of a database in memory.
    """
    scheme, separator, location = uri.partition("://")
    if uri in {"databricks", "uc"} or uri.startswith(("databricks:", "uc:")):
        remedy = "which is a service outside your site. Give the address of an MLflow server or database"
        raise UserError(f"MLFLOW_TRACKING_URI={uri}: Databricks is not supported, {remedy}.")
    if not (scheme and separator):
        raise UserError(
            f"MLFLOW_TRACKING_URI={_format_uri()}: expected an address such as http://SERVER:5000 or "
            "sqlite:////FOLDER/mlflow.db. Correct it, or unset it to track in a local file."
        )
    if scheme.startswith("sqlite") and location.lstrip("/") in {"", ":memory:"}:
        raise UserError(
            f"MLFLOW_TRACKING_URI={uri}: this database is in memory only, so nothing would be kept. Give a file, as in "
            "sqlite:////FOLDER/mlflow.db."
        )


def convert_server_error(error: Exception) -> UserError:
    """Build the error of a command that cannot reach the server or the database."""
    return UserError(
        f"MLFLOW_TRACKING_URI={_format_uri()}: no MLflow server or database available: {format_server_error(error)}. "
        "Start the server, correct the address, or unset the variable to track in a local file; move a damaged "
        "mlflow.db away."
    )


def _format_uri() -> str:
    """Format the tracking URI without user and password."""
    parts = urlsplit(tracking_uri())
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def prepare_database(uri: str) -> None:
    """Create a missing SQLite file under a temporary name, and move it to its place when it is complete.

    MLflow creates the file table by table, so if two runs start at the same time in a new folder, one of them fails.
    The second run waits. Files of a run that was killed are removed by the next one.

    Args:
        uri: tracking URI; databases of other kinds, and servers, need no preparation.

    Raises:
        Exception: of any kind, if the file cannot be created.
    """
    from mlflow.tracking import MlflowClient

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


def set_short_timeouts() -> None:
    """Limit MLflow to one attempt of a few seconds per request, unless the user has set other values."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)


def forward_logs() -> None:
    """Let MLflow log through the handlers of the program instead of its own, which print tracebacks."""
    logger = logging.getLogger("mlflow")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
