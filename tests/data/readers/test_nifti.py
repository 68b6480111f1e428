"""NIfTI: orientation, units, and everything that can be wrong with a file."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medim.data.readers import DICOM, ReadError, find_reader, nifti, read_mask, read_volume
from medim.data.readers.inspection import FileInspection
from medim.data.readers.nifti import NiftiReader
from tests.data.synthetic import noise, scan, write_nifti, write_series


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
    assert reason_of(path) in {"truncated", "unreadable", "length-mismatch"}


def test_a_header_that_announces_more_than_the_file_holds_takes_no_memory(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz")
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[42:48] = np.array([20000, 20000, 20000], np.int16).tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))
    assert reason_of(path) in {"truncated", "too-large"}


def test_what_is_not_one_scalar_volume_is_refused(tmp_path: Path) -> None:
    assert reason_of(write_nifti(tmp_path / "a.nii", noise(4, 5, 6, 2))) == "several-volumes"
    assert reason_of(write_nifti(tmp_path / "many.nii", noise(1, 1, 2, (1 << 14) + 1))) == "too-many-images"
    assert reason_of(write_nifti(tmp_path / "vector.nii", noise(4, 5, 6, 1, 3))) == "not-scalar"
    assert reason_of(write_nifti(tmp_path / "b.nii", noise(4, 5))) == "wrong-dimensions"
    colour = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert reason_of(write_nifti(tmp_path / "c.nii", colour)) == "not-scalar"
    assert reason_of(write_nifti(tmp_path / "d.nii", noise(4, 5, 6).astype(np.complex64))) == "not-scalar"


def test_voxels_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    for name, value in (("inf", np.inf), ("-inf", -np.inf)):
        array = noise(4, 5, 6)
        array[1, 2, 3] = value
        assert reason_of(write_nifti(tmp_path / f"{name}.nii.gz", array)) == "not-finite"
        array[:2, 0] = np.nan
        assert reason_of(write_nifti(tmp_path / f"{name}-nan.nii.gz", array)) == "not-finite"
    assert reason_of(write_nifti(tmp_path / "nan.nii", np.full((4, 5, 6), np.nan, np.float32))) == "not-finite"
    almost_flat = np.where(noise(4, 5, 6) > 500, np.float32(3), np.float32(np.nan))
    assert reason_of(write_nifti(tmp_path / "nan-and-3.nii", almost_flat)) == "constant"
    assert reason_of(write_nifti(tmp_path / "flat.nii.gz", np.full((4, 5, 6), 3, np.int16))) == "constant"


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "mha", "nrrd"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_is_background_as_the_padding_of_dicom_is(tmp_path: Path, suffix: str, dtype: type) -> None:
    array = (noise(5, 6, 7) - 400).astype(dtype)
    array[:2], array[:, -1:], array[..., :1] = np.nan, np.nan, np.nan
    path = tmp_path / f"a.{suffix}"
    if suffix.startswith("nii"):
        write_nifti(path, array)
    else:
        itk = pytest.importorskip("SimpleITK")
        image = itk.GetImageFromArray(array.T)
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # to the right and the front
        itk.WriteImage(image, str(path))
    reader = find_reader(path)
    assert reader is not None
    (image_info,) = reader.inspect(path).images
    assert image_info.quality == ("padded",)
    expected = np.where(np.isnan(array), np.nanmin(array), array)
    np.testing.assert_array_equal(read_volume(path).array[0], expected)


def test_each_volume_of_a_file_has_its_own_background(tmp_path: Path) -> None:
    array = np.stack([noise(4, 5, 6) + 1000 * k for k in range(3)], axis=-1)
    array[0, ..., 1:] = np.nan
    array[..., 2] = np.nan
    path = write_nifti(tmp_path / "a.nii.gz", array)
    sight = NiftiReader().inspect(path)
    assert [image.quality for image in sight.images] == [(), ("padded",)]
    assert [one.reason for one in sight.rejected] == ["not-finite"]
    assert read_volume(f"{path}#1").array[0, 0].max() == np.nanmin(array[..., 1])
    with pytest.raises(ReadError, match="not-finite"):
        read_volume(f"{path}#2")
    with pytest.raises(ReadError, match="not-a-mask"):
        read_mask(f"{path}#1")


def test_an_affine_that_flattens_space_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii")
    raw = bytearray(path.read_bytes())
    raw[280:328] = b"\0" * 48  # the rows of the sform
    path.write_bytes(raw)
    assert reason_of(path) == "bad-geometry"


# --- place


def placed(path: Path, sform: Any, qform: Any, codes: tuple[int, int] = (1, 1)) -> Path:
    """A file with an sform and a qform."""
    image = nibabel.Nifti1Image(noise(4, 5, 6), None)
    image.header.set_sform(sform, codes[0])
    image.header.set_qform(qform, codes[1])
    nibabel.save(image, path)
    return path


def looked(path: Path) -> FileInspection:
    return NiftiReader().inspect(path)


def turned(degrees: float) -> np.ndarray[Any, Any]:
    """A turn about the body's long axis."""
    angle = np.deg2rad(degrees)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine


