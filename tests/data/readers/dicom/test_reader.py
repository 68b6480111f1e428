"""DICOM: what a volume is made of, checked against SimpleITK and against geometry known from writing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import ImplicitVRLittleEndian, RawDataStorage, SecondaryCaptureImageStorage
from scipy.ndimage import zoom

from medim.data.readers import DICOM, ReadError, read_volume
from medim.data.readers.base import LPS_TO_RAS
from medim.data.readers.dicom.pixels import decode_frames
from medim.data.readers.dicom.stack import stack_frames
from medim.data.readers.inspection import FramePlane
from medim.privacy import identity_tokens
from medim.types import Volume
from tests.data.synthetic import AXIAL, dataset, enhanced, noise, save, scan, write_series, xray

OBLIQUE = (0.991332, 0.114987, -0.063548, -0.118794, 0.991118, -0.059771)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
SERIES = (
    "Study1/13_HCropVolume",
    "Study1/36459-FLAIRreg-76244",
    "Study1/37916-T2reg-88910",
    "Study2/14-T1post-22014",
    "Study2/14_HCropVolume",
)


def by_simple_itk(folder: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Voxels (i, j, k) and the RAS affine of a series, as SimpleITK has them."""
    sitk: Any = pytest.importorskip("SimpleITK")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0).astype(np.float32), LPS_TO_RAS @ affine


@pytest.mark.parametrize("series", SERIES)
def test_a_real_series_lies_where_dcm2niix_has_it(shared_data: Path, tmp_path: Path, series: str) -> None:
    program = Path(sys.executable).with_name("dcm2niix")
    if not program.exists():
        pytest.skip("dcm2niix is not installed: pip install dcm2niix")
    command = [program, "-b", "n", "-z", "n", "-f", "out", "-o", tmp_path, shared_data / "mri-dicom" / series]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = tmp_path.glob("*.nii")
    ours, theirs = read_volume(shared_data / "mri-dicom" / series), read_volume(made)
    assert ours.shape == theirs.shape
    away = np.abs(corners(ours.affine, ours.shape) - corners(theirs.affine, ours.shape)).max()
    assert away < 2e-3  # it believes the header's SpacingBetweenSlices, we and ITK the positions: 1.6e-3 in 22 slices
    np.testing.assert_array_equal(ours.array, theirs.array)


def corners(affine: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    indices = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    return (affine[:3, :3] @ indices + affine[:3, 3:]).T


def agrees_with_simple_itk(folder: Path) -> Volume:
    volume = read_volume(folder)
    array, affine = by_simple_itk(folder)
    assert volume.native_shape == array.shape
    assert np.abs(corners(volume.native_affine, array.shape) - corners(affine, array.shape)).max() < 1e-3
    back = np.linalg.inv(volume.affine) @ volume.native_affine  # native index to ours: whole numbers only
    index = np.rint(np.array([[0, 0, 0, 1], [1, 2, 3, 1], [3, 1, 0, 1]]) @ back.T).astype(int)
    for native, ours in zip([(0, 0, 0), (1, 2, 3), (3, 1, 0)], index, strict=True):
        assert volume.array[(0, *ours[:3])] == array[native]
    assert volume.array.sum(dtype=np.float64) == pytest.approx(array.sum(dtype=np.float64))
    return volume


@pytest.mark.parametrize("series", SERIES)
def test_a_real_series_lies_where_simple_itk_has_it(shared_data: Path, series: str) -> None:
    volume = agrees_with_simple_itk(shared_data / "mri-dicom" / series)
    assert (np.abs(np.diag(volume.affine)[:3]) > 0.9 * np.array(volume.spacing)).all()
    assert (np.diag(volume.affine)[:3] > 0).all()


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE, (-1.0, 0, 0, 0, 0, 1.0)])
def test_a_series_of_unequal_pixels_lies_where_simple_itk_has_it(
    tmp_path: Path, orientation: tuple[float, ...]
) -> None:
    tags = {"ImageOrientationPatient": list(orientation), "PixelSpacing": [0.4, 0.9]}
    write_series(tmp_path, noise(6, 5, 7), gap=3.3, order=[3, 1, 5, 0, 4, 2], **tags)
    volume = agrees_with_simple_itk(tmp_path)
    assert sorted(volume.spacing) == pytest.approx([0.4, 0.9, 3.3])


