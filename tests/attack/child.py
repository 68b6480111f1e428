"""Run cases in child processes that are copies of this process, so that each takes a fraction of a second."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import medim
from tests.attack.case import Case, Finding, Outcome

_CRASH_CODE = 99  # of a case that raised an error


def import_medim() -> None:
    """Import all modules, which the children then share, and limit torch to one thread.

    The children are forks: a fork of a process with a thread pool waits forever in its first parallel operation.
    """
    for module in pkgutil.walk_packages(medim.__path__, "medim."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    torch.set_num_threads(1)


@dataclass
class _Child:
    case: Case
    folder: Path
    pid: int
    start: float


def run_cases(cases: Sequence[Case], work: Path, jobs: int) -> Iterator[tuple[Case, Outcome, Finding | None]]:
    """Run cases, several at a time.

    Args:
        cases: the cases.
        work: folder of the cases; each has a folder that is removed afterwards.
        jobs: number of cases at a time.

    Yields:
        Each case with its end and its fault.
    """
    waiting, running = list(enumerate(cases)), list[_Child]()
    while waiting or running:
        while waiting and len(running) < jobs:
            number, case = waiting.pop(0)
            running.append(_start_child(case, work / str(number)))
        time.sleep(0.002)
        for child in list(running):
            outcome = _poll_child(child)
            if outcome is not None:
                running.remove(child)
                yield child.case, outcome, child.case.find_fault(child.folder / "case", outcome)
                shutil.rmtree(child.folder, onerror=_make_writable)


def _start_child(case: Case, folder: Path) -> _Child:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "case").mkdir(parents=True)
    case.prepare(folder / "case")
    sys.stdout.flush()
    start, pid = time.monotonic(), os.fork()
    if pid:
        return _Child(case, folder, pid, start)
    code = _CRASH_CODE
    try:
        os.setsid()
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout, sys.stderr = (open(number, "w", errors="replace", closefd=False) for number in (1, 2))  # noqa: SIM115
        os.chdir(folder / "case")
        code = case.act()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _poll_child(child: _Child) -> Outcome | None:
    """Read the end of a child, after its time by a signal; None while it runs."""
    pid, status, usage = os.wait4(child.pid, os.WNOHANG)
    seconds = time.monotonic() - child.start
    is_late = not pid and seconds > child.case.max_seconds
    if not pid and not is_late:
        return None
    with suppress(ProcessLookupError):  # also processes that it left behind
        os.killpg(child.pid, signal.SIGKILL)
    if is_late:
        usage = os.wait4(child.pid, 0)[2]
    output = (child.folder / "output").read_text(errors="replace") if (child.folder / "output").exists() else ""
    exit_code = None if is_late else os.waitstatus_to_exitcode(status)
    return Outcome(exit_code, output, seconds, usage.ru_maxrss * 1024)


def _make_writable(_: object, name: str, __: object) -> None:
    """Remove a path in a folder without permissions."""
    path = Path(name)
    path.parent.chmod(0o700)
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o700)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
