"""Run the cells of a study in this process, or in several persistent worker processes.

A worker imports all modules once and keeps the index and the store of the images open, so the cost of a cell is mainly
that of its training. If the process of a cell crashes, the cell is retried once, without other cells, and then reported
as failed; the study continues. SIGTERM, SIGUSR1 and SIGINT save the running cells, and no further cell is started.
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

from medim.data.parallel import block_interrupts_of_workers, count_cpus
from medim.signals import StoppedError, ignore_interrupts, leave_at_next_interrupt, separate_requests
from medim.study.cell import StudyContext, run_cell
from medim.study.design import Cell
from medim.study.scheduler import Scheduler
from medim.types import UserError

log = logging.getLogger(__name__)
REMIND_SECONDS = 1.0  # between two stop signals to a cell that could not stop yet
SHUTDOWN_SECONDS = 30.0


class CellOutcome(NamedTuple):
    """Outcome of a cell: done, stopped (saved), failed (permanent cause) or crashed."""

    state: Literal["done", "stopped", "failed", "crashed"]
    message: str = ""


def run_all(scheduler: Scheduler) -> None:
    """Run all cells that can be started."""
    if scheduler.jobs == 1:
        with handle_stop_signals(lambda: setattr(scheduler, "stopped", True)):
            crashes: set[Cell] = set()
            while task := scheduler.next_cell():
                _record_outcome(scheduler, task[0], try_cell(scheduler.context, *task), crashes)
    else:
        _run_in_processes(scheduler)


def try_cell(context: StudyContext, cell: Cell, lr_multiplier: float) -> CellOutcome:
    """Run a cell, and return its outcome instead of raising exceptions."""
    try:
        run_cell(context, cell, lr_multiplier)
    except StoppedError:
        return CellOutcome("stopped")
    except UserError as error:
        return CellOutcome("failed", str(error))
    except Exception as error:  # the other cells continue
        log.debug("%s", cell, exc_info=error)
        return CellOutcome("crashed", f"{type(error).__name__}: {error}")
    return CellOutcome("done")


@contextmanager
def handle_stop_signals(on_stop: Callable[[], None]) -> Iterator[None]:
    """Handle SIGTERM, SIGUSR1 and SIGINT as a stop request, repeated until the running training has ended.

    Training stops between two steps; without repetition, a signal before the first step would be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    n_interrupts = 0

    def request_stop(*_: object) -> None:
        """Stop the study, and start the reminders."""
        on_stop()
        signal.setitimer(signal.ITIMER_REAL, REMIND_SECONDS)

    def send_reminder(number: int, _: object) -> None:
        """Send SIGTERM to this process, which the training handles."""
        nonlocal n_interrupts
        if number == signal.SIGINT:
            n_interrupts += 1
            leave_at_next_interrupt(is_second=n_interrupts > 1)
        os.kill(os.getpid(), signal.SIGTERM)

    handlers: dict[int, Callable[[int, Any], None]] = {
        signal.SIGTERM: request_stop,
        **dict.fromkeys((signal.SIGINT, signal.SIGUSR1, signal.SIGALRM), send_reminder),
    }
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with separate_requests():  # so that a training inside handles signals itself, and stops
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
                worker.process.terminate()  # SIGTERM: the worker saves its cell

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
            worker.pipe.close()  # the worker exits when its pipe is closed
        for worker in workers:
            worker.process.join(SHUTDOWN_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()


def _assign(scheduler: Scheduler, workers: list[_Worker]) -> list[_Worker]:
    """Assign cells to idle workers, start missing workers, and list the busy ones."""
    workers[:] = [worker for worker in workers if worker.cell or worker.process.is_alive()]
    while (idle := next((w for w in workers if not w.cell), None)) or len(workers) < scheduler.jobs:
        task = scheduler.next_cell()
        if task is None:
            break
        if idle is None:
            idle = _start_worker(scheduler)
            workers.append(idle)
        idle.cell = task[0]
        with suppress(OSError):  # the worker has died; the read from its pipe will report it
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
    with block_interrupts_of_workers():
        process.start()
    child_end.close()
    return _Worker(process, parent_end)


def serve_cells(context: StudyContext, threads: int, pipe: Any) -> None:
    """Run cells received from a pipe until it is closed."""
    torch.set_num_threads(threads)
    with handle_stop_signals(lambda: None):
        ignore_interrupts()  # the study forwards them
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
            except OSError:  # the study process has ended
                return


def stop_with_parent() -> None:
    """Send SIGTERM to this process when its parent process has ended, even if the parent was killed."""
    parent = multiprocessing.parent_process()

    def wait_for_parent() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_parent, daemon=True).start()
