from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.datadict import dictionary_VR

from medim.data.index.index import AllRejectedError, build_index
from medim.data.readers import ReadError
from medim.data.readers.dicom.reader import SlicePlan
from medim.inference.network import Predictor
from medim.inference.ood import OODResult
from medim.package.label_codes import LabelCode
from medim.package.package import Package
from medim.predict.dicom import source as headers
from medim.predict.dicom.equipment import Equipment
from medim.predict.dicom.segmentation import _describe_segment, read_frame_labels
from medim.predict.dicom.source import COPIED_KEYWORDS, TYPE_2, DicomSource, read_dicom_source
from medim.predict.dicom.structured_report import (
    build_probabilities_report,
    build_volumes_report,
    format_operating_point,
)
from medim.predict.dicom.writer import save_dicom, segmentation_of
from medim.predict.predict import predict
from medim.tasks.segmentation import class_sizes
from medim.types import Array, UsageError, UserError, Volume
from tests.data.readers.test_sandbox import bomb
from tests.data.synthetic import dataset, enhanced, noise, write_series, xray
from tests.data.synthetic import save as write_dataset
from tests.export.checkers import dciodvfy_errors
from tests.predict.test_predict import rows_of

SERIES = {
    "crop 1": "Study1/13_HCropVolume",
    "crop 2": "Study2/14_HCropVolume",
    "T2": "Study1/37916-T2reg-88910",
    "FLAIR": "Study1/36459-FLAIRreg-76244",
}


@pytest.fixture
def equipment(packages: dict[str, Package]) -> Equipment:
    return Equipment(packages["segmenter"].contract, packages["segmenter"].sha256)


def opened(place: Path) -> tuple[Volume, DicomSource]:
    """The one image of a folder, and its headers."""
    index = build_index(place, "mri", remember=False)
    plan = index.plan_slices(index.records[0])
    assert plan is not None
    return index.open(index.records[0]), read_dicom_source(plan)


def test_a_deflated_bomb_is_not_inflated_for_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SlicePlan(((bomb(tmp_path / "bomb.dcm", 1), 0),), (4, 6), (1.0, 1.0), None)
    monkeypatch.setattr(headers, "MAX_INFLATED_BYTES", 1 << 26)
    with pytest.raises(ReadError) as raised:
        read_dicom_source(plan)
    assert raised.value.reason == "too-large"


def levels(values: Array, low: float, high: float) -> Array:
    """A mask: 1 above low, 2 above high."""
    return (values > low).astype(np.uint8) + (values > high)


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("labelmap", [False, True])
def test_each_frame_of_a_real_series_has_the_labels_of_its_own_pixels(
    name: str, labelmap: bool, shared_data: Path, equipment: Equipment, tmp_path: Path
) -> None:
    volume, source = opened(shared_data / "mri-dicom" / SERIES[name])
    low, high = (float(np.percentile(volume.array, p)) + 0.5 for p in (90, 97))
    labels = levels(volume.array[0], low, high)
    made = segmentation_of(labels, volume, source, equipment, labelmap=labelmap)
    save_dicom(tmp_path / "a.seg.dcm", made)

    found = highdicom.seg.segread(tmp_path / "a.seg.dcm")
    frames = read_frame_labels(found, source)
    for frame, header in zip(frames, source.datasets, strict=True):
        image = pydicom.dcmread(str(header.filename))
        slope, intercept = float(image.get("RescaleSlope", 1)), float(image.get("RescaleIntercept", 0))
        values = np.float32(image.pixel_array * slope + intercept)
        np.testing.assert_array_equal(frame, levels(values, low, high))
    assert {int(label) for label in np.unique(frames)} == {0, 1, 2}
    told = build_volumes_report(made, class_sizes(labels, volume, 2), source, equipment)
    save_dicom(tmp_path / "a.sr.dcm", told)
    if not labelmap:  # the checker is older than that SOP class
        assert dciodvfy_errors(tmp_path / "a.seg.dcm", tmp_path / "a.sr.dcm") == []