def test_an_sform_counts_before_a_qform_and_a_difference_is_told(tmp_path: Path) -> None:
    moved = np.eye(4)
    moved[:3, 3] = (5, 0, 0)
    path = placed(tmp_path / "a.nii", moved, np.eye(4))
    assert looked(path).images[0].quality == ("sform-qform-differ",)
    np.testing.assert_array_equal(read_volume(path).affine, moved)
    assert looked(placed(tmp_path / "b.nii", np.eye(4), np.eye(4))).images[0].quality == ()
    assert looked(placed(tmp_path / "c.nii", turned(20), np.eye(4))).images[0].quality == ("sform-qform-differ",)


def test_an_sform_that_mirrors_the_qform_is_refused(tmp_path: Path) -> None:
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    assert reason_of(placed(tmp_path / "a.nii", mirror, np.eye(4))) == "sform-qform-conflict"
    assert reason_of(placed(tmp_path / "b.nii", mirror, np.eye(4), (4, 1))) == "sform-qform-conflict"


def test_a_turn_is_refused_only_where_both_claim_one_space(tmp_path: Path) -> None:
    assert reason_of(placed(tmp_path / "a.nii", turned(180), np.eye(4))) == "sform-qform-conflict"
    template = placed(tmp_path / "b.nii", turned(180), np.eye(4), (4, 1))
    assert looked(template).images[0].quality == ("sform-qform-differ",)


def test_a_qform_alone_is_enough_and_no_form_leaves_the_place_unknown(tmp_path: Path) -> None:
    affine = turned(30) @ np.diag([-1.0, 2.0, 3.0, 1.0])  # the mirror stands in qfac
    path = placed(tmp_path / "a.nii", None, affine, (0, 1))
    assert looked(path).images[0].quality == ()
    np.testing.assert_allclose(read_volume(path).native_affine, affine, atol=1e-6)
    assert looked(placed(tmp_path / "b.nii", None, None, (0, 0))).images[0].quality == ("no-place",)


def test_a_sheared_sform_is_kept_as_it_is(tmp_path: Path) -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    np.testing.assert_allclose(read_volume(write_nifti(tmp_path / "a.nii", affine=sheared)).native_affine, sheared)


@pytest.mark.parametrize(
    ("start", "value"),
    [
        (80, -1.0),  # pixdim[1], a length
        (84, 0.0),
        (88, np.nan),
        (76, 3.0),  # pixdim[0], the handedness
        (256, 2.0),  # quatern_b: a quaternion longer than 1
    ],
)
def test_a_qform_without_meaning_is_refused_where_it_alone_tells_the_place(
    tmp_path: Path, start: int, value: float
) -> None:
    for name, codes in (("alone", (0, 1)), ("beside", (1, 1))):
        path = placed(tmp_path / f"{name}.nii", np.eye(4), np.eye(4), codes)
        raw = bytearray(path.read_bytes())
        raw[start : start + 4] = np.float32(value).tobytes()
        path.write_bytes(raw)
    assert reason_of(tmp_path / "alone.nii") == "bad-geometry"
    assert looked(tmp_path / "beside.nii").images[0].quality == ("sform-qform-differ",)


def test_a_form_code_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    assert reason_of(write_nifti(tmp_path / "a.nii", sform_code=77)) == "bad-geometry"


# --- voxels


@pytest.mark.parametrize("volumes", [16, 17])
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_a_long_run_is_read_alike_in_nifti_and_dicom(tmp_path: Path, volumes: int, suffix: str) -> None:
    array = noise(4, 5, 3, volumes)
    path = write_nifti(tmp_path / f"run.{suffix}", array)
    sight = NiftiReader().inspect(path)
    quality = ("long-run",) if volumes > 16 else ()
    assert [(image.item, image.quality) for image in sight.images] == [(str(k), quality) for k in range(volumes)]
    np.testing.assert_array_equal(read_volume(f"{path}#{volumes - 2}").array[0], array[..., volumes - 2])
    if suffix == "nii":
        for k in range(volumes):
            write_series(tmp_path / "dicom" / str(k), array[..., k].T, TemporalPositionIdentifier=k + 1)
        images, refused = scan(DICOM, sorted((tmp_path / "dicom").glob("*/*")), "mri")
        assert [image.quality for image in images] == [quality] * volumes
        assert refused == []


def test_each_of_several_volumes_is_an_image(tmp_path: Path) -> None:
    array = noise(4, 5, 6, 3)
    array[..., 1] = 7
    path = write_nifti(tmp_path / "a.nii.gz", array)
    sight = looked(path)
    assert [found.item for found in sight.images] == ["0", "2"]
    assert [(refused.reason, refused.detail[:9]) for refused in sight.rejected] == [("constant", "volume 1:")]
    np.testing.assert_array_equal(read_volume(f"{path}#2").array[0], array[..., 2])
    for item in ("3", "-1", "x", ""):
        with pytest.raises(ReadError, match="0 to 2"):
            read_volume(f"{path}#{item}")
    with pytest.raises(ReadError, match="one volume, without a number"):
        read_volume(f"{write_nifti(tmp_path / 'b.nii')}#0")


