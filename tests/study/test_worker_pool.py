from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from medim.evaluation.probing.label_budget import Budget
from medim.study import worker_pool
from medim.study.cell import StudyContext
from medim.study.design import Cell, read_arms
from medim.study.worker_pool import CellOutcome, serve_cells, try_cell
from medim.types import UserError

pytestmark = pytest.mark.slow
Study = Callable[..., dict[str, Any]]
KILLS = "killed-once"


def mortal(bench: StudyContext, cell: Cell, multiple: float) -> CellOutcome:
    """Die in the cell of the encoder: once, or always where the study's folder says so."""
    if cell.arm.name == "dim":
        mark = bench.out.with_name(f"{bench.out.name}-died")
        if bench.out.name != KILLS or not mark.exists():
            mark.touch()
            os._exit(9)
    return try_cell(bench, cell, multiple)


def serve_mortal(*given: Any) -> None:
    """What a process does in this test: `serve_cells`, where a cell may bring it down."""
    worker_pool.try_cell = mortal
    serve_cells(*given)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What each of two processes has on two cores: sums over more threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_two_warm_processes_give_the_same_bytes_as_one(
    run_study: Study, encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "count_cpus", lambda: 2)
    for name, jobs in (("one", 1), ("two", 2)):
        summary = run_study(tmp_path / name, jobs=jobs, seeds=1, arms=read_arms([f"dim={encoders[0]}"]))
        assert summary["complete"]
    assert (tmp_path / "one" / "results.parquet").read_bytes() == (tmp_path / "two" / "results.parquet").read_bytes()


def test_a_cell_whose_process_dies_is_tried_once_more_and_then_reported(
    run_study: Study, encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "serve_cells", serve_mortal)
    arms, few = read_arms([f"dim={encoders[0]}"]), (Budget(labelled=4),)
    options: dict[str, Any] = {"jobs": 2, "seeds": 1, "arms": arms, "budgets": few}
    assert run_study(tmp_path / KILLS, **options)["complete"]
    assert (tmp_path / f"{KILLS}-died").exists()
    with pytest.raises(UserError, match=r"dim, 4 labels.*killed or crashed \(exit code 9\)"):
        run_study(tmp_path / "always", **options)
    assert (tmp_path / "always" / "cells" / "scratch" / "4" / "0-0" / "summary.json").is_file()
    assert (tmp_path / "always" / "summary.json").is_file()


ORPHAN = """
import multiprocessing, signal, sys, time
from pathlib import Path

from medim.study.worker_pool import stop_with_parent

def work(folder):
    signal.signal(signal.SIGTERM, lambda *_: (Path(folder, "asked").touch(), sys.exit()))
    stop_with_parent()
    Path(folder, "begun").touch()
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],)).start()
    time.sleep(60)
"""


def test_a_process_whose_study_was_killed_is_asked_to_stop(tmp_path: Path) -> None:
    (tmp_path / "orphan.py").write_text(ORPHAN)
    study = subprocess.Popen([sys.executable, str(tmp_path / "orphan.py"), str(tmp_path)])
    wait_for(tmp_path / "begun")
    study.kill()
    study.wait()
    wait_for(tmp_path / "asked")


def wait_for(path: Path, seconds: float = 120) -> None:
    """Wait until a file is there.

    Raises:
        TimeoutError: it is not.
    """
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            raise TimeoutError(path.name)
        time.sleep(0.05)
