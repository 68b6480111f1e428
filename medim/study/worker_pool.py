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

from medim.data.parallel import count_cpus
from medim.signals import StoppedError
from medim.study.cell import StudyContext, run_cell
from medim.study.design import Cell
from medim.study.scheduler import Scheduler
from medim.types import UserError

log = logging.getLogger(__name__)
REMIND_SECONDS = 1.0  # between two reminders to a cell that was asked to stop before it could
SHUTDOWN_SECONDS = 30.0


class CellOutcome(NamedTuple):
    """What became of a cell: done, stopped (saved), failed by a cause that stays, or crashed."""

    state: Literal["done", "stopped", "failed", "crashed"]
    message: str = ""


def run_all(scheduler: Scheduler) -> None:
    """Do all cells that can be begun."""
    if scheduler.jobs == 1:
        with handle_stop_signals(lambda: setattr(scheduler, "stopped", True)):
            crashes: set[Cell] = set()
            while task := scheduler.next_cell():
                _record_outcome(scheduler, task[0], try_cell(scheduler.context, *task), crashes)
    else:
        _run_in_processes(scheduler)


def try_cell(context: StudyContext, cell: Cell, lr_multiplier: float) -> CellOutcome:
    """Run a cell; whatever it raises is its outcome."""
    try:
        run_cell(context, cell, lr_multiplier)
    except StoppedError:
        return CellOutcome("stopped")
    except UserError as error:
        return CellOutcome("failed", str(error))
    except Exception as error:  # one cell must not end the others
        log.debug("%s", cell, exc_info=error)
        return CellOutcome("crashed", f"{type(error).__name__}: {error}")
    return CellOutcome("done")


@contextmanager
def handle_stop_signals(on_stop: Callable[[], None]) -> Iterator[None]:
    """Take SIGTERM, SIGUSR1 and SIGINT as the wish to stop, and remind until what runs has ended.

    A training stops between two steps; a signal that comes before its first one would be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request_stop(*_: object) -> None:
        on_stop()
        signal.setitimer(signal.ITIMER_REAL, REMIND_SECONDS)

    def send_reminder(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = {
        signal.SIGTERM: request_stop,
        **dict.fromkeys((signal.SIGINT, signal.SIGUSR1, signal.SIGALRM), send_reminder),
    }
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _record_outcome(scheduler: Scheduler, cell: Cell, outcome: CellOutcome, crashes: set[Cell]) -> None:
    if outcome.state == "done":
        scheduler.finish(cell)
    elif outcome.state == "failed":
        scheduler.finish(cell, outcome.message)
    elif outcome.state == "stopped" or scheduler.stopped:
        scheduler.requeue(cell)
    else:
        scheduler.retry_or_fail(cell, outcome.message, retry=cell not in crashes)
        crashes.add(cell)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    cell: Cell | None = None


def _run_in_processes(scheduler: Scheduler) -> None:
    crashes: set[Cell] = set()
    workers: list[_Worker] = []

    def request_stop() -> None:
        scheduler.stopped = True
        for worker in workers:
            if worker.cell:
                worker.process.terminate()  # SIGTERM: it saves

    try:
        with handle_stop_signals(request_stop):
            while busy := _assign(scheduler, workers):
                ready = wait([worker.pipe for worker in busy])
                for worker in (worker for worker in busy if worker.pipe in ready):
                    outcome, cell = _receive_outcome(worker), worker.cell
                    worker.cell = None
                    if cell:
                        _record_outcome(scheduler, cell, outcome, crashes)
    finally:
        for worker in workers:
            worker.pipe.close()  # it leaves when nothing more can come
        for worker in workers:
            worker.process.join(SHUTDOWN_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()


def _assign(scheduler: Scheduler, workers: list[_Worker]) -> list[_Worker]:
    """Give cells to the processes that have none, and start those that are missing; those that are busy then."""
    workers[:] = [worker for worker in workers if worker.cell or worker.process.is_alive()]
    while (idle := next((w for w in workers if not w.cell), None)) or len(workers) < scheduler.jobs:
        task = scheduler.next_cell()
        if task is None:
            break
        if idle is None:
            idle = _start_worker(scheduler)
            workers.append(idle)
        idle.cell = task[0]
        with suppress(OSError):  # it died since; reading from it says so
            idle.pipe.send(task)
    return [worker for worker in workers if worker.cell]


def _receive_outcome(worker: _Worker) -> CellOutcome:
    try:
        outcome: CellOutcome = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        return CellOutcome("crashed", f"its process was killed or crashed (exit code {worker.process.exitcode})")
    return outcome


def _start_worker(scheduler: Scheduler) -> _Worker:
    mp_context = multiprocessing.get_context("spawn")
    parent_end, child_end = mp_context.Pipe()
    threads = max(1, count_cpus() // scheduler.jobs)
    process = mp_context.Process(target=serve_cells, args=(scheduler.context, threads, child_end), daemon=True)
    process.start()
    child_end.close()
    return _Worker(process, parent_end)


def serve_cells(context: StudyContext, threads: int, pipe: Any) -> None:
    """Run cells as they come, until nothing more can come."""
    torch.set_num_threads(threads)
    with handle_stop_signals(lambda: None):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells it to all; the study passes it on
        stop_with_parent()
        while True:
            try:
                task = pipe.recv()
            except (EOFError, OSError):
                return
            outcome = try_cell(context, *task)
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                pipe.send(outcome)
            except OSError:  # nobody is there any more
                return


def stop_with_parent() -> None:
    """Be asked to stop (SIGTERM) when the process that started this one is gone, also where it was killed."""
    parent = multiprocessing.parent_process()

    def wait_for_parent() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_parent, daemon=True).start()
