"""Free memory and disk of this machine, and memory use of a process."""

from __future__ import annotations

import contextlib
import resource
import shutil
from pathlib import Path

import psutil
import torch

from medim.data import memory


def available_memory(accelerator: str = "auto") -> int:
    """Measure the bytes that a process can allocate now.

    The value is the free memory of the GPU if one is used (not run), else that of this machine or container.
    """
    if uses_cuda(accelerator):
        return int(torch.cuda.mem_get_info()[0])
    return min(psutil.virtual_memory().available, memory.available_memory())


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
