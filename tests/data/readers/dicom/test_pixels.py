"""Pixels to values: bit depths, byte orders, compressions, padding; and what is odd about a file and said so."""

from __future__ import annotations

import subprocess
import sys
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
    JPEGExtended12Bit,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    UID_dictionary,
)

from medim.data.index.rejection_codes import QUALITY_CODES
from medim.data.readers import DICOM, ReadError, read_volume
from medim.data.readers.dicom import codestreams
from medim.data.readers.dicom.header_scan import scan_header as walk
from medim.data.readers.dicom.pixels import decode_frames
from medim.data.readers.sandbox import DecodingLimits, sandboxed_decoding
from medim.doctor import run_checks
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


@pytest.mark.parametrize("tail", [b"\7" * 30, bytes(30), bytes(100), bytes(512)], ids=len)
def test_padding_after_the_pixels_is_accepted_and_said(tmp_path: Path, tail: bytes) -> None:
    for name, made in (("a", mri(PixelData=None)), ("b", xray(noise(4, 6), PixelData=None))):
        made.Rows, made.Columns, made.PixelData = 17, 19, noise(17, 19).astype(np.uint16).tobytes() + tail
        path = save(made, tmp_path / f"{name}.dcm")
        (image,) = scan(DICOM, [path], "mri" if name == "a" else "xray")[0]
        assert "bytes-after-pixels" in image.quality
        array = read_volume(path).array[0]
        np.testing.assert_array_equal(array[::-1, ::-1, 0].T if name == "a" else array, noise(17, 19))


@pytest.mark.parametrize("excess", [34, 38, 76, 514], ids=["a column", "a row", "two rows", "a block and more"])
def test_the_bytes_of_another_shape_are_no_padding(tmp_path: Path, excess: int) -> None:
    pixels = noise(17, 19).astype(np.uint16)
    path = save(xray(pixels, PixelData=pixels.tobytes() + bytes(excess)), tmp_path / "a.dcm")
    assert DICOM.inspect(path).rejected[0].reason == "length-mismatch"


@pytest.mark.parametrize("value", [[0, 0], [0.2, 0.0], [0.2], [-0.1, -0.1], "nonsense"], ids=str)
def test_an_x_ray_without_a_valid_spacing_is_read_without_one(tmp_path: Path, value: Any) -> None:
    made = xray(noise(4, 6), PixelSpacing=[1.0, 1.0])
    save(made, tmp_path / "a.dcm")
    old = b"1.0\\1.0 "
    text = value if isinstance(value, str) else "\\".join(map(str, value))
    raw = (tmp_path / "a.dcm").read_bytes()
    assert raw.count(old) == 1
    (tmp_path / "a.dcm").write_bytes(raw.replace(old, text[:8].encode().ljust(8)))
    (image,) = scan(DICOM, [tmp_path / "a.dcm"], "xray")[0]
    assert image.quality == ("no-spacing",)
    assert read_volume(tmp_path / "a.dcm").spacing == (1.0, 1.0)


def test_the_spacing_of_the_detector_stands_in_for_an_invalid_one(tmp_path: Path) -> None:
    path = save(xray(noise(4, 6), PixelSpacing=[0, 0], ImagerPixelSpacing=[0.2, 0.3]), tmp_path / "a.dcm")
    assert scan(DICOM, [path], "xray")[0][0].quality == ("detector-spacing",)
    assert read_volume(path).spacing == (0.2, 0.3)


@pytest.mark.parametrize(
    ("modality", "name"),
    [
        ("CR", "Computed Radiography Image Storage"),
        ("DX", "Digital X-Ray Image Storage - For Presentation"),
        ("RG", "Secondary Capture Image Storage"),
        ("MG", "Digital Mammography X-Ray Image Storage - For Presentation"),
        ("IO", "Digital Intra-Oral X-Ray Image Storage - For Presentation"),
        ("PX", "Digital X-Ray Image Storage - For Presentation"),
        ("RF", "X-Ray Radiofluoroscopic Image Storage"),
        ("XA", "X-Ray Angiographic Image Storage"),
    ],
)
def test_every_kind_of_x_ray_is_one_and_a_cine_is_none(tmp_path: Path, modality: str, name: str) -> None:
    sop_class = next(uid for uid, entry in UID_dictionary.items() if entry[0] == name)
    path = save(xray(noise(4, 6), Modality=modality, SOPClassUID=sop_class), tmp_path / "a.dcm")
    (image,) = scan(DICOM, [path], "xray")[0]
    assert image.sequence == modality
    path = save(xray(noise(3, 4, 6), Modality=modality, SOPClassUID=sop_class), tmp_path / "b.dcm")
    assert [one.reason for one in scan(DICOM, [path], "xray")[1]] == ["several-volumes"]