PLANES = {
    "axial": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    "sagittal": ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
    "coronal": ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
}
FLIPS = list(itertools.product((1, -1), repeat=2))
POINTS = {(1, 2, 3): 900, (4, 0, 7): 900, (2, 4, 1): 500}  # slice, row, column


@pytest.mark.parametrize("backwards", [False, True], ids=["", "stacked backwards"])
@pytest.mark.parametrize("flip", FLIPS)
@pytest.mark.parametrize("plane", PLANES)
def test_labels_land_on_the_right_points_of_the_world(
    plane: str, flip: tuple[int, int], backwards: bool, equipment: Equipment, tmp_path: Path
) -> None:
    row, column = (sign * np.array(axis) for sign, axis in zip(flip, PLANES[plane], strict=True))
    slices = np.zeros((6, 5, 8), np.uint16)
    for point, value in POINTS.items():
        slices[point] = value
    spacing, gap, origin = (0.9, 0.4), -2.5 if backwards else 2.5, np.array([12.0, -30.0, 7.5])
    normal = np.cross(row, column)
    places = [list(origin + normal * gap * k) for k in range(len(slices))]
    tags = {"ImageOrientationPatient": [*row, *column], "PixelSpacing": list(spacing), "FrameOfReferenceUID": "1.2.3"}
    write_series(tmp_path / "in", slices, positions=places, order=[3, 0, 5, 1, 4, 2], **tags)
    volume, source = opened(tmp_path / "in")

    made = segmentation_of(levels(volume.array[0], 400, 700), volume, source, equipment, labelmap=False)
    save_dicom(tmp_path / "a.seg.dcm", made)

    found = pydicom.dcmread(tmp_path / "a.seg.dcm")
    shared = found.SharedFunctionalGroupsSequence[0]
    axes = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    between = [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing]
    points = set()
    for frame, group in zip(found.pixel_array, found.PerFrameFunctionalGroupsSequence, strict=True):
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        corner = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        for r, c in np.argwhere(frame):
            place = corner + axes[0] * c * between[1] + axes[1] * r * between[0]
            points.add((number, *np.round(place, 3).tolist()))
    wanted = set()
    for (k, r, c), value in POINTS.items():
        place = origin + normal * gap * k + row * c * spacing[1] + column * r * spacing[0]
        wanted.add((2 if value > 700 else 1, *np.round(place, 3).tolist()))
    assert points == wanted


