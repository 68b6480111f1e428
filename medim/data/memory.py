"""Memory that this process can still allocate, from the kernel's tables; only the standard library is required."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMORY_TABLE, OWN_TABLE = Path("/proc/meminfo"), Path("/proc/self/statm")
CGROUP_V1_FILES = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)  # limit, usage, and the file cache included in the usage
CGROUP_V2_FILES = ("memory.max", "memory.current", "inactive_file")


def available_memory() -> int:
    """Measure the bytes that this process can allocate now.

    The value is the smallest of the free memory of the machine, the free memory of each control group of the process,
    and the rest of its address space limit (`ulimit -v`). Without the tables of Linux, it is `sys.maxsize`.
    """
    return max(0, min([sys.maxsize, *_list_free_memory(), *_list_free_address_space(), *_list_cgroup_memory()]))


def allocated_address_space() -> int:
    """Measure the bytes of address space of this process; 0 without the tables of Linux."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        return int(OWN_TABLE.read_text().split()[0]) * resource.getpagesize()
    return 0


def _list_free_memory() -> Iterator[int]:
    """Yield the free memory of the machine, if the kernel reports it."""
    with suppress(OSError, ValueError):
        for line in MEMORY_TABLE.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                yield int(value.split()[0]) * 1024


def _list_free_address_space() -> Iterator[int]:
    """Yield the rest of the address space of this process, if it is limited."""
    with suppress(ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            yield limit - allocated_address_space()


def _list_cgroup_memory() -> Iterator[int]:
    """Yield the bytes that each control group (v1, v2) of this process leaves available."""
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (GROUPS / "memory", CGROUP_V1_FILES) if controllers else (GROUPS, CGROUP_V2_FILES)
        own = root / path.lstrip("/")  # in a container, the path may not exist because the root is the group itself
        for folder in (own, *own.parents):
            yield from _list_group_memory(folder, *names)
            if folder == root:
                break


def _list_group_memory(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    """Yield the limit of a control group less its usage, which does not include the file cache: it can be freed."""
    try:
        maximum = (group / limit).read_text().strip()
        if maximum.isdecimal():  # not "max"
            rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield int(maximum) - int((group / usage).read_text()) + int(rows.get(cache, 0))
    except OSError:  # the group has no such limit
        return
