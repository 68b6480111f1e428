"""Supervisor of a node: starts its processes, and starts each again that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from medim.node.event_log import configure_event_log
from medim.node.journal import Journal
from medim.node.monitor import serve_metrics
from medim.node.processes import list_roles, log_transaction_event
from medim.node.settings import NodeSettings, write_settings
from medim.node.spool import Spool

STOP_SECONDS = 10.0  # until a process is killed
_FIRST_DELAY, _MAX_DELAY, _STABLE_SECONDS = 0.1, 30.0, 60.0  # of restarts
_WATCH_SECONDS = 0.1
_SOURCE_ROOT = Path(__file__).resolve().parents[2]
_PROCESS_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from medim.node.processes import run_process; run_process(sys.argv[2], sys.argv[3])"
)


class ChildProcess:
    """One process of the node, which is started again with a growing delay.

    Args:
        role: name of the process.
        spool: folder of the node.
    """

    def __init__(self, role: str, spool: Spool) -> None:
        self.role = role
        self._spool = spool
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = self._next_start = 0.0
        self._delay = _FIRST_DELAY

    @property
    def pid(self) -> int | None:
        """Process ID; None if the process is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def check_running(self) -> int | None:
        """Start the process if it is due; return the exit code of a process that has just ended."""
        if self.pid is not None:
            if time.monotonic() - self._started_at > _STABLE_SECONDS:
                self._delay = _FIRST_DELAY
            return None
        exit_code = None
        if self._process is not None:
            exit_code = self._process.returncode
            self._kill_group()  # the decoder of a worker
            self._process = None
            self._next_start = time.monotonic() + self._delay
            self._delay = min(2 * self._delay, _MAX_DELAY)
        if time.monotonic() >= self._next_start:
            self._start()
        return exit_code

    def request_stop(self) -> None:
        """Send SIGTERM."""
        if self._process is not None and self.pid is not None:
            self._process.terminate()

    def stop(self, deadline: float) -> None:
        """Wait for the end of the process, and kill it after the deadline in monotonic seconds."""
        if self._process is None:
            return
        try:
            self._process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._kill_group()

    def _start(self) -> None:
        command = [sys.executable, "-P", "-c", _PROCESS_CODE, str(_SOURCE_ROOT), self.role, str(self._spool.root)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._started_at = time.monotonic()

    def _kill_group(self) -> None:
        """Kill the remaining processes of a process that has ended."""
        assert self._process is not None
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


class Supervisor:
    """All processes of a node.

    Args:
        settings: settings of the node.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._spool = Spool(settings.spool)
        self._is_stopped = threading.Event()

    def run(self) -> None:
        """Run the node until SIGTERM or SIGINT; both are the regular end of a service.

        Raises:
            UserError: the spool cannot be used, or another node uses it.
        """
        self._spool.create()
        previous: list[tuple[int, Any]] = []
        with self._spool.lock("node"), ExitStack() as stack:
            configure_event_log("supervisor")
            for stop_signal in (signal.SIGTERM, signal.SIGINT):
                previous.append((stop_signal, signal.signal(stop_signal, lambda *_: self._is_stopped.set())))
            write_settings(self._settings)
            journal = Journal(self._spool.journal, log_transaction_event)
            stack.callback(journal.close)
            children = [ChildProcess(role, self._spool) for role in list_roles(self._settings)]
            if self._settings.metrics is not None:
                stack.callback(serve_metrics(self._settings, self._spool, journal, children))
            journal.record_event("node-started", package=self._settings.package_sha256)
            try:
                self._watch(children, journal)
            finally:
                self._stop(children, journal)
                for number, handler in previous:
                    signal.signal(number, handler)

    def _watch(self, children: list[ChildProcess], journal: Journal) -> None:
        while not self._is_stopped.is_set():
            for child in children:
                exit_code = child.check_running()
                if exit_code is not None:
                    journal.record_event("process-ended", role=child.role, exit_code=exit_code)
            self._is_stopped.wait(_WATCH_SECONDS)

    def _stop(self, children: list[ChildProcess], journal: Journal) -> None:
        """Stop all processes, and make the interrupted predictions ready without counting an attempt."""
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            child.request_stop()
        for child in children:
            child.stop(deadline)
        for child in children:
            for series in journal.list_claims(child.role):
                journal.end_claim(child.role, series.key, "ready")
        journal.record_event("node-stopped")