def answered(package: Package, source: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    return predict(package, source, out, output_format="dicom", **options)


def test_a_series_gets_a_segmentation_and_a_report_that_refer_to_it(
    packages: dict[str, Package], shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "mri-dicom" / "Study1" / "13_HCropVolume"
    (row,) = answered(packages["segmenter"], folder, tmp_path)
    assert list(row)[:-4] == ["image", "file", "report", "ml_anterior", "ml_posterior"]
    assert list(row)[-4:] == ["ood_score", "ood", "ood_feature_group", "ood_reason"]
    assert [cells["file"] for cells in rows_of(tmp_path / "predictions.csv")] == [row["file"]]
    seg, report = (pydicom.dcmread(tmp_path / row[name]) for name in ("file", "report"))
    source = pydicom.dcmread(next(folder.glob("*.dcm")))
    instances = {pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in folder.glob("*.dcm")}

    assert seg.SegmentationType == "BINARY"
    for made in (seg, report):
        assert made.StudyInstanceUID == source.StudyInstanceUID
        assert made.SeriesInstanceUID != source.SeriesInstanceUID
        assert made.SeriesDescription == "AI mri-segmenter 0.1.0 research"
        assert made.DeviceSerialNumber == packages["segmenter"].sha256
        assert all(keyword in made for keyword in TYPE_2)
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert seg.SeriesInstanceUID != report.SeriesInstanceUID
    (referred,) = seg.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == source.SeriesInstanceUID
    assert {item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence} == instances
    for group in seg.PerFrameFunctionalGroupsSequence:
        (image,) = group.DerivationImageSequence[0].SourceImageSequence
        assert image.ReferencedSOPInstanceUID in instances
    assert seg.pixel_array.any(axis=(1, 2)).all()  # empty frames are left out
    segment = seg.SegmentSequence[0]
    kind = segment.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodeMeaning) == ("5366008", "Hippocampus")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "255549009"
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "0.1.0"

    groups = highdicom.sr.srread(tmp_path / row["report"]).content.get_volumetric_roi_measurement_groups()
    for group, name in zip(groups, ("anterior", "posterior"), strict=True):
        (measured,) = group.get_measurements()
        np.testing.assert_allclose(measured.value, row[f"ml_{name}"] * 1000, atol=1e-3)
        assert group.tracking_identifier == name
        assert group.referenced_segment.referenced_sop_instance_uid == seg.SOPInstanceUID
    assert dciodvfy_errors(tmp_path / row["file"], tmp_path / row["report"]) == []


def test_an_answer_holds_no_more_of_a_patient_than_the_image_does(packages: dict[str, Package], tmp_path: Path) -> None:
    tags = {
        "FrameOfReferenceUID": "1.2.3",
        "InstitutionName": "Tycho Station",
        "OperatorsName": "Nagata^Naomi",
        "PatientAge": "62",  # DICOM wants 062Y
        "PatientSex": "X",
        "StudyDate": "1999",
        "SpecificCharacterSet": "ISO_IR 100",
        "PatientName": "Müller^Jürgen",
    }
    write_series(tmp_path / "in", noise(6, 16, 20).astype(np.uint16), **tags)
    (row,) = answered(packages["segmenter"], tmp_path / "in", tmp_path / "out")
    source = pydicom.dcmread(next((tmp_path / "in").glob("*.dcm")))
    for name in ("file", "report"):
        path = tmp_path / "out" / row[name]
        made = pydicom.dcmread(path)
        assert str(made.PatientName) == "Müller^Jürgen"
        assert made.SpecificCharacterSet == "ISO_IR 192"
        assert (made.PatientSex, made.StudyDate) == ("", "")
        for element in made:
            if element.tag.group == 0x0010 and element.value:
                assert str(element.value) == str(source[element.tag].value)
        whole = path.read_bytes()
        assert b"Tycho" not in whole
        assert b"Nagata" not in whole
        assert "PatientAge" not in made
    assert dciodvfy_errors(*(tmp_path / "out" / row[name] for name in ("file", "report"))) == []


def list_attributes(dataset: pydicom.Dataset) -> Iterator[pydicom.DataElement]:
    """List the elements of all levels of a dataset."""
    for element in dataset:
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from list_attributes(item)


def fill_modules(*modules: str) -> dict[str, str]:
    """Make a text of its own for each text attribute of DICOM modules."""
    table = json.loads((Path(highdicom.__file__).parent / "_standard" / "module_attribute_map.json").read_text())
    keywords = [row["keyword"] for module in modules for row in table[module] if not row["path"]]
    texts = {"LO", "SH", "PN", "ST", "LT", "UT", "UC"}
    return {
        keyword: f"Zq{number}x"
        for number, keyword in enumerate(keywords)
        if dictionary_VR(keyword) in texts and keyword != "PatientID"
    }


@pytest.mark.parametrize("enhanced_source", [False, True])
def test_an_answer_holds_no_attribute_of_patient_study_or_scanner_besides_the_documented_ones(
    packages: dict[str, Package], tmp_path: Path, enhanced_source: bool
) -> None:
    modules = ("patient", "general-study", "patient-study", "general-equipment", "clinical-trial-subject")
    tags = {**fill_modules(*modules, "clinical-trial-study", "general-series"), "FrameOfReferenceUID": "1.2.3"}
    tags |= {"OperatorsName": "Zqoperator", "PatientSpeciesDescription": "", "StudyDate": "20200102"}
    pixels = noise(6, 16, 20).astype(np.uint16)
    if enhanced_source:
        made = enhanced(pixels, [[0.0, 0.0, 2.0 * k] for k in range(6)], **tags)
        move_groups(made, ["PixelMeasuresSequence", "PlaneOrientationSequence"], to_frames=True)
        write_dataset(made, tmp_path / "in" / "a.dcm")
    else:
        write_series(tmp_path / "in", pixels, **tags)
    (row,) = answered(packages["segmenter"], tmp_path / "in", tmp_path / "out")
    for name in ("file", "report"):
        answer = pydicom.dcmread(tmp_path / "out" / row[name])
        copied = {element.keyword for element in list_attributes(answer) if "Zq" in str(element.value)}
        copied -= {element.keyword for element in answer if element.VR == "SQ"}
        assert copied <= COPIED_KEYWORDS
        assert {"PatientName", "StudyDescription"} <= copied
        assert "Zq" not in str(answer.get("ContributingEquipmentSequence"))
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "answer-in-dicom.md").read_text()
    assert [keyword for keyword in COPIED_KEYWORDS if keyword not in page and "Deident" not in keyword] == []


