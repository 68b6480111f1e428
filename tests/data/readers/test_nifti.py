"""NIfTI: orientation, units, and everything that can be wrong with a file."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medim.data.readers import ReadError, read_mask, read_volume
from tests.data.synthetic import noise, write_nifti


def reason_of(path: Path) -> str:
    with pytest.raises(ReadError) as caught:
        read_volume(path)
    assert str(path) in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ILA"])
def test_every_orientation_is_read_as_ras(tmp_path: Path, codes: str) -> None:
    array, affine = noise(4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (-7, 8, 9)
    turned = nibabel.Nifti1Image(array, affine).as_reoriented(
        nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt(("R", "A", "S")), nibabel.orientations.axcodes2ornt(tuple(codes))
        )
    )
    nibabel.save(turned, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    assert volume.native_shape == turned.shape
    np.testing.assert_allclose(volume.native_affine, turned.affine, atol=1e-5)


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    array = noise(4, 5, 6).astype(np.int16)
    image = nibabel.Nifti1Image(array, np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    image.header.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "a.nii")
    stored = nibabel.load(tmp_path / "a.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").array[0], stored.get_fdata(), rtol=1e-6)


def test_a_trailing_axis_of_one_is_dropped(tmp_path: Path) -> None:
    assert read_volume(write_nifti(tmp_path / "a.nii", noise(4, 5, 6, 1))).array.shape == (1, 4, 5, 6)


def test_metres_become_millimetres(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", affine=np.diag([0.001, 0.001, 0.002, 1.0]), xyzt_units=1)
    assert read_volume(path).spacing == pytest.approx((1.0, 1.0, 2.0))


def test_the_second_version_of_the_format_is_read(tmp_path: Path) -> None:
    array = noise(4, 5, 6)
    nibabel.save(nibabel.Nifti2Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array[0], array)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"")
    assert reason_of(tmp_path / "a.nii.gz") == "empty-file"


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_with_a_reason(tmp_path: Path, name: str, part: float) -> None:
    whole = write_nifti(tmp_path / name, noise(12, 12, 12)).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * part)])
    assert reason_of(tmp_path / name) in {"truncated", "unreadable"}


def test_a_flipped_byte_in_packed_voxels_is_noticed(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", noise(12, 12, 12))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    assert reason_of(path) in {"truncated", "unreadable"}


def test_a_header_that_announces_more_than_the_file_holds_takes_no_memory(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz")
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[42:48] = np.array([20000, 20000, 20000], np.int16).tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))
    assert reason_of(path) in {"truncated", "too-large"}


def test_what_is_not_one_scalar_volume_is_refused(tmp_path: Path) -> None:
    assert reason_of(write_nifti(tmp_path / "a.nii", noise(4, 5, 6, 2))) == "several-volumes"
    assert reason_of(write_nifti(tmp_path / "b.nii", noise(4, 5))) == "wrong-dimensions"
    colour = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert reason_of(write_nifti(tmp_path / "c.nii", colour)) == "not-scalar"
    assert reason_of(write_nifti(tmp_path / "d.nii", noise(4, 5, 6).astype(np.complex64))) == "not-scalar"


def test_voxels_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        array = noise(4, 5, 6)
        array[1, 2, 3] = value
        assert reason_of(write_nifti(tmp_path / f"{name}.nii.gz", array)) == "not-finite"
    assert reason_of(write_nifti(tmp_path / "flat.nii.gz", np.full((4, 5, 6), 3, np.int16))) == "constant"


def test_an_affine_that_flattens_space_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii")
    raw = bytearray(path.read_bytes())
    raw[280:328] = b"\0" * 48  # the rows of the sform
    path.write_bytes(raw)
    assert reason_of(path) == "bad-geometry"


def test_a_mask_holds_whole_numbers(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", np.full((4, 5, 6), 2, np.uint8))
    mask = read_mask(path)
    assert mask.array.dtype == np.uint8
    assert mask.array.max() == 2
    for name, value in (("half", 0.5), ("negative", -1.0), ("large", 300.0), ("nan", np.nan)):
        with pytest.raises(ReadError) as caught:
            read_mask(write_nifti(tmp_path / f"{name}.nii", np.full((4, 5, 6), value, np.float32)))
        assert caught.value.reason == "not-a-mask"


def test_a_real_crop_is_read_as_nibabel_has_it(shared_data: Path) -> None:
    path = shared_data / "mri-hippocampus" / "imagesTr" / "hippocampus_001.nii.gz"
    image = nibabel.as_closest_canonical(nibabel.load(path))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array[0], image.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(volume.affine, image.affine)