def compressed(path: Path, *options: str) -> Path:
    """Compress a DICOM file with GDCM's program, which python-gdcm brings."""
    program = Path(sys.executable).with_name("gdcmconv")
    if not program.exists():
        pytest.skip("gdcmconv is not installed: pip install python-gdcm")
    made = path.with_stem(f"{path.stem}-packed")
    subprocess.run([program, *options, path, made], check=True, capture_output=True)
    return made


@pytest.mark.parametrize("frames", [1, 3])
def test_jpeg_extended_of_12_bits_is_read(tmp_path: Path, frames: int) -> None:
    y, x = np.mgrid[:40, :48]
    pixels = (1000 + 20 * x + 15 * y + 300 * np.arange(frames)[:, None, None]).astype(np.uint16)
    tags = {"BitsStored": 12, "HighBit": 11, "RescaleSlope": 2, "RescaleIntercept": -100}
    plain = save(dataset(pixels if frames > 1 else pixels[0], **tags), tmp_path / "a.dcm")
    packed = compressed(plain, "--jpeg", "--lossy", "-q", "95")
    assert pydicom.dcmread(packed).file_meta.TransferSyntaxUID == JPEGExtended12Bit
    away = np.abs(decode_frames(packed) - (2.0 * pixels - 100))
    assert away.max() <= 18
    assert away.mean() < 4
    itk = pytest.importorskip("SimpleITK")
    theirs = itk.GetArrayFromImage(itk.ReadImage(str(packed)))
    np.testing.assert_array_equal(decode_frames(packed), theirs.reshape(frames, 40, 48))


def test_a_damaged_frame_of_jpeg_extended_costs_its_own_file_at_most(tmp_path: Path) -> None:
    y, x = np.mgrid[:40, :48]
    plain = save(dataset((1000 + 20 * x + 15 * y).astype(np.uint16), BitsStored=12, HighBit=11), tmp_path / "a.dcm")
    packed = compressed(plain, "--jpeg", "--lossy", "-q", "95")
    raw = packed.read_bytes()
    start = raw.index(b"\xff\xda") + 10
    packed.write_bytes(raw[: start - 40] + bytes(40) + raw[start:])
    with sandboxed_decoding(DecodingLimits()), pytest.raises(ReadError, match=r"undecodable|worker-died"):
        decode_frames(packed)


def test_a_compression_without_decoder_is_found_by_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:40, :48]
    plain = save(xray((x + y).astype(np.uint16), BitsStored=12, HighBit=11), tmp_path / "in" / "a.dcm")
    packed = compressed(plain, "--j2k")
    assert scan(DICOM, [packed], "xray")[1] == []
    raw = packed.read_bytes()
    packed.write_bytes(raw.replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.96"))  # no syntax of today
    (rejected,) = scan(DICOM, [packed], "xray")[1]
    assert (rejected.reason, "gdcmconv" in rejected.detail) == ("reader-missing", True)
    packed.write_bytes(raw)
    codestreams.check_codec.cache_clear()
    monkeypatch.setattr(codestreams, "DECODER_PLUGINS", {"1.2.840.10008.1.2.4.90": "absent"})
    (rejected,) = scan(DICOM, [packed], "xray")[1]
    assert (rejected.reason, "pip install" in rejected.detail) == ("reader-missing", True)
    codestreams.check_codec.cache_clear()


def test_doctor_decodes_jpeg_extended(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "DICOM JPEG Extended (Process 2 and 4)"
    assert {check.name: check.ok for check in run_checks()}[name]
    monkeypatch.setattr(codestreams, "decode_extended_jpeg", lambda *args, **options: np.zeros((8, 8)))
    (check,) = (check for check in run_checks() if check.name == name)
    assert (check.ok, "python-gdcm" in check.remedy) == (False, True)


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
