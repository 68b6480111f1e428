"""System metrics under the names of MLflow, measured with psutil."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import psutil
import torch

METRIC_PREFIX = "system/"


class SystemMetrics:
    """Measurement of processor, memory, disk and GPU memory.

    Args:
        folder: folder on the disk to measure.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        psutil.cpu_percent()  # start of the first interval

    def __call__(self) -> dict[str, float]:
        """Measure percentages and megabytes; those of the processor since the last call."""
        disk, memory = shutil.disk_usage(self._folder), psutil.virtual_memory()
        used_bytes = memory.total - memory.available
        metrics = {
            "disk_usage_percentage": 100 * disk.used / disk.total,
            "disk_available_megabytes": disk.free / 1e6,
            "process_peak_memory_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
            "load_average": os.getloadavg()[0],
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": used_bytes / 1e6,
            "system_memory_usage_percentage": 100 * used_bytes / memory.total,
        }
        is_cuda_active = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        for gpu in range(torch.cuda.device_count() if is_cuda_active else 0):
            if not torch.cuda.memory_reserved(gpu):
                continue  # not used by this run: a query would open a context on it
            free, total_bytes = torch.cuda.mem_get_info(gpu)
            metrics[f"gpu_{gpu}_memory_usage_megabytes"] = (total_bytes - free) / 1e6
            metrics[f"gpu_{gpu}_memory_usage_percentage"] = 100 * (total_bytes - free) / total_bytes
        return {METRIC_PREFIX + name: round(value, 1) for name, value in metrics.items()}
