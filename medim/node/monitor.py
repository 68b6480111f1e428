"""Counts of a node, its health, and an HTTP server of both for Prometheus and load balancers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol

from medim.node.journal import Journal
from medim.node.settings import NodeSettings
from medim.node.spool import Spool


class ProcessState(Protocol):
    """Interface of `supervisor.ChildProcess`."""

    role: str

    @property
    def pid(self) -> int | None:
        """Process ID; None if the process is not running."""
        ...


def count_states(journal: Journal) -> dict[str, int]:
    """Count the series by state, and by reason where there is one."""
    rows = journal.query(
        "SELECT state, reason, COUNT(*) AS n FROM series GROUP BY state, reason ORDER BY state, reason"
    )
    return {f"{row['state']} {row['reason']}".strip(): int(row["n"]) for row in rows}


def count_deliveries(journal: Journal) -> dict[tuple[str, str], int]:
    """Count the deliveries by destination and state."""
    rows = journal.query(
        "SELECT destination, state, COUNT(*) AS n FROM delivery GROUP BY destination, state ORDER BY 1, 2"
    )
    return {(str(row["destination"]), str(row["state"])): int(row["n"]) for row in rows}


def read_counters(journal: Journal) -> dict[str, int]:
    """Read the counters of received, duplicate, conflicting and refused objects and of rejected associations."""
    return {str(row["name"]): int(row["n"]) for row in journal.query("SELECT name, n FROM counter ORDER BY name")}


def format_metrics(settings: NodeSettings, spool: Spool, journal: Journal, processes: Sequence[ProcessState]) -> str:
    """Format all counts in the text format of Prometheus."""
    rows = journal.query("SELECT MIN(first_at) AS at FROM series WHERE state IN ('receiving', 'ready', 'predicting')")
    oldest = time.time() - rows[0]["at"] if rows and rows[0]["at"] is not None else 0.0
    counters = [(f'{{name="{name}"}}', n) for name, n in read_counters(journal).items()]
    series = [
        (f'{{state="{state.split()[0]}",reason="{state.partition(" ")[2]}"}}', n)
        for state, n in count_states(journal).items()
    ]
    deliveries = [
        (f'{{destination="{destination}",state="{state}"}}', n)
        for (destination, state), n in count_deliveries(journal).items()
    ]
    up = [(f'{{process="{process.role}"}}', int(process.pid is not None)) for process in processes]
    families: list[tuple[str, str, str, Sequence[tuple[str, float]]]] = [
        ("medim_node_objects_total", "counter", "Objects and associations by result.", counters),
        ("medim_node_series", "gauge", "Series by state and reason.", series),
        ("medim_node_deliveries", "gauge", "Objects by destination and state.", deliveries),
        ("medim_node_process_up", "gauge", "Whether a process is running.", up),
        ("medim_node_queue_age_seconds", "gauge", "Age of the oldest series in work.", [("", round(oldest, 1))]),
        ("medim_node_disk_free_bytes", "gauge", "Free space of the spool.", [("", spool.free_bytes())]),
        ("medim_node_disk_min_free_bytes", "gauge", "Low mark of the spool.", [("", settings.min_free_bytes)]),
    ]
    lines = []
    for name, kind, description, samples in families:
        lines += [f"# HELP {name} {description}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def find_problems(settings: NodeSettings, spool: Spool, processes: Sequence[ProcessState]) -> list[str]:
    """List the reasons why the node does not work."""
    problems = [f"{process.role} is not running" for process in processes if process.pid is None]
    if spool.free_bytes() < settings.min_free_bytes:
        problems.append("the disk is full")
    return problems


def serve_metrics(
    settings: NodeSettings, spool: Spool, journal: Journal, processes: Sequence[ProcessState]
) -> Callable[[], None]:
    """Serve `/metrics` and `/health` in a thread; return a function that stops the server.

    Raises:
        OSError: the address is in use.
    """
    assert settings.metrics is not None

    class Handler(BaseHTTPRequestHandler):
        """Handler of GET requests for two paths."""

        timeout = 5.0
        server_version, sys_version = "medim", ""

        def do_GET(self) -> None:
            """Respond to a request."""
            if self.path == "/metrics":
                self._respond(200, "text/plain; version=0.0.4", format_metrics(settings, spool, journal, processes))
            elif self.path == "/health":
                problems = find_problems(settings, spool, processes)
                self._respond(503 if problems else 200, "application/json", json.dumps({"problems": problems}) + "\n")
            else:
                self._respond(404, "text/plain", "expected /metrics or /health\n")

        def log_message(self, format: str, *args: object) -> None:
            """Write no log, which would quote the request."""

        def _respond(self, status: int, content_type: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer((settings.metrics.host, settings.metrics.port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def stop_server() -> None:
        server.shutdown()
        server.server_close()

    return stop_server