def test_an_empty_mask_is_a_whole_answer(equipment: Equipment, tmp_path: Path) -> None:
    write_series(tmp_path / "in", FrameOfReferenceUID="1.2.3")
    volume, source = opened(tmp_path / "in")
    labels = np.zeros(volume.shape, np.uint8)
    made = segmentation_of(labels, volume, source, equipment, labelmap=False)
    save_dicom(tmp_path / "a.seg.dcm", made)
    save_dicom(tmp_path / "a.sr.dcm", build_volumes_report(made, class_sizes(labels, volume, 2), source, equipment))
    assert not read_frame_labels(highdicom.seg.segread(tmp_path / "a.seg.dcm"), source).any()
    assert dciodvfy_errors(tmp_path / "a.seg.dcm", tmp_path / "a.sr.dcm") == []


def test_frames_of_a_multi_frame_object_are_answered_in_their_own_order(equipment: Equipment, tmp_path: Path) -> None:
    frames = noise(4, 5, 6).astype(np.uint16)
    places = [(0.0, 0.0, 3.0 * k) for k in (2, 0, 3, 1)]
    write_dataset(enhanced(frames, places, FrameOfReferenceUID="1.2.3"), tmp_path / "in" / "a.dcm")
    volume, source = opened(tmp_path / "in")
    made = segmentation_of(levels(volume.array[0], 400, 1500), volume, source, equipment, labelmap=False)
    save_dicom(tmp_path / "a.seg.dcm", made)
    found = read_frame_labels(highdicom.seg.segread(tmp_path / "a.seg.dcm"), source)
    rescaled = np.stack([(k + 1) * frame + 100.0 * k for k, frame in enumerate(frames)])
    np.testing.assert_array_equal(found, levels(rescaled, 400, 1500)[[1, 3, 0, 2]])
    assert list_references(made) == {(str(source.first_dataset.SOPInstanceUID), k) for k in (1, 2, 3, 4)}
    assert dciodvfy_errors(tmp_path / "a.seg.dcm") == []


def list_references(made: pydicom.Dataset) -> set[tuple[str, int]]:
    """SOPInstanceUID and frame of the source of each frame of a segmentation."""
    return {
        (str(image.ReferencedSOPInstanceUID), int(image.get("ReferencedFrameNumber", 0)))
        for group in made.PerFrameFunctionalGroupsSequence
        for image in group.DerivationImageSequence[0].SourceImageSequence
    }


def move_groups(made: pydicom.Dataset, names: list[str], *, to_frames: bool) -> None:
    """Move functional groups from the shared ones to those of each frame, or the other way round."""
    (shared,), frames = made.SharedFunctionalGroupsSequence, made.PerFrameFunctionalGroupsSequence
    for name in names:
        for frame in frames:
            if to_frames:
                frame[name] = shared[name]
            else:
                shared[name] = frame[name]
                del frame[name]
        if to_frames:
            del shared[name]


