from __future__ import annotations

import getpass
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from medim.export import gates
from medim.export import onnx as onnx_export
from medim.export.builder import ExportOptions
from medim.export.export import export
from medim.export.privacy_scan import MIN_NAME_LENGTH
from medim.output_folder import acquire_lock
from medim.package.package import Package, load_package
from tests.export.packages import PLANTED, SPECS, make_run


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / PLANTED
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def secrets(place: Path) -> list[bytes]:
    """What must stand in no output."""
    names = [PLANTED, "Mustermann", str(place), str(Path.cwd()), socket.gethostname(), getpass.getuser()]
    names = [name for name in names if len(name) >= MIN_NAME_LENGTH]  # shorter ones occur in numbers by chance
    return [name.encode() for name in names if name not in ("root", "user", "localhost")]


@pytest.fixture(scope="session")
def runs(place: Path) -> dict[str, Path]:
    return {kind: make_run(place / "runs" / kind, kind) for kind in SPECS}


@pytest.fixture(scope="session")
def packages(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    """A package per kind, exported by the first of the test processes that needs them."""
    codes, base = {"segmenter": "hippocampus"}, tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / PLANTED
    root.mkdir(exist_ok=True)
    folder = root / "packages"
    with acquire_lock(root / "lock", wait=True):
        if not (root / "complete").exists():
            for kind, run in runs.items():
                export(run, folder / kind, ExportOptions(label_codes=codes.get(kind)))
            (root / "complete").touch()
    return {kind: load_package(folder / kind) for kind in runs}


@pytest.fixture
def copy_of(packages: dict[str, Package], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a package, of a kind, to be damaged."""
    return lambda kind: Path(shutil.copytree(packages[kind].folder, tmp_path / kind))


@pytest.fixture
def same_graph(packages: dict[str, Package], monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier's graph without seconds of tracing, for tests of what happens around it."""
    graph = packages["classifier"].read_file("models/model.onnx")
    monkeypatch.setattr(onnx_export, "to_onnx", lambda *_: graph)


@pytest.fixture
def short_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the child process and the second export of P10 and P11, which the session's packages went through."""
    monkeypatch.setattr(gates, "offline_error", lambda *_: None)
    monkeypatch.setattr(gates, "_run_repeat_gate", lambda *_: gates.expected_folder_gates()[gates.REPEAT_GATE])