def test_big_endian_wide_and_extended_files_are_read(tmp_path: Path) -> None:
    array = noise(4, 5, 6)
    header = nibabel.Nifti1Header(endianness=">")
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4), header), tmp_path / "big.nii")
    wide = nibabel.Nifti1Image(array.astype(np.int64), np.eye(4), dtype=np.int64)
    wide.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"for the test"))
    nibabel.save(wide, tmp_path / "wide.nii.gz")
    for name in ("big.nii", "wide.nii.gz"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array[0], array)


@pytest.mark.parametrize(("slope", "factor"), [(0.0, 1.0), (np.nan, 1.0), (2.0, 2.0), (-1.0, -1.0)])
def test_a_slope_of_nothing_scales_nothing(tmp_path: Path, slope: float, factor: float) -> None:
    array = noise(4, 5, 6).astype(np.int16)
    path = write_nifti(tmp_path / "a.nii", array)
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([slope, 0.0], np.float32).tobytes()
    path.write_bytes(raw)
    np.testing.assert_array_equal(read_volume(path).array[0], array * factor)


def test_a_scale_beyond_float32_is_refused_as_infinite(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", noise(4, 5, 6) * 1e30)
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([1e30, 0.0], np.float32).tobytes()
    path.write_bytes(raw)
    assert reason_of(path) == "not-finite"


def test_bytes_after_the_voxels_contradict_the_shape(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.gz"):
        path = write_nifti(tmp_path / name)
        raw = bytearray(path.read_bytes() if name == "a.nii" else gzip.decompress(path.read_bytes()))
        raw[44] -= 1  # a row less
        path.write_bytes(raw if name == "a.nii" else gzip.compress(bytes(raw)))
        assert reason_of(path) == "length-mismatch"


def test_a_gzip_file_of_several_members_is_one_stream_and_packing_is_not_a_matter_of_names(tmp_path: Path) -> None:
    whole = write_nifti(tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(whole[:500]) + gzip.compress(whole[500:]))
    (tmp_path / "c.nii.gz").write_bytes(whole)
    (tmp_path / "d.nii").write_bytes(gzip.compress(whole))
    for name in ("b.nii.gz", "c.nii.gz", "d.nii"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array[0], noise(4, 5, 6))


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    start = write_nifti(tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(start + bytes(1 << 26)))
    tracemalloc.start()
    assert reason_of(tmp_path / "b.nii.gz") == "length-mismatch"
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_half_of_a_pair_is_refused_with_a_remedy(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(noise(4, 5, 6), np.eye(4)), tmp_path / "a.img")
    for name in ("a.img", "a.hdr"):
        with pytest.raises(ReadError, match="nib-convert") as caught:
            read_volume(tmp_path / name)
        assert caught.value.reason == "pair-of-files"


def test_labels_and_statistics_are_no_images_but_may_be_masks(tmp_path: Path) -> None:
    for name, code in (("labels", 1002), ("t-test", 3)):
        path = write_nifti(tmp_path / f"{name}.nii", (noise(4, 5, 6) % 3).astype(np.uint8), intent_code=code)
        assert [refused.reason for refused in looked(path).rejected] == ["not-an-image"]
        assert read_mask(path).array.max() == 2


def test_a_mask_holds_whole_numbers(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", np.full((4, 5, 6), 2, np.uint8))
    mask = read_mask(path)
    assert mask.array.dtype == np.uint8
    assert mask.array.max() == 2
    for name, value in (("half", 0.5), ("negative", -1.0), ("large", 65536.0), ("nan", np.nan)):
        with pytest.raises(ReadError, match=f"got {value:g}") as caught:
            read_mask(write_nifti(tmp_path / f"{name}.nii", np.full((4, 5, 6), value, np.float32)))
        assert caught.value.reason == "not-a-mask"


def test_a_real_crop_is_read_as_nibabel_has_it(shared_data: Path) -> None:
    path = shared_data / "mri-hippocampus" / "imagesTr" / "hippocampus_001.nii.gz"
    image = nibabel.as_closest_canonical(nibabel.load(path))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array[0], image.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(volume.affine, image.affine)


@pytest.mark.parametrize("place", [0, 5])
def test_a_mask_of_large_values_keeps_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Layers are read in chunks: the first value above 255 may come late."""
    monkeypatch.setattr(nifti, "CHUNK_BYTES", 1)
    array = (noise(4, 5, 6) % 4).astype(np.int16)
    array[1, 2, place] = 2035
    mask = read_mask(write_nifti(tmp_path / "a.nii.gz", array))
    assert mask.array.dtype == np.uint16
    np.testing.assert_array_equal(mask.array[0], array)
