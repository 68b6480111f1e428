"""Every objective computes where its images are: nothing is left on the CPU, and nothing waits for a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.pretend_device import CASES, DEVICES, FAULTY

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What each device saw of each preset."""
    out = tmp_path_factory.mktemp("devices")
    command = [sys.executable, "-m", "tests.training.pretend_device"]
    run = {kind: subprocess.Popen([*command, kind, str(out / kind)], cwd=REPOSITORY) for kind in DEVICES}
    assert [process.wait(500) for process in run.values()] == [0, 0]
    return {kind: json.loads((out / kind).read_text()) for kind in DEVICES}


@pytest.fixture(params=DEVICES)
def found(request: pytest.FixtureRequest, both: dict[str, dict[str, list[str]]]) -> tuple[str, dict[str, list[str]]]:
    return request.param, both[request.param]


def test_a_step_of_every_small_preset_stays_on_the_device(found: tuple[str, dict[str, list[str]]]) -> None:
    device, cases = found
    assert set(cases) == set(CASES)
    wrong = {name: said for name, said in cases.items() if said != [f"{device}:0"] and not name.endswith(FAULTY)}
    assert not wrong, "\n".join(f"{name}: {said[-1]}" for name, said in wrong.items())


def test_a_tensor_left_behind_is_found(found: tuple[str, dict[str, list[str]]]) -> None:
    (said,) = (said for name, said in found[1].items() if name.endswith(FAULTY))
    assert "FakeTensorDeviceMismatchError" in said[-1]
