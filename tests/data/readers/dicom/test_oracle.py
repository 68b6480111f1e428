"""The same volumes at the same place as dcm2niix has them, for each vendor's way of writing them; or a named reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import generate_uid

from medim.data.index.index import AllRejectedError, build_index
from medim.data.readers import DICOM, ReadError, read_volume
from medim.data.readers.nifti import NiftiReader
from medim.predict.dicom.source import read_dicom_source
from medim.types import Volume
from tests.data.readers.dicom.vendors import (
    OBLIQUE,
    find_places,
    make_enhanced,
    make_siemens_mosaic,
    make_uih_mosaic,
    smooth,
    write_slices,
)
from tests.data.synthetic import AXIAL, dataset, save

SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def write_mosaics(folder: Path, volumes: int, sign: int) -> None:
    for number in range(volumes):
        tags = {"InstanceNumber": number + 1, "AcquisitionNumber": number + 1, "SOPInstanceUID": generate_uid()}
        made = make_siemens_mosaic(smooth(7, 10, 12, seed=number), 3.5, sign=sign, **tags)
        save(made, folder / f"{number}.dcm")


def shear(places: list[list[float]], step: float) -> list[list[float]]:
    return [[x, y + step * k, z] for k, (x, y, z) in enumerate(places)]


def write_axial(folder: Path, **options: Any) -> None:
    write_slices(folder, find_places(8, 3.0), **options)


WAYS: dict[str, tuple[int, Callable[[Path], object]]] = {  # volumes, and a function that writes them
    "a mosaic of Siemens": (1, lambda folder: write_mosaics(folder, 1, 1)),
    "mosaics from top to bottom": (3, lambda folder: write_mosaics(folder, 3, -1)),
    "a grid of UIH": (1, lambda folder: save(make_uih_mosaic(smooth(7, 10, 10), 3.5, OBLIQUE), folder / "a.dcm")),
    "enhanced, shared groups": (1, lambda folder: save(make_enhanced(1, 6, 3.0, per_frame=False), folder / "a.dcm")),
    "enhanced, groups per frame": (1, lambda folder: save(make_enhanced(1, 6, 3.0, per_frame=True), folder / "a.dcm")),
    "enhanced, several volumes": (3, lambda folder: save(make_enhanced(3, 6, 3.0, per_frame=True), folder / "a.dcm")),
    "classic": (1, write_axial),
    "volumes told apart by InstanceNumber": (4, lambda folder: write_axial(folder, volumes=4)),
    "a gap between the slices": (1, lambda folder: write_slices(folder, find_places(8, 4.2), gap=3.0,
                                                               SpacingBetweenSlices=4.2)),
    "reversed": (1, lambda folder: write_axial(folder, order=range(7, -1, -1))),
    "interleaved": (1, lambda folder: write_axial(folder, order=[0, 2, 4, 6, 1, 3, 5, 7])),
    "oblique": (1, lambda folder: write_slices(folder, find_places(8, 3.0, OBLIQUE),
                                              ImageOrientationPatient=list(OBLIQUE))),
    "sagittal": (1, lambda folder: write_slices(folder, find_places(8, 3.0, SAGITTAL),
                                               ImageOrientationPatient=list(SAGITTAL))),
}  # fmt: skip
REASONS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "tilted gantry": ("sheared", lambda folder: write_slices(folder, shear(find_places(8, 3.0), 0.8))),
    "a missing slice": (
        "missing-slices",
        lambda folder: write_slices(folder, find_places(8, 3.0)[:3] + find_places(8, 3.0)[4:]),
    ),
    "a mosaic without its header": ("mosaic", lambda folder: save(strip_mosaic(), folder / "a.dcm")),
}


def strip_mosaic() -> Any:
    made = make_siemens_mosaic(smooth(7, 10, 12), 3.5)
    made.remove_private_tags()
    return made


def find_corners(volume: Volume) -> np.ndarray[Any, Any]:
    indices = np.array(np.meshgrid(*[(0, n - 1) for n in volume.shape], indexing="ij")).reshape(3, -1)
    return (volume.affine[:3, :3] @ indices + volume.affine[:3, 3:]).T


def convert(folder: Path, out: Path) -> list[Volume]:
    """The volumes that dcm2niix makes of a folder."""
    program = Path(sys.executable).with_name("dcm2niix")
    if not program.exists():
        pytest.skip("dcm2niix is not installed: pip install dcm2niix")
    out.mkdir()
    command = [program, "-b", "n", "-z", "n", "-m", "n", "-f", "%s_%p_%e_%t", "-o", out, folder]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    images = [(path, image) for path in sorted(out.glob("*.nii")) for image in NiftiReader().inspect(path).images]
    return [read_volume(f"{path}#{image.item}" if image.item else path) for path, image in images]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_volumes_of_each_vendor_are_those_of_dcm2niix(tmp_path: Path, way: str) -> None:
    count, write = WAYS[way]
    write(tmp_path / "in")
    index = build_index(tmp_path / "in", "mri", remember=False)
    ours = [index.open(record) for record in index.records]
    assert (len(ours), index.rejected) == (count, ())
    theirs = convert(tmp_path / "in", tmp_path / "out")
    assert len(theirs) == count
    for volume in ours:
        (twin,) = [other for other in theirs if np.array_equal(other.array, volume.array)]
        assert np.abs(find_corners(volume) - find_corners(twin)).max() < 0.01


def test_interleaved_volumes_are_those_that_were_written(tmp_path: Path) -> None:
    """Against what was written: dcm2niix 1.0.20260724 makes other volumes of these files."""
    write_axial(tmp_path, volumes=2, order=[0, 2, 4, 6, 1, 3, 5, 7])
    index = build_index(tmp_path, "mri", remember=False)
    for number, record in enumerate(index.records):
        slices = np.stack([smooth(10, 12, seed=100 * number + k) for k in range(8)])
        np.testing.assert_array_equal(index.open(record).array[0, ::-1, ::-1].transpose(2, 1, 0), slices)


@pytest.mark.parametrize("way", REASONS)
def test_what_is_no_even_stack_is_refused_with_its_reason(tmp_path: Path, way: str) -> None:
    reason, write = REASONS[way]
    write(tmp_path / "in")
    with pytest.raises(AllRejectedError) as raised:
        build_index(tmp_path / "in", "mri", remember=False)
    assert {one.reason for one in raised.value.index.rejected} == {reason}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE, SAGITTAL])
def test_a_mosaic_is_the_series_of_its_slices(tmp_path: Path, sign: int, orientation: tuple[float, ...]) -> None:
    slices = smooth(5, 6, 7)
    places = find_places(5, sign * 3.5, orientation)
    write_slices(tmp_path / "series", places, ImageOrientationPatient=list(orientation))
    for k, path in enumerate(sorted((tmp_path / "series").iterdir())):
        path.unlink()
        tags = {"ImagePositionPatient": places[k], "ImageOrientationPatient": list(orientation)}
        save(dataset(slices[k], PixelSpacing=[2.0, 1.5], **tags), path)
    mosaic = save(make_siemens_mosaic(slices, 3.5, orientation, sign=sign), tmp_path / "mosaic" / "a.dcm")
    one, other = read_volume(tmp_path / "series"), read_volume(mosaic)
    np.testing.assert_array_equal(one.array, other.array)
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.__delitem__((0x29, 0x1010)),
        lambda made: setattr(made[0x29, 0x1010], "value", made[0x29, 0x1010].value[:150]),
        lambda made: setattr(made[0x29, 0x1010], "value", made[0x29, 0x1010].value.replace(b"Normal", b"Absent")),
        lambda made: setattr(made[0x29, 0x10], "value", "ANOTHER VENDOR"),
        lambda made: setattr(made, "ImageOrientationPatient", list(SAGITTAL)),
        lambda made: setattr(made, "SpacingBetweenSlices", 0) or setattr(made, "SliceThickness", 0),
        lambda made: delattr(made, "ImagePositionPatient"),
        lambda made: setattr(made, "Columns", 35) or setattr(made, "Rows", 36),
        lambda made: setattr(made, "NumberOfFrames", 2) or setattr(made, "Rows", 15),
    ],
    ids=["no header", "cut header", "no normal", "vendor", "parallel", "gap", "position", "tiles", "frames"],
)
def test_a_mosaic_of_unknown_layout_is_named_so(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    made = make_siemens_mosaic(smooth(7, 10, 12), 3.5)
    change(made)
    inspection = DICOM.inspect(save(made, tmp_path / "a.dcm"))
    assert [one.reason for one in inspection.rejected] == ["mosaic"]
    assert "dcm2niix" in inspection.rejected[0].detail


@pytest.mark.parametrize("missing", ["ImagePositionPatient", "an item", "the sequence"])
def test_a_grid_of_unknown_layout_is_named_so(tmp_path: Path, missing: str) -> None:
    made = make_uih_mosaic(smooth(7, 10, 10), 3.5)
    items = made[0x65, 0x1051].value
    if missing == "an item":
        del items[3]
    elif missing == "the sequence":
        del made[0x65, 0x1051]
    else:
        del items[3].ImagePositionPatient
    assert [one.reason for one in DICOM.inspect(save(made, tmp_path / "a.dcm")).rejected] == ["mosaic"]


def test_volumes_of_mosaics_are_images_and_many_are_a_long_run(tmp_path: Path) -> None:
    write_mosaics(tmp_path, 17, 1)
    index = build_index(tmp_path, "mri", remember=False)
    assert [record.quality for record in index.records] == ["long-run"] * 17
    assert {record.shape for record in index.records} == {(12, 10, 7)}
    plan = index.plan_slices(index.records[0])
    assert plan is not None
    with pytest.raises(ReadError, match="mosaic"):
        read_dicom_source(plan)
