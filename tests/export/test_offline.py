from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medim.export.offline import network_isolation_command, offline_error
from medim.package.package import Package

WAY = network_isolation_command()
needs_a_namespace = pytest.mark.skipif(WAY is None, reason="this machine does not allow `unshare --net`")


@needs_a_namespace
def test_a_child_without_network_has_none() -> None:
    assert WAY is not None
    listen = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname(), 5)"
    run = [sys.executable, "-c", listen]
    assert subprocess.run(run, check=False, capture_output=True).returncode == 0
    assert subprocess.run([*WAY, *run], check=False, capture_output=True).returncode != 0


@needs_a_namespace
def test_a_package_that_does_not_verify_fails_there(packages: dict[str, Package], tmp_path: Path) -> None:
    assert WAY is not None
    folder = Path(shutil.copytree(packages["encoder"].folder, tmp_path / "package"))
    (folder / "LICENSE").write_text("another")
    assert "LICENSE" in str(offline_error(folder, WAY))


def test_a_machine_without_unshare_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert network_isolation_command() is None
