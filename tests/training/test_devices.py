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


@pytest.fixture(scope="module", params=DEVICES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[str]]]:
    out = tmp_path_factory.mktemp("devices") / "found.json"
    command = [sys.executable, "-m", "tests.training.pretend_device", request.param, str(out)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=500)
    return request.param, json.loads(out.read_text())


def test_a_step_of_every_small_preset_stays_on_the_device(found: tuple[str, dict[str, list[str]]]) -> None:
    device, cases = found
    assert set(cases) == set(CASES)
    wrong = {name: said for name, said in cases.items() if said != [f"{device}:0"] and not name.endswith(FAULTY)}
    assert not wrong, "\n".join(f"{name}: {said[-1]}" for name, said in wrong.items())


def test_a_tensor_left_behind_is_found(found: tuple[str, dict[str, list[str]]]) -> None:
    (said,) = (said for name, said in found[1].items() if name.endswith(FAULTY))
    assert "FakeTensorDeviceMismatchError" in said[-1]
