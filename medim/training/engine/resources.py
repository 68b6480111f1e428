"""Free memory and disk of this machine, and memory use of a process."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
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
    return max(0, min([psutil.virtual_memory().available, *_walk_cgroups()]))


def uses_cuda(accelerator: str) -> bool:
    """Whether a run with this device kind, in the terms of Lightning, uses a CUDA GPU on this machine."""
    return accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()


def memory_allocated(device: torch.device) -> int:
    """Measure the bytes that this process uses now: GPU memory on a CUDA device (not run), else RAM."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else psutil.Process().memory_info().rss


def max_memory_allocated(device: torch.device) -> int:
    """Measure the peak memory of this process in bytes: GPU memory on a CUDA device (not run), else RAM."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, KeyError):  # psutil lacks VmHWM; ru_maxrss may be the peak of a parent process
        rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(rows["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_disk(folder: Path) -> int:
    """Measure the free bytes on the disk of a folder; the folder may not exist yet."""
    ancestor = next(candidate for candidate in (folder.absolute(), *folder.absolute().parents) if candidate.is_dir())
    return shutil.disk_usage(ancestor).free


def children_memory() -> int:
    """Measure the resident bytes of all child processes and their descendants."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def _walk_cgroups() -> Iterator[int]:
    """Yield the bytes that each control group (v1, v2) of this process leaves available; psutil ignores them."""
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
