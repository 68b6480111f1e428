"""Process pool of the image readers."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

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


def test_the_workers_of_a_killed_process_end(tmp_path: Path) -> None:
    script, workers = tmp_path / "script.py", tmp_path / "workers"
    script.write_text(WORKERS)
    workers.mkdir()
    main = subprocess.Popen([sys.executable, script, workers])
    deadline = time.monotonic() + 60
    while len(list(workers.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    processes = [int(path.name) for path in workers.iterdir()]
    assert len(processes) == 2
    main.kill()
    main.wait()
    while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [process for process in processes if Path(f"/proc/{process}").exists()] == []
