"""A running node with its processes, for tests and for benchmarks/node.py."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from medim.node.spool import Spool
from tests.node.senders import free_port

REPOSITORY = Path(__file__).resolve().parents[2]


class Node:
    """A running node.

    Attributes:
        port: port of the receiver.
        metrics: port of the metrics.
        spool: folder of the node.
        log: file of standard error.
    """

    def __init__(self, package: Path, folder: Path, *options: object) -> None:
        self.port, self.metrics = free_port(), free_port()  # another --listen has priority
        self.spool, self.log = Spool(folder / "spool"), folder / "node.log"
        words = ["serve", package, "--spool", self.spool.root, "--listen", f"127.0.0.1:{self.port}"]
        words += ["--metrics", f"127.0.0.1:{self.metrics}", "--quiet-time", 1.5, "--min-free", 0, *options]
        self._command = [sys.executable, "-m", "medim.cli", *map(str, words)]
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self._command, stderr=log, stdout=log, cwd=REPOSITORY)
        try:
            wait_for(lambda: b"receiver-started" in self.log.read_bytes(), 120)
        except AssertionError:
            self.process.kill()
            raise

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)

    def states(self) -> dict[str, int]:
        with sqlite3.connect(self.spool.journal, timeout=30) as database:
            return dict(database.execute("SELECT state || ' ' || reason, COUNT(*) FROM series GROUP BY 1").fetchall())

    def find_process(self, role: str) -> int | None:
        """The process ID of a role, by the command line of the children of the supervisor."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and role.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                    return int(folder.name)
            except (OSError, ValueError, IndexError):
                continue
        return None


@contextmanager
def node(package: Path, folder: Path, *options: object) -> Iterator[Node]:
    running = Node(package, folder, *options)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            assert running.stop() == 0


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.1)


def read_crop(data: Path) -> list[Dataset]:
    """A small volume with the geometry of a real scanner; its headers have ImagesInAcquisition."""
    return [pydicom.dcmread(path) for path in sorted((data / "mri-dicom" / "Study1" / "13_HCropVolume").glob("*.dcm"))]
