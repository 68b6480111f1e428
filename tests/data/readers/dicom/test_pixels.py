"""Pixels to values: bit depths, byte orders, compressions, padding; and what is odd about a file and said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from medim.data.index.rejection_codes import QUALITY_CODES
from medim.data.readers import DICOM, ReadError, read_volume
from medim.data.readers.dicom.header_scan import scan_header as walk
from medim.types import Modality
from tests.data.synthetic import dataset, enhanced, noise, save, scan, write_series, xray


def values(path: Path) -> np.ndarray[Any, Any]:
    """(rows, columns) of a slice with the axial orientation, as it is stored."""
    return read_volume(path).array[0, ::-1, ::-1, 0].T


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
    ids=lambda syntax: syntax.name,
)
def test_every_plain_syntax_gives_the_same_values(tmp_path: Path, syntax: pydicom.uid.UID) -> None:
    pixels = (noise(4, 6) - 300).astype(np.int16)
    made = dataset(pixels, EchoTime=4.6, RescaleSlope=2, RescaleIntercept=-5)
    if not syntax.is_little_endian:
        made.set_original_encoding(False, False)
        made.PixelData = pixels.astype(">i2").tobytes()
    made.file_meta.TransferSyntaxUID = syntax
    path = save(made, tmp_path / "a.dcm")
    np.testing.assert_array_equal(values(path), pixels * 2.0 - 5)
    plain = DICOM.inspect(save(dataset(pixels, EchoTime=4.6), tmp_path / "b.dcm")).instance
    seen = DICOM.inspect(path).instance
    assert plain is not None
    assert seen is not None
    assert (seen.frames, seen.origin.size) == (plain.frames, plain.origin.size)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda syntax: syntax.name)
def test_every_lossless_compression_gives_the_same_values(tmp_path: Path, syntax: pydicom.uid.UID) -> None:
    pixels = noise(64, 66).astype(np.uint16)
    made = dataset(pixels, BitsStored=10, HighBit=9)
    made.compress(syntax, generate_instance_uid=False)
    path = save(made, tmp_path / "a.dcm")
    np.testing.assert_array_equal(values(path), pixels)
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 9, len(whole) - 40):
        (tmp_path / "cut.dcm").write_bytes(whole[:cut])
        assert DICOM.inspect(tmp_path / "cut.dcm").rejected[0].reason == "truncated"


def test_a_deflated_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    made = dataset(noise(64, 64))
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    whole = save(made, tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReadError) as caught:
        read_volume(tmp_path / "a.dcm")
    assert caught.value.reason in {"unreadable", "undecodable"}


@pytest.mark.parametrize(
    ("stored", "high", "signed"), [(10, 9, False), (12, 15, False), (12, 13, True), (12, 11, True)]
)
def test_bits_are_taken_from_where_they_are_stored(tmp_path: Path, stored: int, high: int, signed: bool) -> None:
    pixels = (noise(4, 6) - 500 * signed).astype(np.int16)
    cells = ((pixels.astype(np.int64) & ((1 << stored) - 1)) << (high + 1 - stored)).astype(np.uint16)
    tags = {"BitsStored": stored, "HighBit": high, "PixelRepresentation": int(signed)}
    path = save(dataset(cells, **tags), tmp_path / "a.dcm")
    np.testing.assert_array_equal(values(path), pixels)


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (32, np.int32)])
def test_pixels_of_8_and_32_bits_are_read(tmp_path: Path, bits: int, dtype: Any) -> None:
    pixels = (noise(4, 6) % 251).astype(dtype)
    tags = {"BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1, "PixelData": pixels.tobytes()}
    path = save(dataset(pixels, PixelRepresentation=int(np.dtype(dtype).kind == "i"), **tags), tmp_path / "a.dcm")
    np.testing.assert_array_equal(values(path), pixels)


@pytest.mark.parametrize(
    "tags", [{"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}, {"BitsStored": 17, "HighBit": 16}]
)
def test_other_widths_are_refused(tmp_path: Path, tags: dict[str, Any]) -> None:
    path = save(dataset(noise(4, 6), **tags), tmp_path / "a.dcm")
    assert DICOM.inspect(path).rejected[0].reason == "bit-depth"


def test_a_lookup_table_is_applied_and_a_display_window_is_not(tmp_path: Path) -> None:
    pixels = (noise(4, 6) % 4).astype(np.uint16)
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = (
        [4, 0, 16],
        "US",
        np.array([5, 50, 500, 5000], np.uint16).tobytes(),
    )
    window = {"WindowCenter": 2, "WindowWidth": 1}
    path = save(dataset(pixels, ModalityLUTSequence=[table], **window), tmp_path / "a.dcm")
    np.testing.assert_array_equal(values(path), np.array([5.0, 50, 500, 5000])[pixels])


@pytest.mark.parametrize(
    ("padding", "limit", "hidden"), [(-2000, None, [-2000]), (-2000, -1990, [-2000, -1995, -1990]), (777, None, [])]
)
def test_padding_is_read_as_the_lowest_of_the_rest(
    tmp_path: Path, padding: int, limit: int | None, hidden: list[int]
) -> None:
    slices = (noise(2, 4, 6) % 500 + 7).astype(np.int16)
    padded = slices.copy()
    for k, value in enumerate(hidden):
        padded[k % 2, 0, k] = value
    paths = write_series(tmp_path, padded, PixelPaddingValue=padding, PixelPaddingRangeLimit=limit)
    expected = np.where(padded < 0, padded[padded > 0].min(), padded)
    array = DICOM.read_files(paths).array[0][::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(array, expected)


def test_a_header_that_announces_too_much_is_refused_before_its_pixels_are_touched(tmp_path: Path) -> None:
    path = save(dataset(noise(4, 6), Rows=60000, Columns=60000, NumberOfFrames=4), tmp_path / "a.dcm")
    assert DICOM.inspect(path).rejected[0].reason == "too-large"


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("size", [(32, 64), (64, 32), (128, 64)])
def test_compressed_pixels_of_another_size_are_refused(
    tmp_path: Path, syntax: pydicom.uid.UID, size: tuple[int, int]
) -> None:
    made = dataset(noise(64, 64))
    made.compress(syntax)
    made.Rows, made.Columns = size
    with pytest.raises(ReadError) as caught:
        read_volume(save(made, tmp_path / "b.dcm"))
    assert caught.value.reason == "undecodable"


def test_a_jpeg_of_another_size_or_depth_is_refused(tmp_path: Path, shared_data: Path) -> None:
    for change in ({"Rows": 512}, {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15}):
        made = pydicom.dcmread(shared_data / "xray-dicom" / "cr_jpeg_baseline.dcm")
        for name, value in change.items():
            setattr(made, name, value)
        with pytest.raises(ReadError) as caught:
            read_volume(save(made, tmp_path / "a.dcm"))
        assert caught.value.reason == "undecodable"


def test_more_pixels_than_announced_are_refused(tmp_path: Path) -> None:
    path = save(dataset(noise(4, 6), PixelData=bytes(4 * 6 * 2 + 12)), tmp_path / "a.dcm")
    assert DICOM.inspect(path).rejected[0].reason == "length-mismatch"


def mri(**tags: Any) -> Any:
    return dataset(noise(4, 6), **{"ImagePositionPatient": [1.0, 2.0, 3.0], **tags})


def overlaid() -> Any:
    made = mri()
    made.add_new(0x60020010, "US", 4)
    return made


ODD: dict[str, tuple[Modality, Any]] = {
    "derived": ("mri", lambda: mri(ImageType=["DERIVED", "SECONDARY", "MPR"])),
    "secondary-capture": ("xray", lambda: xray(noise(4, 6), SOPClassUID=SecondaryCaptureImageStorage)),
    "lossy": ("mri", lambda: mri(LossyImageCompression="01")),
    "inverted": ("xray", lambda: xray(noise(4, 6), PhotometricInterpretation="MONOCHROME1")),
    "for-processing": ("xray", lambda: xray(noise(4, 6), PresentationIntentType="FOR PROCESSING")),
    "padded": ("mri", lambda: mri(PixelPaddingValue=0)),
    "overlay-left-out": ("mri", overlaid),
    "detector-spacing": ("xray", lambda: xray(noise(4, 6), PixelSpacing=None, ImagerPixelSpacing=[0.2, 0.2])),
    "no-spacing": ("xray", lambda: xray(noise(4, 6), PixelSpacing=None)),
    "no-place": ("mri", lambda: mri(ImagePositionPatient=[0.0, 0.0, 7.0])),
    "single-slice": ("mri", mri),
}


@pytest.mark.parametrize("code", ODD)
def test_an_oddity_is_accepted_and_said(tmp_path: Path, code: str) -> None:
    modality, made = ODD[code]
    (image,) = scan(DICOM, [save(made(), tmp_path / "a.dcm")], modality)[0]
    expected = {code} | ({"single-slice"} if modality == "mri" else set())
    assert set(image.quality) == expected
    assert expected <= set(QUALITY_CODES)


def test_the_oddities_of_the_real_files_are_said(shared_data: Path) -> None:
    names = {
        "dicom-formats/emri_small.dcm": ("no-place",),
        "dicom-formats/MR2_J2KI.dcm": ("derived", "fewer-slices-than-numbered", "lossy", "single-slice"),
        "dicom-formats/MR-SIEMENS-DICOM-WithOverlays.dcm": ("derived", "overlay-left-out", "single-slice"),
        "dicom-formats/RG3_J2KI.dcm": ("derived", "inverted", "lossy", "no-spacing"),
        "xray-dicom/cr_jpeg_baseline.dcm": ("lossy", "secondary-capture"),
        "xray-dicom/test1.dcm": ("no-spacing", "secondary-capture"),
    }
    sights = {name: DICOM.inspect(shared_data / name).with_path(shared_data / name) for name in names}
    assert {name: DICOM.collect_images([sight], None)[0][0].quality for name, sight in sights.items()} == names
    crop = sorted((shared_data / "mri-dicom/Study1/13_HCropVolume").iterdir())
    assert scan(DICOM, crop, "mri")[0][0].quality == ("derived", "no-place")


def test_a_captured_slice_without_a_place_is_an_image_that_says_so(tmp_path: Path) -> None:
    place = {"ImagePositionPatient": None, "ImageOrientationPatient": None, "PixelSpacing": None}
    path = save(dataset(noise(4, 6), SOPClassUID=SecondaryCaptureImageStorage, **place), tmp_path / "a.dcm")
    (image,) = scan(DICOM, [path], "mri")[0]
    assert image.quality == ("no-place", "secondary-capture", "single-slice")
    assert read_volume(path).shape == (6, 4, 1)


def several_echoes(path: Path, *, spoil: bool = False) -> Path:
    """An enhanced object: two echoes of three slices, frame after frame."""
    positions = [[1.0, 2.0, 3.0 * (k // 2) + (9.0 if spoil and k == 4 else 0.0)] for k in range(6)]
    made = enhanced(noise(6, 4, 6), positions)
    for k, group in enumerate(made.PerFrameFunctionalGroupsSequence):
        echo = pydicom.Dataset()
        echo.EffectiveEchoTime = 2.5 if k % 2 == 0 else 5.0
        group.MREchoSequence = [echo]
    return save(made, path)


def test_the_echoes_of_a_multi_frame_object_are_images_of_their_own(tmp_path: Path) -> None:
    path = several_echoes(tmp_path / "a.dcm")
    found, refused = scan(DICOM, [path], "mri")
    assert [(image.item, image.shape, image.quality) for image in found] == [("0", (6, 4, 3), ()), ("1", (6, 4, 3), ())]
    assert refused == []
    frames = noise(6, 4, 6) * np.arange(1, 7)[:, None, None] + 100 * np.arange(6)[:, None, None]
    for echo in (0, 1):
        array = read_volume(f"{path}#{echo}").array[0][::-1, ::-1].transpose(2, 1, 0)
        np.testing.assert_allclose(array, frames[echo::2])
    for name, reason in ((path, "several-volumes"), (f"{path}#2", "no-such-item")):
        with pytest.raises(ReadError) as caught:
            read_volume(name)
        assert caught.value.reason == reason


def magnitude_and_phase(path: Path, level: str, name: str, values: tuple[Any, Any], summary: Any) -> Path:
    """An enhanced object of two parts of three slices, whose object or shared group summarises what its frames say."""
    made = enhanced(noise(6, 4, 6), [[1.0, 2.0, 3.0 * (k // 2)] for k in range(6)])
    sequence, keyword = name.split("/")
    for k, group in enumerate(made.PerFrameFunctionalGroupsSequence):
        own = pydicom.Dataset()
        setattr(own, keyword, values[k % 2])
        setattr(group, sequence, [own])
    if level == "object":
        setattr(made, {"FrameType": "ImageType", "EffectiveEchoTime": "EchoTime"}.get(keyword, keyword), summary)
    else:
        own = pydicom.Dataset()
        setattr(own, keyword, summary)
        setattr(made.SharedFunctionalGroupsSequence[0], sequence, [own])
    return save(made, path)


@pytest.mark.parametrize("level", ["object", "shared"])
@pytest.mark.parametrize(
    ("name", "values", "summary"),
    [
        ("MRImageFrameTypeSequence/ComplexImageComponent", ("MAGNITUDE", "PHASE"), "MIXED"),
        ("MRImageFrameTypeSequence/FrameType", (["ORIGINAL", "A"], ["ORIGINAL", "B"]), ["ORIGINAL", "MIXED"]),
        ("MREchoSequence/EffectiveEchoTime", (2.5, 5.0), 2.5),
        ("MRTimingAndRelatedParametersSequence/FlipAngle", (5.0, 9.0), 5.0),
        ("MRDiffusionSequence/DiffusionBValue", (50.0, 800.0), 50.0),
    ],
)
def test_what_a_frame_says_counts_before_its_object(
    tmp_path: Path, level: str, name: str, values: tuple[Any, Any], summary: Any
) -> None:
    path = magnitude_and_phase(tmp_path / "a.dcm", level, name, values, summary)
    keys = [frame.keys for frame in DICOM.inspect(path).instance.frames]  # type: ignore[union-attr]
    assert len(set(keys)) == 2
    assert [image.item for image in scan(DICOM, [path], "mri")[0]] == ["0", "1"]


def test_frames_that_nothing_tells_apart_are_volumes_by_their_order(tmp_path: Path) -> None:
    path = save(enhanced(noise(6, 4, 6), [[1.0, 2.0, 3.0 * (k // 2)] for k in range(6)]), tmp_path / "a.dcm")
    for made in (pydicom.dcmread(path),):
        for group in made.PerFrameFunctionalGroupsSequence:
            del group.PixelValueTransformationSequence
        made.save_as(path)
    assert [image.item for image in scan(DICOM, [path], "mri")[0]] == ["0", "1"]
    for item in (0, 1):
        array = read_volume(f"{path}#{item}").array[0][::-1, ::-1].transpose(2, 1, 0)
        np.testing.assert_array_equal(array, noise(6, 4, 6)[item::2])


@pytest.mark.parametrize(
    ("types", "reason", "quality"),
    [
        (["LOCALIZER"] * 3, "localizer", None),
        (["LOCALIZER", "NONE", "NONE"], None, ()),
        (["DERIVED", "NONE", "NONE"], None, ("derived",)),
    ],
)
def test_the_types_of_frames_count_beside_that_of_their_object(
    tmp_path: Path, types: list[str], reason: str | None, quality: tuple[str, ...] | None
) -> None:
    made = enhanced(noise(3, 4, 6), [[1.0, 2.0, 3.0 * k] for k in range(3)], ImageType=["MIXED", "PRIMARY"])
    for group, kind in zip(made.PerFrameFunctionalGroupsSequence, types, strict=True):
        own = pydicom.Dataset()
        own.FrameType = ["ORIGINAL", "PRIMARY", kind]
        group.MRImageFrameTypeSequence = [own]
    found, refused = scan(DICOM, [save(made, tmp_path / "a.dcm")], "mri")
    assert [image.quality for image in found] == ([] if quality is None else [quality])
    assert [one.reason for one in refused] == ([] if reason is None else [reason])


def test_frames_that_are_in_no_image_are_said(tmp_path: Path) -> None:
    path = several_echoes(tmp_path / "a.dcm", spoil=True)
    (image,) = scan(DICOM, [path], "mri")[0]
    assert image.quality == ("frames-left-out",)
    assert read_volume(path).shape == image.shape


def test_a_header_that_pydicom_would_complain_of_is_not_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    whole = save(dataset(noise(4, 6)), tmp_path / "a.dcm").read_bytes()
    for old, new in ((b"1.2.840.10008.5.1.4.1.1.4", b"1.2.840.10008&5.1.4.1.1.4"), (b"Chrisjen", b"Chr\xff\xfejen")):
        (tmp_path / "a.dcm").write_bytes(whole.replace(old, new))
        DICOM.inspect(tmp_path / "a.dcm")
    assert [str(warning.message) for warning in recwarn] == []
    assert caplog.text == ""


def test_the_walk_over_a_header_sees_what_pydicom_sees(shared_data: Path) -> None:
    keywords = ("Rows", "ImageType", "SOPInstanceUID", "PixelSpacing", "EchoTime", "PatientName", "BitsStored")
    for path in sorted((shared_data / "dicom-formats").iterdir()):
        header, known = walk(path, frozenset(keywords)).header, pydicom.dcmread(path, stop_before_pixels=True)
        for keyword in keywords:
            value = known.get(keyword)
            ours = header.numbers(keyword) if keyword in {"Rows", "PixelSpacing", "EchoTime", "BitsStored"} else None
            theirs = value if isinstance(value, pydicom.multival.MultiValue) else [value] * (value not in (None, ""))
            if ours is None:
                assert header.texts(keyword) == ([str(one) for one in theirs] if any(theirs) else [])
            else:
                assert ours == tuple(map(float, theirs))