def write_several_volumes(path: Path, volumes: int, *, per_frame: bool) -> tuple[Array, np.ndarray[Any, Any]]:
    """An enhanced object of volumes of 4 slices of an oblique stack, slice by slice; frames and rescaled frames."""
    direction = np.cross((0.991332, 0.114987, -0.063548), (-0.118794, 0.991118, -0.059771))
    frames = noise(4 * volumes, 5, 6).astype(np.uint16)
    places = [list(np.array([-10.5, 7.25, 30.0]) + 3.0 * (k // volumes) * direction) for k in range(4 * volumes)]
    made = enhanced(frames, places, FrameOfReferenceUID="1.2.3")
    plane = made.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    plane.ImageOrientationPatient = [0.991332, 0.114987, -0.063548, -0.118794, 0.991118, -0.059771]
    for k, group in enumerate(made.PerFrameFunctionalGroupsSequence):
        group.FrameContentSequence = [pydicom.Dataset()]
        group.FrameContentSequence[0].TemporalPositionIndex = k % volumes + 1
    if per_frame:
        move_groups(made, ["PixelMeasuresSequence", "PlaneOrientationSequence"], to_frames=True)
    write_dataset(made, path)
    return frames, np.stack([(k + 1) * frame + 100.0 * k for k, frame in enumerate(frames)])


@pytest.mark.parametrize("labelmap", [False, True])
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("volumes", [1, 3])
def test_each_volume_of_an_enhanced_object_gets_an_answer_on_its_own_frames(
    volumes: int, per_frame: bool, labelmap: bool, equipment: Equipment, tmp_path: Path
) -> None:
    _, rescaled = write_several_volumes(tmp_path / "in" / "a.dcm", volumes, per_frame=per_frame)
    index = build_index(tmp_path / "in", "mri", remember=False)
    assert len(index.records) == volumes
    for number, record in enumerate(index.records):
        plan, volume = index.plan_slices(record), index.open(record)
        assert plan is not None
        source = read_dicom_source(plan)
        made = segmentation_of(levels(volume.array[0], 800, 2500), volume, source, equipment, labelmap=labelmap)
        save_dicom(tmp_path / "a.seg.dcm", made)
        found = highdicom.seg.segread(tmp_path / "a.seg.dcm")
        np.testing.assert_array_equal(read_frame_labels(found, source), levels(rescaled[number::volumes], 800, 2500))
        numbers = {volumes * k + number + 1 for k in range(4)}
        assert list_references(found) <= {(str(source.first_dataset.SOPInstanceUID), k) for k in numbers}
        assert found.FrameOfReferenceUID == "1.2.3"
        grid = found.get_volume(combine_segments=True, allow_missing_positions=True)
        assert grid.spacing == pytest.approx((3.0, 0.5, 0.8), abs=1e-5)
        to_lps = np.diag([-1.0, -1.0, 1.0, 1.0])
        # the same voxels in the patient, by the geometry of the answer alone
        for index_of_slice, row, column in np.argwhere(grid.array)[:20]:
            point = to_lps @ grid.affine @ [index_of_slice, row, column, 1]
            i, j, k = np.rint(np.linalg.inv(volume.affine) @ point)[:3].astype(int)
            assert levels(volume.array[0, i, j, k], 800, 2500) == grid.array[index_of_slice, row, column]
        report = build_volumes_report(
            made, class_sizes(levels(volume.array[0], 800, 2500), volume, 2), source, equipment
        )
        save_dicom(tmp_path / "a.sr.dcm", report)
        if not labelmap:
            assert dciodvfy_errors(tmp_path / "a.seg.dcm", tmp_path / "a.sr.dcm") == []


def test_enhanced_objects_of_one_slice_each_get_one_answer(equipment: Equipment, tmp_path: Path) -> None:
    """A position in the shared groups, as an object of one frame may have it."""
    frames = noise(4, 5, 6).astype(np.uint16)
    uids: list[tuple[str, int]] = []
    for k, pixels in enumerate(frames):
        made = enhanced(
            pixels[None], [[1.0, 2.0, 3.0 * k]], FrameOfReferenceUID="1.2.3", SOPInstanceUID=f"1.2.4.{k + 1}"
        )
        uids.append((str(made.SOPInstanceUID), 1))
        move_groups(made, ["PlanePositionSequence"], to_frames=False)
        write_dataset(made, tmp_path / "in" / f"{k}.dcm")
    volume, source = opened(tmp_path / "in")
    made = segmentation_of(levels(volume.array[0], 400, 700), volume, source, equipment, labelmap=False)
    save_dicom(tmp_path / "a.seg.dcm", made)
    found = highdicom.seg.segread(tmp_path / "a.seg.dcm")
    np.testing.assert_array_equal(read_frame_labels(found, source), levels(frames, 400, 700))
    assert list_references(found) == set(uids)
    assert dciodvfy_errors(tmp_path / "a.seg.dcm") == []


def test_x_rays_get_a_report_of_probabilities_and_the_operating_point(
    packages: dict[str, Package], shared_data: Path, tmp_path: Path
) -> None:
    sources = [shared_data / "xray-dicom", shared_data / "dicom-formats" / "RG3_J2KI.dcm"]
    rows = predict(packages["classifier"], sources, tmp_path, output_format="dicom")
    assert len(rows) == 5
    plain = predict(packages["classifier"], sources, tmp_path / "plain")
    assert [{**row, "file": ""} for row in rows] == [{**row, "file": ""} for row in plain]
    for row in rows:
        report = highdicom.sr.srread(tmp_path / row["file"])
        assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
        groups = report.content.get_image_measurement_groups()
        for group, name in zip(groups, ("normal", "pneumonia"), strict=True):
            (measured,) = group.get_measurements()
            assert (measured.name.value, measured.value) == ("122157", row[f"probability_{name}"])
            assert group.tracking_identifier == name
        assert (tmp_path / row["file"]).read_bytes().count(b"operating point: probability >= 0.5") == 2
    assert dciodvfy_errors(*(tmp_path / row["file"] for row in rows)) == []


@pytest.mark.parametrize(("score", "flag"), [(0.7312, "No"), (2.5, "Yes"), (3e38, "Yes")])
def test_a_report_carries_the_score_and_the_flag_of_the_ood_detector(
    score: float, flag: str, shared_data: Path, packages: dict[str, Package], equipment: Equipment, tmp_path: Path
) -> None:
    verdict = OODResult(score, "features")
    volume, source = opened(shared_data / "mri-dicom" / SERIES["crop 1"])
    labels = levels(volume.array[0], *np.percentile(volume.array, [90, 97]))
    made = segmentation_of(labels, volume, source, equipment, labelmap=False)
    reports = [build_volumes_report(made, class_sizes(labels, volume, 2), source, equipment, verdict)]
    xrays = build_index(shared_data / "xray-dicom" / "test2.dcm", "xray", remember=False)
    plan = xrays.plan_slices(xrays.records[0])
    assert plan is not None
    classifier = Equipment(packages["classifier"].contract, packages["classifier"].sha256)
    reports.append(build_probabilities_report(np.array([0.2, 0.8]), read_dicom_source(plan), classifier, verdict))
    for number, report in enumerate(reports):
        save_dicom(tmp_path / f"{number}.sr.dcm", report)
        found = told(pydicom.dcmread(tmp_path / f"{number}.sr.dcm"))
        assert found["ood"] == flag
        assert found["ood-score"] == pytest.approx(min(score, 1e6))
        assert (tmp_path / f"{number}.sr.dcm").read_bytes().count(b"Out-of-distribution detector") == 1
    assert dciodvfy_errors(*sorted(tmp_path.glob("*.sr.dcm"))) == []
    silent = told(build_volumes_report(made, [1.0, 1.0], source, equipment))
    assert not {"ood", "ood-score"} & silent.keys()


def told(item: pydicom.Dataset) -> dict[str, Any]:
    """Values of a report's private concepts, wherever they stand in its tree."""
    found: dict[str, Any] = {}
    for inner in item.get("ContentSequence", []):
        found |= told(inner)
        code = inner.ConceptNameCodeSequence[0] if "ConceptNameCodeSequence" in inner else None
        if code is not None and code.CodingSchemeDesignator == "99MEDIM":
            number = inner.get("MeasuredValueSequence")
            value = float(number[0].NumericValue) if number else str(inner.ConceptCodeSequence[0].CodeMeaning)
            found[str(code.CodeValue)] = value
    return found


def test_an_operating_point_is_what_decides(packages: dict[str, Package]) -> None:
    contract = packages["classifier"].contract
    label = LabelCode(index=0, name="edema", threshold=0.62)
    findings = contract.model_copy(update={"kind": "multi_label_classifier"})
    three = contract.model_copy(update={"classes": ("a", "b", "c")})
    assert format_operating_point(label, Equipment(findings, "")) == "probability >= 0.62"
    assert format_operating_point(label, Equipment(three, "")) == "highest probability of 3 classes"


def test_an_answer_that_is_given_again_is_another_object(packages: dict[str, Package], tmp_path: Path) -> None:
    made = xray(noise(30, 30).astype(np.uint16), SeriesInstanceUID="1.2.3.4")
    write_dataset(made, tmp_path / "in" / "a.dcm")
    uids = set()
    for out in ("one", "two"):
        (row,) = answered(packages["classifier"], tmp_path / "in", tmp_path / out)
        report = pydicom.dcmread(tmp_path / out / row["file"])
        uids |= {report.SOPInstanceUID, report.SeriesInstanceUID}
    assert len(uids) == 4


def reasons(folder: Path) -> list[str]:
    return [row["reason"] for row in rows_of(folder / "rejected.csv")]


def test_an_image_that_is_no_dicom_gets_no_dicom_answer(packages: dict[str, Package], tmp_path: Path) -> None:
    Image.fromarray(noise(30, 30).astype(np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(AllRejectedError):
        answered(packages["classifier"], tmp_path / "a.png", tmp_path / "out")
    assert reasons(tmp_path / "out") == ["not-dicom"]


def test_an_image_without_what_an_answer_refers_to_gets_none(packages: dict[str, Package], tmp_path: Path) -> None:
    write_dataset(xray(noise(30, 30).astype(np.uint16), StudyInstanceUID=None), tmp_path / "in" / "a.dcm")
    with pytest.raises(AllRejectedError):
        answered(packages["classifier"], tmp_path / "in", tmp_path / "out")
    assert reasons(tmp_path / "out") == ["no-reference"]
    write_dataset(dataset(noise(30, 30).astype(np.uint16)), tmp_path / "mr" / "a.dcm")
    with pytest.raises(ReadError, match="FrameOfReferenceUID"):
        opened(tmp_path / "mr")


def test_frames_whose_places_were_stripped_get_no_segmentation(shared_data: Path) -> None:
    with pytest.raises(ReadError, match="lacks slice position"):
        opened(shared_data / "dicom-formats" / "emri_small.dcm")


def test_what_cannot_be_answered_in_dicom_is_told_before_anything_is_written(
    packages: dict[str, Package], tmp_path: Path
) -> None:
    package = packages["segmenter"]
    bare = dataclasses.replace(package, contract=package.contract.model_copy(update={"labels": ()}))
    with pytest.raises(UserError, match="--label-codes"):
        answered(bare, tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="medim export"):
        predict(
            Predictor(
                run=lambda x: x,
                kind="segmenter",
                modality="mri",
                spatial_dims=3,
                in_channels=1,
                classes=("a",),
                preprocessing=(),
                inference={},
            ),
            tmp_path,
            tmp_path / "out",
            output_format="dicom",
        )
    with pytest.raises(UsageError, match="segmenter"):
        answered(packages["classifier"], tmp_path, tmp_path / "out", labelmap=True)
    with pytest.raises(UsageError, match="--format dicom"):
        predict(package, tmp_path, tmp_path / "out", labelmap=True)
    assert not (tmp_path / "out").exists()


def test_a_segment_states_the_value_of_its_class_in_mask_files(packages: dict[str, Package]) -> None:
    contract = packages["segmenter"].contract
    architecture = {**contract.architecture, "class_values": [3, 2035]}
    equipment = Equipment(contract.model_copy(update={"architecture": architecture}), packages["segmenter"].sha256)
    segments = [_describe_segment(label, equipment) for label in contract.labels]
    assert [segment.SegmentNumber for segment in segments] == [1, 2]
    assert [segment.SegmentDescription for segment in segments] == [
        "value 3 in mask files", "value 2035 in mask files"
    ]  # fmt: skip
    assert "SegmentDescription" not in _describe_segment(contract.labels[0], Equipment(contract, "0" * 64))
