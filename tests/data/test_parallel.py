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


INTERRUPTED_POOL = """
import os, signal
from medim.data.parallel import map_in_processes

if __name__ == "__main__":
    print(sorted(number for number, _ in map_in_processes(list, [(0,), (1,)], 2)))
else:  # the module is imported in a worker before it ignores interrupts
    os.kill(os.getpid(), signal.SIGINT)
"""

INTERRUPTED_LOADER = """
import os, signal
from medim.training.engine.sampler import StepSampler, step_loader

class Images:
    def __getitem__(self, item):
        return item[0]

if __name__ == "__main__":
    print(len(list(step_loader(Images(), [[(0, 0)], [(1, 0)]], workers=1))))
elif os.getppid() != os.getsid(0):  # not in the fork server
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("code", "output"),
    [
        pytest.param(INTERRUPTED_POOL, "[(0,), (1,)]", id="pool"),
        pytest.param(INTERRUPTED_LOADER, "2", id="loader", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_during_the_start_of_a_worker_does_not_end_it(code: str, output: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    assert (run.stdout.strip(), run.stderr) == (output, "")


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
