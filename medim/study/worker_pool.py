"""Do the cells of a study: in this process, or in several that stay warm from cell to cell.

A warm process has imported everything once and holds the images' index and store, so a cell costs its training and
little else. A cell that brings its process down is tried once more, alone, and then reported; the study goes on.
SIGTERM, SIGUSR1 and SIGINT save the cells that run and begin no other.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NamedTuple

import torch

from medim.data.parallel import available
from medim.signals import StoppedError
from medim.study.cell import Bench, run_cell
from medim.study.design import Cell
from medim.study.scheduler import Agenda
from medim.types import UserError

log = logging.getLogger(__name__)
REMIND_SECONDS = 1.0  # between two reminders to a cell that was asked to stop before it could
LEAVE_SECONDS = 30.0


class Outcome(NamedTuple):
    """What became of a cell: done, stopped (saved), failed by a cause that stays, or crashed."""

    state: Literal["done", "stopped", "failed", "crashed"]
    message: str = ""


def work(agenda: Agenda) -> None:
    """Do all cells that can be begun."""
    if agenda.jobs == 1:
        with stopping(lambda: setattr(agenda, "stopped", True)):
            crashed: set[Cell] = set()
            while task := agenda.take():
                _settle(agenda, task[0], attempt(agenda.bench, *task), crashed)
    else:
        _in_processes(agenda)


def attempt(bench: Bench, cell: Cell, multiple: float) -> Outcome:
    """Run a cell; whatever it raises is its outcome."""
    try:
        run_cell(bench, cell, multiple)
    except StoppedError:
        return Outcome("stopped")
    except UserError as error:
        return Outcome("failed", str(error))
    except Exception as error:  # one cell must not end the others
        log.debug("%s", cell, exc_info=error)
        return Outcome("crashed", f"{type(error).__name__}: {error}")
    return Outcome("done")


@contextmanager
def stopping(heard: Callable[[], None]) -> Iterator[None]:
    """Take SIGTERM, SIGUSR1 and SIGINT as the wish to stop, and remind until what runs has ended.

    A training stops between two steps; a signal that comes before its first one would be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        heard()
        signal.setitimer(signal.ITIMER_REAL, REMIND_SECONDS)

    def remind(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = {signal.SIGTERM: stop, **dict.fromkeys((signal.SIGINT, signal.SIGUSR1, signal.SIGALRM), remind)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _settle(agenda: Agenda, cell: Cell, outcome: Outcome, crashed: set[Cell]) -> None:
    if outcome.state == "done":
        agenda.over(cell)
    elif outcome.state == "failed":
        agenda.over(cell, outcome.message)
    elif outcome.state == "stopped" or agenda.stopped:
        agenda.put_back(cell)
    else:
        agenda.died(cell, outcome.message, again=cell not in crashed)
        crashed.add(cell)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    cell: Cell | None = None


def _in_processes(agenda: Agenda) -> None:
    crashed: set[Cell] = set()
    workers: list[_Worker] = []

    def stop() -> None:
        agenda.stopped = True
        for worker in workers:
            if worker.cell:
                worker.process.terminate()  # SIGTERM: it saves

    try:
        with stopping(stop):
            while busy := _give(agenda, workers):
                ready = wait([worker.pipe for worker in busy])
                for worker in (worker for worker in busy if worker.pipe in ready):
                    outcome, cell = _answer(worker), worker.cell
                    worker.cell = None
                    if cell:
                        _settle(agenda, cell, outcome, crashed)
    finally:
        for worker in workers:
            worker.pipe.close()  # it leaves when nothing more can come
        for worker in workers:
            worker.process.join(LEAVE_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()


def _give(agenda: Agenda, workers: list[_Worker]) -> list[_Worker]:
    """Give cells to the processes that have none, and start those that are missing; those that are busy then."""
    workers[:] = [worker for worker in workers if worker.cell or worker.process.is_alive()]
    while (free := next((w for w in workers if not w.cell), None)) or len(workers) < agenda.jobs:
        task = agenda.take()
        if task is None:
            break
        if free is None:
            free = _start(agenda)
            workers.append(free)
        free.cell = task[0]
        with suppress(OSError):  # it died since; reading from it says so
            free.pipe.send(task)
    return [worker for worker in workers if worker.cell]


def _answer(worker: _Worker) -> Outcome:
    try:
        outcome: Outcome = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        return Outcome("crashed", f"its process was killed or crashed (exit code {worker.process.exitcode})")
    return outcome


def _start(agenda: Agenda) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    threads = max(1, available() // agenda.jobs)
    process = context.Process(target=serve, args=(agenda.bench, threads, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def serve(bench: Bench, threads: int, pipe: Any) -> None:
    """Run cells as they come, until nothing more can come."""
    torch.set_num_threads(threads)
    with stopping(lambda: None):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells it to all; the study passes it on
        stop_with_parent()
        while True:
            try:
                task = pipe.recv()
            except (EOFError, OSError):
                return
            outcome = attempt(bench, *task)
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                pipe.send(outcome)
            except OSError:  # nobody is there any more
                return


def stop_with_parent() -> None:
    """Be asked to stop (SIGTERM) when the process that started this one is gone, also where it was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
