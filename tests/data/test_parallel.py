"""Process pool of the image readers."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKERS = """
import os, sys, time
from pathlib import Path
from medim.data.parallel import map_in_processes

def wait(items):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)
    return items

if __name__ == "__main__":
    list(map_in_processes(wait, range(2), 2))
"""

LATE_WORKER = """
import multiprocessing, os, sys, time
from pathlib import Path
from medim.training.engine.sampler import prepare_worker

def load(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    multiprocessing.parent_process().join()
    prepare_worker(0)
    time.sleep(600)

if __name__ == "__main__":
    for number in range(2):
        multiprocessing.get_context("forkserver").Process(target=load, args=(number,)).start()
    time.sleep(600)
"""


@pytest.mark.parametrize("code", [WORKERS, LATE_WORKER], ids=["reading", "starting to load"])
def test_the_workers_of_a_killed_process_end(code: str, tmp_path: Path) -> None:
    script, workers = tmp_path / "script.py", tmp_path / "workers"
    script.write_text(code)
    workers.mkdir()
    main = subprocess.Popen([sys.executable, script, workers])
    deadline = time.monotonic() + 120
    while len(list(workers.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    processes = [int(path.name) for path in workers.iterdir()]
    assert len(processes) == 2
    main.kill()
    main.wait()
    while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [process for process in processes if Path(f"/proc/{process}").exists()] == []
