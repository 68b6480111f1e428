"""What this machine has free, and what a process holds."""

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
)  # limit, use, cache of it
CGROUP_V2_FILES = ("memory.max", "memory.current", "inactive_file")


def available_memory(accelerator: str = "auto") -> int:
    """Bytes that a process may take now: of the GPU where one is used (not run), else of this machine or container."""
    if uses_cuda(accelerator):
        return int(torch.cuda.mem_get_info()[0])
    if sys.platform != "linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min(_read_kib(Path("/proc/meminfo"), "MemAvailable"), *_walk_cgroups()))


def uses_cuda(accelerator: str) -> bool:
    """Whether Lightning's name of a device kind means a GPU of CUDA here."""
    return accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()


def memory_allocated(device: torch.device) -> int:
    """Bytes that this process holds now: of the GPU where the device is one (not run), else of RAM."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else process_status_bytes("VmRSS")


def max_memory_allocated(device: torch.device) -> int:
    """Bytes that this process has held at most: of the GPU where the device is one (not run), else of RAM."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return process_status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be made."""
    ancestor = next(candidate for candidate in (folder.absolute(), *folder.absolute().parents) if candidate.is_dir())
    return shutil.disk_usage(ancestor).free


def process_status_bytes(name: str) -> int:
    """Bytes of this process under a name of `/proc/self/status`, such as VmRSS or its peak VmHWM; 0 elsewhere."""
    return _read_kib(Path("/proc/self/status"), name) if sys.platform == "linux" else 0


def children_memory() -> int:
    """Resident bytes of all processes that this one started, and those started."""
    if sys.platform != "linux":
        return 0
    return sum(_read_kib(Path(f"/proc/{process}/status"), "VmRSS") for process in _list_descendants(os.getpid()))


def _list_descendants(process: int) -> Iterator[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    for child in (int(word) for task in tasks for word in task.read_text().split()):
        yield child
        yield from _list_descendants(child)


def _walk_cgroups() -> Iterator[int]:
    """Bytes that each control group (v1, v2) around this process leaves it."""
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (GROUPS / "memory", CGROUP_V1_FILES) if controllers else (GROUPS, CGROUP_V2_FILES)
        own = root / path.lstrip("/")  # a container may see its own group as the root, by a path that is not there
        for folder in (own, *own.parents):
            yield from _cgroup_available(folder, *names)
            if folder == root:
                break


def _cgroup_available(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    """A group's limit less its use, without the file cache that it would drop."""
    try:
        maximum = (group / limit).read_text().strip()
        if maximum.isdecimal():  # not "max"
            rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield int(maximum) - int((group / usage).read_text()) + int(rows.get(cache, 0))
    except OSError:  # there is no such limit
        return


def _read_kib(file: Path, name: str) -> int:
    try:
        rows = dict(line.split(":", 1) for line in file.read_text().splitlines())
    except FileNotFoundError:  # the process has ended
        return 0
    return int(rows[name].split()[0]) * 1024 if name in rows else 0
