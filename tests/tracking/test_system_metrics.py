from __future__ import annotations

import time
from pathlib import Path

from medim.tracking.system_metrics import SystemMetrics


def test_a_busy_second_shows_in_percent_and_megabytes(tmp_path: Path) -> None:
    measure = SystemMetrics(tmp_path)
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        pass
    found = measure()
    assert all(name.startswith("system/") for name in found)
    assert 0 < found["system/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/system_memory_usage_percentage"] < 100
    assert 0 < found["system/disk_usage_percentage"] <= 100
    assert found["system/process_peak_memory_megabytes"] > 10
