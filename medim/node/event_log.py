"""Log of a node: one line of JSON per event on standard error, without identities."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime

log = logging.getLogger("medim.node.events")


class EventFormatter(logging.Formatter):
    """Formatter of log records as JSON.

    Records of medim's other modules and of libraries contain the name of the logger and of an exception only, because
    their messages may quote header values.

    Args:
        role: name of the process.
    """

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        event = getattr(record, "event", None)
        content: dict[str, object] = {"at": at, "process": self._role}
        if event is not None:
            content |= event
        else:
            content |= {"event": "log", "logger": record.name, "level": record.levelname.lower()}
            if record.exc_info and record.exc_info[0]:
                content["exception"] = record.exc_info[0].__name__
        return json.dumps(content)


def configure_event_log(role: str) -> None:
    """Write events to standard error, and silence libraries that quote values of headers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EventFormatter(role))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("medim.node").setLevel(logging.INFO)
    for name in ("pynetdicom", "pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.simplefilter("ignore")
    logging.Formatter.converter = time.gmtime


def log_event(what: str, key: str = "", detail: Mapping[str, object] | None = None) -> None:
    """Write an event to the log."""
    event = {"event": what, **({"key": key} if key else {}), **(detail or {})}
    log.info("%s", what, extra={"event": event})


def log_failure(what: str, error: BaseException) -> None:
    """Write the kind of an unexpected error to the log, with the place in the code and without its message."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}" if trace else ""
    log_event(what, detail={"exception": type(error).__name__, "place": place})
