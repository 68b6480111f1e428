"""Process pool in which a file that crashes its worker process costs only that file."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeVar

from medim.signals import block_interrupts, ignore_interrupts

Item = TypeVar("Item")
Result = TypeVar("Result")


def count_cpus() -> int:
    """Count the processors available to this process."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def prepare_pool_worker() -> None:
    """End this worker with the main process, and ignore Ctrl-C, which a terminal sends to all processes."""
    ignore_interrupts()
    exit_with_parent()


@contextmanager
def block_interrupts_of_workers() -> Iterator[None]:
    """Block Ctrl-C for processes of `multiprocessing` that are started inside the block, see `block_interrupts`."""
    resource_tracker.ensure_running()  # its start inside the block would end the block
    with block_interrupts():
        yield


def exit_with_parent() -> None:
    """Start a thread that ends this worker when the main process ends, even by a kill before this call."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_parent() -> None:
        """Wait for the end of the main process."""
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


@contextmanager
def open_process_pool(jobs: int, prepare: Callable[[], None] = prepare_pool_worker) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of new processes, which are killed on an error or a signal.

    Submit inside `block_interrupts_of_workers`.

    Args:
        jobs: number of processes.
        prepare: function that each process calls first; it calls `prepare_pool_worker`.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare) as pool:
        try:
            yield pool
        except BaseException:
            _kill_workers(pool)  # the pool would wait for the work in progress
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _kill_workers(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool, as `kill_workers` of Python 3.14 does."""
    for process in list((pool._processes or {}).values()):
        process.kill()


def map_in_processes(
    work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], jobs: int, *, max_batch: int = 32
) -> Iterator[tuple[Item, Result | None]]:
    """Process batches of items in a pool. After a crash, the remaining items are retried one by one.

    A script that calls this needs the usual `if __name__ == "__main__":`.

    Args:
        work: function of a batch that returns one result per item. It is pickled, like the items.
        items: all items.
        jobs: number of processes.
        max_batch: largest batch size.

    Yields:
        Each item with its result, in order of completion; None for an item that crashed its process.
    """
    batch_size = max(1, min(max_batch, len(items) // (4 * jobs)))
    batches: list[Sequence[Item]] = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    while batches:
        crash_numbers: list[int] = []
        with open_process_pool(jobs) as pool:
            with block_interrupts_of_workers():
                numbers = {pool.submit(work, batch): number for number, batch in enumerate(batches)}
            for future in as_completed(list(numbers)):
                number = numbers.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    crash_numbers.append(number)
                else:
                    yield from zip(batches[number], future.result(), strict=True)
        single_items: list[Sequence[Item]] = [[item] for number in sorted(crash_numbers) for item in batches[number]]
        if single_items and jobs == 1 and len(crash_numbers) == len(single_items):
            yield single_items.pop(0)[0], None
        batches, jobs = single_items, 1
