"""Our answers through a real PACS, with no network but its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest

from medim.data.index.index import build_index
from medim.package.package import Package
from medim.predict.dicom.segmentation import read_frame_labels
from medim.predict.dicom.source import read_dicom_source
from medim.predict.predict import predict
from tests.hospital.visit import PLUGINS

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """The command that runs another one in a network namespace of its own."""
    if shutil.which("Orthanc") is None or not list(Path(PLUGINS).glob("libOrthancDicomWeb*")):
        pytest.skip("Orthanc is not installed: apt-get install --no-install-recommends orthanc orthanc-dicomweb")
    for command in (["unshare", "--net"], ["unshare", "--net", "--map-root-user"]):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("no network namespace can be made here: expected root, or unprivileged user namespaces")


def test_answers_come_back_from_a_pacs_as_they_were_sent(
    alone: list[str], packages: dict[str, Package], shared_data: Path, tmp_path: Path
) -> None:
    crop, xrays = shared_data / "mri-dicom" / "Study1" / "13_HCropVolume", shared_data / "xray-dicom"
    (row,) = predict(packages["segmenter"], crop, tmp_path / "seg", output_format="dicom")
    (mapped,) = predict(packages["segmenter"], crop, tmp_path / "map", output_format="dicom", labelmap=True)
    told = predict(packages["classifier"], xrays / "test2.dcm", tmp_path / "sr", output_format="dicom")
    sent = [tmp_path / "seg" / row["file"], tmp_path / "seg" / row["report"], tmp_path / "map" / mapped["file"]]
    sent += [tmp_path / "sr" / one["file"] for one in told]

    visit = [*alone, sys.executable, "-m", "tests.hospital.visit", tmp_path, *sent]
    ran = subprocess.run(list(map(str, visit)), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]

    for path in sent:
        ours = pydicom.dcmread(path)
        assert pydicom.dcmread(tmp_path / "back" / f"{ours.SOPInstanceUID}.dcm") == ours
    index = build_index(crop, "mri")
    plan = index.plan_slices(index.records[0])
    assert plan is not None
    source = read_dicom_source(plan)
    for path in (sent[0], sent[2]):
        uid = pydicom.dcmread(path).SOPInstanceUID
        back = highdicom.seg.segread(tmp_path / "back" / f"{uid}.dcm")
        np.testing.assert_array_equal(
            read_frame_labels(back, source), read_frame_labels(highdicom.seg.segread(path), source)
        )
        assert read_frame_labels(back, source).any()
