from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medim.export import checks
from medim.package.contract import GOLDEN, Contract
from medim.package.golden import GoldenInput, make_phantom
from medim.package.package import Package
from medim.predict.dicom import segmentation

READ_BACK, CHECKED = "DICOM segmentation, read back", "DICOM answers, dciodvfy"


@pytest.fixture
def contract(packages: dict[str, Package]) -> Contract:
    return packages["segmenter"].contract


@pytest.fixture
def golden(packages: dict[str, Package]) -> GoldenInput:
    return GoldenInput.parse(packages["segmenter"].read_file(GOLDEN))


def test_answers_in_dicom_are_read_back_and_checked(golden: GoldenInput, contract: Contract) -> None:
    found = checks.check_dicom_answers(golden, contract)
    assert found[READ_BACK]["verdict"] == "pass"
    assert found[READ_BACK]["of"] == golden.labels.size
    assert found[CHECKED]["verdict"] in ("pass", "not run")
    assert not found[CHECKED].get("errors")


def test_a_segment_that_is_read_back_otherwise_fails(
    golden: GoldenInput, contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = segmentation.read_frame_labels
    monkeypatch.setattr(segmentation, "read_frame_labels", lambda *given: np.flip(read(*given), axis=0))
    assert checks.check_dicom_answers(golden, contract)[READ_BACK]["verdict"] == "fail"


def test_a_flat_image_is_answered_in_dicom_too(contract: Contract) -> None:
    volume = make_phantom([40, 30], [], 1)
    flat = GoldenInput(volume, np.zeros(0, np.float32), np.zeros(0, np.uint8))
    found = checks.check_dicom_answers(flat, contract.model_copy(update={"modality": "xray"}))
    assert found[READ_BACK]["verdict"] == "pass"
    assert not found[CHECKED].get("errors")


def test_a_gate_whose_tool_is_missing_is_not_run(
    golden: GoldenInput, contract: Contract, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = checks.check_dicom_answers(golden, contract)
    assert found[READ_BACK]["verdict"] == "pass"
    assert found[CHECKED]["verdict"] == "not run"
