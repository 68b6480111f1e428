"""Other people's opinion of a DICOM file."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def dciodvfy_errors(*paths: Path) -> list[str]:
    """What dciodvfy calls an error in some files; skips where it is not installed."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed: apt-get install dicom3tools")
    lines = []
    for path in paths:
        ran = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False, errors="replace")
        told = (ran.stdout + ran.stderr).splitlines()
        assert any(not line.startswith(("Error", "Warning")) for line in told), told  # it names what it took it for
        lines += [f"{path.name}: {line}" for line in told if line.startswith("Error")]
    return lines
