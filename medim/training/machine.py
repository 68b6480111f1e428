"""What this machine has free, and what a process holds."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

GROUP = Path("/sys/fs/cgroup")


def available_memory(accelerator: str = "auto") -> int:
    """Bytes that a process may take now: of the GPU where one is used (not run), else of this machine or container."""
    if accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    if sys.platform != "linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _kib(Path("/proc/meminfo"), "MemAvailable")
    limit, used = GROUP / "memory.max", GROUP / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        free = min(free, int(most) - int(used.read_text()))
    return free


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be made."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free


def held(name: str) -> int:
    """Bytes of this process under a name of `/proc/self/status`, such as VmRSS or its peak VmHWM; 0 elsewhere."""
    return _kib(Path("/proc/self/status"), name) if sys.platform == "linux" else 0


def children_memory() -> int:
    """Resident bytes of all processes that this one started, and those started."""
    if sys.platform != "linux":
        return 0
    return sum(_kib(Path(f"/proc/{process}/status"), "VmRSS") for process in _descendants(os.getpid()))


def _descendants(process: int) -> Iterator[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    for child in (int(word) for task in tasks for word in task.read_text().split()):
        yield child
        yield from _descendants(child)


def _kib(file: Path, name: str) -> int:
    try:
        rows = dict(line.split(":", 1) for line in file.read_text().splitlines())
    except FileNotFoundError:  # the process has ended
        return 0
    return int(rows[name].split()[0]) * 1024 if name in rows else 0
