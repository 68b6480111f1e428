"""Work spread over processes, where one bad file may bring its process down and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def available() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def in_processes(
    work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], jobs: int, *, most: int = 32
) -> Iterator[tuple[Item, Result | None]]:
    """Do batches of items in a pool; when a process dies, the rest goes one by one and shows the culprit.

    A script that calls this needs the usual `if __name__ == "__main__":`.

    Args:
        work: done to a batch, in a process of its own; gives a result an item. It and the items travel there.
        items: all of them.
        jobs: processes.
        most: items a batch.

    Yields:
        Each item with its result, as they come; None for one that brought its process down.
    """
    size = max(1, min(most, len(items) // (4 * jobs)))
    left: list[Sequence[Item]] = [items[first : first + size] for first in range(0, len(items), size)]
    while left:
        lost: list[int] = []
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            places = {pool.submit(work, batch): place for place, batch in enumerate(left)}
            try:
                for future in as_completed(list(places)):
                    place = places.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        lost.append(place)
                    else:
                        yield from zip(left[place], future.result(), strict=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        alone: list[Sequence[Item]] = [[item] for place in sorted(lost) for item in left[place]]
        if alone and jobs == 1 and len(lost) == len(alone):
            yield alone.pop(0)[0], None
        left, jobs = alone, 1