def test_the_real_crops_lie_as_the_training_crops_do(shared_data: Path) -> None:
    shape = (36, 48, 34)

    def fitted(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        resized = zoom(array, [s / n for s, n in zip(shape, array.shape, strict=True)], order=1)
        return (resized - resized.mean()) / resized.std()

    paths = sorted((shared_data / "mri-hippocampus" / "imagesTr").iterdir())
    mean = np.mean([fitted(read_volume(path).array[0]) for path in paths], axis=0).ravel()
    for series, low, high in ((SERIES[0], 0.64, 0.70), (SERIES[4], 0.70, 0.80)):
        crop = read_volume(shared_data / "mri-dicom" / series).array[0]
        assert low <= np.corrcoef(fitted(crop).ravel(), mean)[0, 1] <= high
        assert np.corrcoef(fitted(crop[::-1, ::-1]).ravel(), mean)[0, 1] < 0.3  # LPS taken for RAS


def test_axes_run_to_right_anterior_superior(tmp_path: Path) -> None:
    slices = np.zeros((3, 4, 5), np.uint16)
    slices[2, 0, 1] = 1000  # LPS axial: highest slice, most anterior row, second column from the right
    write_series(tmp_path, slices)
    volume = read_volume(tmp_path)
    assert np.argwhere(volume.array[0] == 1000).tolist() == [[3, 3, 2]]
    assert volume.shape == (5, 4, 3)
    assert volume.spacing == (1.0, 1.0, 2.0)


def test_slices_are_ordered_by_place_and_not_by_name(tmp_path: Path) -> None:
    slices = noise(5, 4, 6)
    write_series(tmp_path / "a", slices)
    write_series(tmp_path / "b", slices, order=[2, 4, 0, 3, 1])
    one, other = read_volume(tmp_path / "a"), read_volume(tmp_path / "b")
    np.testing.assert_array_equal(one.array, other.array)
    np.testing.assert_array_equal(one.affine, other.affine)


def test_orientations_that_differ_by_rounding_are_one(tmp_path: Path) -> None:
    other = [AXIAL[0], 1e-7, 0.0, 0.0, 1.0, 1e-7]
    write_series(tmp_path, each=[{}, {"ImageOrientationPatient": other}])
    assert read_volume(tmp_path).shape == (6, 4, 5)


def test_one_slice_is_a_volume_of_depth_one(tmp_path: Path) -> None:
    path = save(dataset(noise(4, 6), SliceThickness=5.0), tmp_path / "a.dcm")
    volume = read_volume(path)
    assert volume.shape == (6, 4, 1)
    assert volume.spacing == (1.0, 1.0, 5.0)


def test_slope_and_intercept_are_applied_slice_by_slice(tmp_path: Path) -> None:
    slices = noise(2, 4, 6)
    each = [{"RescaleSlope": 2, "RescaleIntercept": -5}, {"RescaleSlope": 0.5, "RescaleIntercept": 7}]
    write_series(tmp_path, slices, each=each)
    array = read_volume(tmp_path).array[0][::-1, ::-1].transpose(2, 1, 0)  # back to (slice, row, column)
    np.testing.assert_allclose(array[0], slices[0] * 2 - 5)
    np.testing.assert_allclose(array[1], slices[1] * 0.5 + 7)


def test_negative_values_stay_negative(tmp_path: Path) -> None:
    pixels = (noise(4, 6) - 500).astype(np.int16)
    tags = {"BitsStored": 12, "HighBit": 11}
    volume = read_volume(save(dataset(pixels, **tags), tmp_path / "a.dcm"))
    assert volume.array.min() == pixels.min()
    assert volume.array.max() == pixels.max()


def test_an_overlay_in_the_high_bits_is_left_out(tmp_path: Path) -> None:
    pixels = noise(4, 6).astype(np.uint16)
    drawn = pixels | np.where(noise(4, 6, seed=1) > 500, 1 << 15, 0).astype(np.uint16)
    tags = {"BitsStored": 12, "HighBit": 11}
    plain = read_volume(save(dataset(pixels, **tags), tmp_path / "a.dcm"))
    np.testing.assert_array_equal(read_volume(save(dataset(drawn, **tags), tmp_path / "b.dcm")).array, plain.array)


def test_frames_of_an_enhanced_object_are_read_by_their_own_geometry(tmp_path: Path) -> None:
    frames = noise(3, 4, 6)
    positions = [[1.0, 2.0, 9.0], [1.0, 2.0, 3.0], [1.0, 2.0, 6.0]]
    volume = read_volume(save(enhanced(frames, positions), tmp_path / "a.dcm"))
    assert volume.native_shape == (6, 4, 3)
    assert volume.spacing == pytest.approx((0.8, 0.5, 3.0))
    np.testing.assert_allclose(volume.native_affine[:3, 3], [-1.0, -2.0, 3.0])
    lowest = frames[1] * 2 + 100  # the second frame, with its own slope and intercept
    np.testing.assert_allclose(volume.array[0, ::-1, ::-1, 0].T, lowest)


def test_real_multi_frame_is_the_same_in_both_transfer_syntaxes(shared_data: Path) -> None:
    plain = read_volume(shared_data / "dicom-formats" / "emri_small.dcm")
    packed = read_volume(shared_data / "dicom-formats" / "emri_small_jpeg_ls_lossless.dcm")
    np.testing.assert_array_equal(plain.array, packed.array)
    assert plain.shape == (64, 64, 10)
    assert plain.spacing == pytest.approx((1.0, 1.0, 1.2))


def test_monochrome1_is_inverted(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "dicom-formats" / "RG3_J2KI.dcm"
    stored = pydicom.dcmread(path).pixel_array.astype(np.float32)
    volume = read_volume(path)
    assert volume.spatial_dims == 2
    assert np.corrcoef(stored.ravel(), volume.array.ravel())[0, 1] == pytest.approx(-1.0)
    pixels = noise(4, 6).astype(np.uint16)
    tags = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 10, "HighBit": 9}
    scale = {"RescaleSlope": 2, "RescaleIntercept": 1}
    inverted = read_volume(save(xray(pixels, **tags, **scale), tmp_path / "a.dcm")).array[0]
    np.testing.assert_array_equal(inverted, (1023.0 - pixels) * 2 + 1)


def test_an_xray_is_rows_by_columns_with_its_spacing(tmp_path: Path) -> None:
    pixels = noise(4, 6)
    volume = read_volume(save(xray(pixels, PixelSpacing=None, ImagerPixelSpacing=[0.2, 0.3]), tmp_path / "a.dcm"))
    np.testing.assert_array_equal(volume.array[0], pixels)
    assert volume.spacing == (0.2, 0.3)


@pytest.mark.parametrize("name", ["cr_jpeg_baseline", "test1", "test2", "test3"])
def test_a_real_xray_is_read(shared_data: Path, name: str) -> None:
    volume = read_volume(shared_data / "xray-dicom" / f"{name}.dcm")
    assert volume.array.shape == (1, 1024, 1024)
    assert volume.array.std() > 10


def without(name: str) -> dict[str, Any]:
    return {"each": [{name: None}] * 5}


SPOILT: dict[str, tuple[str, dict[str, Any]]] = {
    "a slice is missing": ("missing-slices", {"positions": [[0, 0, z] for z in (0.0, 2.0, 4.0, 8.0, 10.0)]}),
    "uneven gaps": ("uneven-gaps", {"positions": [[0, 0, z] for z in (0.0, 2.0, 4.0, 7.0, 9.0)]}),
    "two slices in one place": ("duplicate-position", {"positions": [[0, 0, z] for z in (0.0, 2.0, 2.0, 4.0, 6.0)]}),
    "a tilted slice": ("mixed-orientation", {"each": [{}, {"ImageOrientationPatient": list(OBLIQUE)}]}),
    "a sheared stack": ("sheared", {"positions": [[0.5 * k, 0, 2.0 * k] for k in range(5)]}),
    "a slice aside": ("sheared", {"positions": [[3.0 * (k == 2), 0, 2.0 * k] for k in range(5)]}),
    "other pixels": ("mixed-spacing", {"each": [{}, {"PixelSpacing": [1.5, 1.0]}]}),
    "no position": ("no-geometry", without("ImagePositionPatient")),
    "no orientation": ("no-geometry", without("ImageOrientationPatient")),
    "no spacing": ("no-geometry", without("PixelSpacing")),
    "spacing of zero": ("bad-geometry", {"PixelSpacing": [0.0, 1.0]}),
    "a direction of zero": ("bad-geometry", {"ImageOrientationPatient": [1.0, 0, 0, 1.0, 0, 0]}),
    "another modality": ("wrong-modality", {"Modality": "CT"}),
    "raw data": ("not-an-image", {"SOPClassUID": RawDataStorage}),
    "no rows": ("not-an-image", {"Rows": None}),
    "colour": ("colour", {"PhotometricInterpretation": "RGB"}),
    "burned in": ("burned-in", {"BurnedInAnnotation": "YES"}),
    "localizer": ("localizer", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
    "mosaic": ("mosaic", {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}),
    "screen save": ("screen-save", {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"], "Modality": "MR"}),
    "cut pixels": ("truncated", {"PixelData": b"\0" * 20}),
    "no pixels": ("no-pixels", {"PixelData": None}),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_series_that_is_no_image_is_refused_with_its_reason(tmp_path: Path, what: str) -> None:
    reason, tags = SPOILT[what]
    write_series(tmp_path, **tags)
    with pytest.raises(ReadError) as caught:
        read_volume(tmp_path)
    assert caught.value.reason == reason
    found, refused = scan(DICOM, sorted(tmp_path.iterdir()), "mri")
    assert found == []
    assert {one.reason for one in refused} == {reason}


def test_a_scan_that_was_cut_short_is_no_volume_beside_the_whole_ones(tmp_path: Path) -> None:
    places = [[10.0, 20.0, 30.0 + 2 * k] for k in (*range(4), *range(4), *range(2))]
    each = [{"TemporalPositionIdentifier": 1 + k // 4} for k in range(10)]
    write_series(tmp_path, noise(10, 4, 6), positions=places, each=each)
    found, refused = scan(DICOM, sorted(tmp_path.iterdir()), "mri")
    assert [image.shape[2] for image in found] == [4, 4]
    assert [one.reason for one in refused] == ["missing-slices"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"RescaleSlope": 2}, (2, 0)),
        ({"RescaleIntercept": -5}, (1, -5)),
        ({"RescaleSlope": 2, "RescaleIntercept": -5}, (2, -5)),
    ],
)
def test_a_slope_without_an_intercept_counts_and_the_other_way_round(
    tmp_path: Path, tags: dict[str, Any], expected: tuple[int, int]
) -> None:
    pixels = noise(4, 6)
    path = save(dataset(pixels, **tags), tmp_path / "a.dcm")
    slope, intercept = expected
    np.testing.assert_allclose(decode_frames(path)[0], pixels.astype(float) * slope + intercept)


def test_slices_of_two_patients_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path, noise(3, 4, 6), each=[{}, {}, {"PatientID": "another"}])
    with pytest.raises(ReadError, match="several patients") as caught:
        read_volume(tmp_path)
    assert caught.value.reason == "mixed-references"
    found, refused = scan(DICOM, sorted(tmp_path.iterdir()), "mri")
    assert found == []
    assert {one.reason for one in refused} == {"mixed-references"}


def test_slices_of_two_sizes_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path, noise(2, 4, 6))
    save(dataset(noise(4, 7), ImagePositionPatient=[10.0, 20.0, 34.0]), tmp_path / "z.dcm")
    with pytest.raises(ReadError, match="rows or columns") as caught:
        read_volume(tmp_path)
    assert caught.value.reason == "mixed-size"


def test_several_frames_are_no_xray(tmp_path: Path) -> None:
    path = save(xray(noise(2, 4, 6)), tmp_path / "a.dcm")
    assert scan(DICOM, [path], "xray")[1][0].reason == "several-volumes"
    with pytest.raises(ReadError, match="2 frames"):
        read_volume(path)


def test_a_copy_is_told_from_a_contradiction(tmp_path: Path) -> None:
    pixels = noise(4, 6)
    for name, drawn in (("a", pixels), ("b", pixels), ("c", pixels[::-1])):
        save(xray(drawn, SOPInstanceUID="1.2.3.4", ImageComments=name), tmp_path / f"{name}.dcm")
    found, refused = scan(DICOM, sorted(tmp_path.iterdir()), "xray")
    assert [image.files[0].name for image in found] == ["a.dcm"]
    assert [(one.path.name, one.reason) for one in refused] == [
        ("b.dcm", "duplicate"),
        ("c.dcm", "conflicting-duplicate"),
    ]


def test_two_series_in_a_folder_are_two_images_and_no_volume(tmp_path: Path) -> None:
    write_series(tmp_path)
    for path in write_series(tmp_path / "more", SeriesInstanceUID="1.2.3"):
        path.rename(tmp_path / f"more{path.name}")
    found, refused = scan(DICOM, [path for path in tmp_path.iterdir() if path.is_file()], "mri")
    assert [len(image.files) for image in found] == [5, 5]
    assert refused == []
    with pytest.raises(ReadError, match="2 images") as caught:
        read_volume(tmp_path)
    assert caught.value.reason == "several-series"


def test_a_folder_without_dicom_holds_no_series(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ReadError, match=r"\[no-image\]"):
        read_volume(tmp_path)


def test_pixels_that_cannot_be_decoded_are_refused(tmp_path: Path, shared_data: Path) -> None:
    whole = (shared_data / "dicom-formats" / "MR2_J2KI.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReadError) as caught:
        read_volume(tmp_path / "cut.dcm")
    assert caught.value.reason == "truncated"
    start = whole.index(b"\xff\x4f\xff\x51")  # of the codestream
    (tmp_path / "spoilt.dcm").write_bytes(whole[: start + 4] + bytes(40) + whole[start + 44 :])
    assert DICOM.inspect(tmp_path / "spoilt.dcm").instance
    with pytest.raises(ReadError) as caught:
        read_volume(tmp_path / "spoilt.dcm")
    assert caught.value.reason == "undecodable"


def test_a_file_without_preamble_and_suffix_is_known(tmp_path: Path) -> None:
    made = dataset(noise(4, 6))
    made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    save(made, tmp_path / "IM1")
    raw = (tmp_path / "IM1").read_bytes()
    start = raw.find(b"\x08\x00\x08\x00")  # ImageType, the first attribute after the preamble and its group
    (tmp_path / "IM1").write_bytes(raw[start:])
    assert DICOM.accepts(tmp_path / "IM1")
    assert read_volume(tmp_path / "IM1").shape == (6, 4, 1)


def test_secondary_capture_of_an_xray_is_an_xray(tmp_path: Path) -> None:
    path = save(xray(noise(4, 6), SOPClassUID=SecondaryCaptureImageStorage, Modality="CR"), tmp_path / "a.dcm")
    assert len(scan(DICOM, [path], "xray")[0]) == 1


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations(range(6)),
    axes=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
    gap=st.floats(0.3, 9.0),
    origin=st.tuples(*[st.floats(-200, 200)] * 3),
)
def test_a_stack_is_the_same_whatever_the_order_of_its_frames(
    order: list[int], axes: list[int], signs: tuple[float, ...], gap: float, origin: tuple[float, ...]
) -> None:
    row, column = np.eye(3)[axes[0]] * signs[0], np.eye(3)[axes[1]] * signs[1]
    normal = np.cross(row, column)
    places = [np.array(origin) + normal * gap * k for k in range(6)]
    frames = [
        FramePlane(
            position=tuple(places[k]),
            orientation=(*row, *column),
            spacing=(0.5, 0.7),
            size=(4, 4),
            thickness=gap,
            keys=(),
        )
        for k in order
    ]
    one = stack_frames(frames)
    affine = one.affine
    assert [order[place] for place in one.order] == list(range(6))
    np.testing.assert_allclose(affine[:3, 2], normal * gap, atol=1e-9)
    np.testing.assert_allclose(affine @ [2, 3, 4, 1], [*(places[4] + row * 2 * 0.7 + column * 3 * 0.5), 1], atol=1e-9)


def test_names_in_japanese_are_identities(tmp_path: Path) -> None:
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    files = write_series(tmp_path / "s", SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=name)
    (image,) = scan(DICOM, files, "mri")[0]
    assert identity_tokens(["山田太郎", "太郎"]) <= image.identities


def test_other_numbers_and_names_of_a_patient_are_identities(tmp_path: Path) -> None:
    other = pydicom.Dataset()
    other.PatientID = "MRN778899"
    said = {"ClinicalTrialSubjectID": "CTS-5566", "ContentCreatorName": "Meier^Ida", "AdmittingDate": "20200102"}
    files = write_series(tmp_path / "s", OtherPatientIDsSequence=[other], **said)
    known = DICOM.inspect(files[0]).with_path(files[0]).instance
    assert known is not None
    assert identity_tokens(["MRN778899", "CTS-5566", "Meier", "20200102"]) <= known.identities


def test_a_lossy_transfer_syntax_is_told_where_the_header_is_silent(tmp_path: Path) -> None:
    made = xray(noise(4, 6).astype(np.uint8), BitsAllocated=8, BitsStored=8, HighBit=7)
    made.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    made["PixelData"].is_undefined_length = True
    made.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    seen = DICOM.inspect(save(made, tmp_path / "a.dcm")).instance
    assert seen is not None
    assert "lossy" in seen.origin.quality
