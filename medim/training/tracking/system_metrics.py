"""System metrics under the names of MLflow, measured without the packages that MLflow needs for them."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import torch

METRIC_PREFIX = "system/"


class SystemMetrics:
    """Measurement of processor, memory, disk and GPU memory.

    Args:
        folder: folder on the disk to measure.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._previous_ticks = _read_cpu_ticks()

    def __call__(self) -> dict[str, float]:
        """Measure percentages and megabytes; those of the processor since the last call.

        Metrics that the system does not provide are left out.
        """
        disk = shutil.disk_usage(self._folder)
        metrics = {
            "disk_usage_percentage": 100 * disk.used / disk.total,
            "disk_available_megabytes": disk.free / 1e6,
            "process_peak_memory_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
            "load_average": os.getloadavg()[0],
        }
        busy, total = _read_cpu_ticks()
        if total > self._previous_ticks[1]:
            metrics["cpu_utilization_percentage"] = (
                100 * (busy - self._previous_ticks[0]) / (total - self._previous_ticks[1])
            )
        self._previous_ticks = busy, total
        if memory := _read_meminfo():
            used_bytes = memory["MemTotal"] - memory["MemAvailable"]
            metrics["system_memory_usage_megabytes"] = used_bytes / 1e6
            metrics["system_memory_usage_percentage"] = 100 * used_bytes / memory["MemTotal"]
        is_cuda_active = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        for gpu in range(torch.cuda.device_count() if is_cuda_active else 0):
            if not torch.cuda.memory_reserved(gpu):
                continue  # not used by this run: a query would open a context on it
            free, total_bytes = torch.cuda.mem_get_info(gpu)
            metrics[f"gpu_{gpu}_memory_usage_megabytes"] = (total_bytes - free) / 1e6
            metrics[f"gpu_{gpu}_memory_usage_percentage"] = 100 * (total_bytes - free) / total_bytes
        return {METRIC_PREFIX + name: round(value, 1) for name, value in metrics.items()}


def _read_cpu_ticks() -> tuple[int, int]:
    """Read the busy and the total processor ticks since the start of the machine; zeros if not available."""
    try:
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0, 0
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)


def _read_meminfo() -> dict[str, int]:
    """Read the memory figures of the kernel in bytes, by name; empty if not available."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
