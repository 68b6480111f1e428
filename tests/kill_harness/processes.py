"""Start commands in processes of their own that are forked from one that has imported medim, and signal them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_WAIT = 120.0  # seconds for any condition
IMPORTS = (
    *("data.source", "evaluation.evaluate", "evaluation.probing.probe", "export.export", "predict.embed"),
    *("predict.predict", "reports.page", "study.run", "training.finetune.run", "training.pretrain.run"),
    *("tracking.delivery", "data.example.cohort"),
)
FORK_SERVER = """
import contextlib, importlib, json, os, resource, signal, sys, traceback
sys.path.insert(0, sys.argv[1])
for name in json.loads(sys.argv[2]):
    importlib.import_module(f"medim.{name}")
import torch
import medim.__main__, medim.cli
exec(sys.argv[3])
print("ready", flush=True)
for line in sys.stdin:
    call = json.loads(line)
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)
        continue
    os.setsid()
    os.chdir(call["folder"])
    os.environ.update(call["environment"])
    sys.argv = ["medim", *call["words"]]
    file = os.open(call["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    reply = os.dup(1)
    for number in (1, 2):
        os.dup2(file, number)
    medim.__main__.handle_early_signals()
    os.write(reply, f"{os.getpid()}\\n".encode())
    os.close(reply)
    os.close(file)
    base = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for name, limit in call["limits"].items():
        kind = getattr(resource, name)
        limit += {"RLIMIT_AS": base, "RLIMIT_NOFILE": len(os.listdir("/proc/self/fd")) - 1}.get(name, 0)
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    try:
        medim.cli.app(sys.argv[1:], prog_name="medim")
        code = 99
    except SystemExit as end:
        medim.__main__.ignore_late_signals()
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        code = 99
        with contextlib.suppress(OSError):
            traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # exit handlers of libraries would wait for threads of the server
"""


@dataclass(frozen=True)
class Run:
    """End of a command.

    Attributes:
        exit_code: exit code; minus the number of the signal that ended it.
        text: output and error output.
        seconds: duration.
        delay: seconds from the last signal to the end; 0 without a signal.
        orphans: number of processes that were left after `MAX_WAIT`.
    """

    exit_code: int
    text: str
    seconds: float
    delay: float = 0.0
    orphans: int = 0


class ForkServer:
    """Process that has imported medim and starts commands, one at a time.

    Args:
        folder: working folder of the commands.
        environment: environment variables of the commands, besides those of this process.
        prefix: words before the Python interpreter, such as `unshare`.
        setup: Python code to run in the server.
    """

    def __init__(
        self, folder: Path, environment: Mapping[str, str], *, prefix: Sequence[str] = (), setup: str = ""
    ) -> None:
        self.folder, self._environment, self._prefix, self._setup = folder, dict(environment), prefix, setup
        command = [sys.executable, "-c", FORK_SERVER, str(Path(__file__).parents[2]), json.dumps(IMPORTS), setup]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        settings = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([*prefix, *command], text=True, env=settings, **pipes)  # type: ignore[call-overload]
        self._log = folder / f"log-{self._process.pid}.txt"
        self._start, self._command = 0.0, 0
        if self._read_line() != "ready":
            raise RuntimeError("the process that starts commands did not start")

    def copy(self) -> ForkServer:
        """Start another server with the same settings."""
        return ForkServer(self.folder, self._environment, prefix=self._prefix, setup=self._setup)

    def run(
        self,
        words: Sequence[str],
        disturb: Callable[[int], float] | None = None,
        *,
        folder: Path | None = None,
        limits: Mapping[str, int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Run:
        """Run a command to its end.

        Args:
            words: the command line.
            disturb: function of the process id that sends signals; returns the time of the last one.
            folder: working folder; None for that of the server.
            limits: soft limits by their names in `resource`; of memory and files, the numbers to add.
            environment: further environment variables.
        """
        process = self.start(words, folder=folder, limits=limits, environment=environment)
        return self.wait(disturb(process) if disturb else None)

    def start(
        self,
        words: Sequence[str],
        *,
        folder: Path | None = None,
        limits: Mapping[str, int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Start a command, see `run`; returns its process id."""
        self._log.unlink(missing_ok=True)
        call = {"words": list(words), "folder": str(folder or self.folder), "log": str(self._log)}
        call |= {"limits": dict(limits or {}), "environment": {**self._environment, **(environment or {})}}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        self._start, self._command = time.monotonic(), int(self._read_line())
        return self._command

    def wait(self, last_signal: float | None = None) -> Run:
        """Wait for the end of the command and of its processes.

        Args:
            last_signal: time of the last signal; None if there was none.
        """
        exit_code = int(self._read_line())
        end = time.monotonic()
        orphans = wait_for_session(self._command)
        delay = 0.0 if last_signal is None else end - last_signal
        return Run(exit_code, self._log.read_text(errors="replace"), end - self._start, delay, orphans)

    def locate(self, path: Path) -> Path:
        """Return the path under which this process sees a file of the server, which may have mounts of its own."""
        return Path(f"/proc/{self._process.pid}/root") / path.relative_to("/")

    @property
    def process_id(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def close(self) -> None:
        """End the server."""
        self._process.communicate("")

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def send_after(seconds: float, *numbers: int, group: bool = False) -> Callable[[int], float]:
    """Return a function of a process id that sends signals after a time, to the process or to its group."""

    def disturb(process: int) -> float:
        time.sleep(seconds)
        for position, number in enumerate(numbers):
            time.sleep(0.05 if position else 0)
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(process, number)
        return time.monotonic()

    return disturb


def wait_for_session(session: int) -> int:
    """Wait until all processes of a session have ended; kill the others, and return their number."""
    deadline = time.monotonic() + MAX_WAIT
    while processes := _list_session(session):
        if time.monotonic() > deadline:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return len(processes)
        time.sleep(0.02)
    return 0


def _list_session(session: int) -> list[int]:
    """List the processes of a session that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found
