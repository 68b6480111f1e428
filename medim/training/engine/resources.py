"""Free memory and disk of this machine, and memory use of a process."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CGROUP_V1_FILES = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)  # limit, usage, and the file cache included in the usage
CGROUP_V2_FILES = ("memory.max", "memory.current", "inactive_file")


def available_memory(accelerator: str = "auto") -> int:
    """Measure the bytes that a process can allocate now.

    The value is the free memory of the GPU if one is used (not run), else that of this machine or container.
    """
    if uses_cuda(accelerator):
        return int(torch.cuda.mem_get_info()[0])
    if sys.platform != "linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min(_read_kib(Path("/proc/meminfo"), "MemAvailable"), *_walk_cgroups()))


def uses_cuda(accelerator: str) -> bool:
    """Whether a run with this device kind, in the terms of Lightning, uses a CUDA GPU on this machine."""
    return accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()


def memory_allocated(device: torch.device) -> int:
    """Measure the bytes that this process uses now: GPU memory on a CUDA device (not run), else RAM."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else process_status_bytes("VmRSS")


def max_memory_allocated(device: torch.device) -> int:
    """Measure the peak memory of this process in bytes: GPU memory on a CUDA device (not run), else RAM."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return process_status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_disk(folder: Path) -> int:
    """Measure the free bytes on the disk of a folder; the folder may not exist yet."""
    ancestor = next(candidate for candidate in (folder.absolute(), *folder.absolute().parents) if candidate.is_dir())
    return shutil.disk_usage(ancestor).free


def process_status_bytes(name: str) -> int:
    """Read an entry of `/proc/self/status` in bytes, such as VmRSS or its peak VmHWM; 0 on other systems."""
    return _read_kib(Path("/proc/self/status"), name) if sys.platform == "linux" else 0


def children_memory() -> int:
    """Measure the resident bytes of all child processes and their descendants."""
    if sys.platform != "linux":
        return 0
    return sum(_read_kib(Path(f"/proc/{process}/status"), "VmRSS") for process in _list_descendants(os.getpid()))


def _list_descendants(process: int) -> Iterator[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    for child in (int(word) for task in tasks for word in task.read_text().split()):
        yield child
        yield from _list_descendants(child)


def _walk_cgroups() -> Iterator[int]:
    """Yield the bytes that each control group (v1, v2) of this process leaves available."""
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (GROUPS / "memory", CGROUP_V1_FILES) if controllers else (GROUPS, CGROUP_V2_FILES)
        own = root / path.lstrip("/")  # in a container, the path may not exist because the root is the group itself
        for folder in (own, *own.parents):
            yield from _cgroup_available(folder, *names)
            if folder == root:
                break


def _cgroup_available(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    """Yield the limit of a control group less its usage, which does not include the file cache: it can be freed."""
    try:
        maximum = (group / limit).read_text().strip()
        if maximum.isdecimal():  # not "max"
            rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield int(maximum) - int((group / usage).read_text()) + int(rows.get(cache, 0))
    except OSError:  # the group has no such limit
        return


def _read_kib(file: Path, name: str) -> int:
    try:
        rows = dict(line.split(":", 1) for line in file.read_text().splitlines())
    except FileNotFoundError:  # the process has ended
        return 0
    return int(rows[name].split()[0]) * 1024 if name in rows else 0
