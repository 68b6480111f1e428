"""Series with damaged or missing slices: a shorter volume is never accepted without a code."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medim.data.index.index import AllRejectedError, Index, build_index
from medim.data.readers import DICOM, ReadError, read_volume
from tests.data.synthetic import dataset, enhanced, noise, save, scan, write_series

SERIES = "mri-dicom/Study2/14-T1post-22014"  # 24 slices


def copy_series(shared_data: Path, out: Path) -> list[Path]:
    """Copy a real series; return its files in the order of the slices."""
    shutil.copytree(shared_data / SERIES, out)
    inspections = [DICOM.inspect(path).with_path(path) for path in out.iterdir()]
    instances = [inspection.instance for inspection in inspections if inspection.instance]
    return [instance.path for instance in sorted(instances, key=lambda instance: instance.frames[0].position[2])]


def truncate(path: Path, length: int) -> None:
    """Keep the first bytes of a file; negative lengths count from the end."""
    path.write_bytes(path.read_bytes()[:length])


def index_without_cache(folder: Path) -> Index:
    return build_index(folder, "mri", remember=False)


@pytest.mark.parametrize("position", [0, 11, -1])
@pytest.mark.parametrize("length", [-2, 300_000])
def test_a_damaged_slice_rejects_its_series(shared_data: Path, tmp_path: Path, position: int, length: int) -> None:
    slices = copy_series(shared_data, tmp_path / "a")
    truncate(slices[position], length)
    with pytest.raises(AllRejectedError) as error:
        index_without_cache(tmp_path / "a")
    reasons = {rejection.reason: rejection.path for rejection in error.value.index.rejected}
    assert set(reasons) == {"truncated", "incomplete-series"}
    assert Path(reasons["truncated"]).name == slices[position].name
    with pytest.raises(ReadError) as caught:
        read_volume(tmp_path / "a")
    assert caught.value.reason in {"truncated", "incomplete-series"}


@pytest.mark.parametrize("length", [2000, 300, 100, 0])
@pytest.mark.parametrize("position", [0, -1])
def test_a_file_without_header_marks_the_only_series_of_its_folder(
    shared_data: Path, tmp_path: Path, position: int, length: int
) -> None:
    slices = copy_series(shared_data, tmp_path / "a")
    truncate(slices[position], length)
    index = index_without_cache(tmp_path / "a")
    assert [record.shape[2] for record in index.records] == [23]
    assert "damaged-neighbour" in (index.records[0].quality or "").split()
    assert len(index.rejected) == 1


def test_missing_slices_at_an_end_are_marked_by_their_numbers(shared_data: Path, tmp_path: Path) -> None:
    for name, missing in (("first", slice(0, 3)), ("last", slice(-3, None)), ("none", slice(0, 0))):
        for path in copy_series(shared_data, tmp_path / name)[missing]:
            path.unlink()
    quality = {name: index_without_cache(tmp_path / name).records[0].quality for name in ("first", "last", "none")}
    assert "fewer-slices-than-numbered" in (quality["first"] or "")
    assert "fewer-slices-than-numbered" in (quality["last"] or "")
    assert "fewer-slices-than-numbered" not in (quality["none"] or "")


def test_a_real_complete_series_has_no_code_of_missing_slices(shared_data: Path) -> None:
    index = index_without_cache(shared_data / "mri-dicom")
    codes = {code for record in index.records for code in (record.quality or "").split()}
    assert len(index.records) > 2
    assert not codes & {"damaged-neighbour", "fewer-slices-than-numbered"}


def test_a_repeated_transfer_replaces_the_damaged_copy_of_a_slice(shared_data: Path, tmp_path: Path) -> None:
    last = copy_series(shared_data, tmp_path / "a")[-1]
    shutil.copy(last, last.with_name("again.dcm"))
    truncate(last, -2)
    index = index_without_cache(tmp_path / "a")
    assert [record.shape[2] for record in index.records] == [24]
    assert [rejection.reason for rejection in index.rejected] == ["truncated"]


def test_a_damaged_slice_rejects_only_the_stack_to_which_it_belongs(tmp_path: Path) -> None:
    positions = [[10.0, 20.0, 30.0 + 2 * k] for k in (*range(4), *range(4))]
    each = [{"EchoTime": 10.0 * (1 + k // 4), "EchoNumbers": 1 + k // 4} for k in range(8)]
    write_series(tmp_path, noise(8, 4, 6), positions=positions, each=each)
    files = sorted(tmp_path.iterdir())
    truncate(files[-1], -2)
    images, rejected = scan(DICOM, files, "mri")
    assert [image.shape[2] for image in images] == [4]
    assert sorted(file.reason for file in rejected) == ["incomplete-series", "truncated"]
    assert set(images[0].files) == set(files[:4])


def test_a_damaged_file_of_several_frames_does_not_affect_other_files(tmp_path: Path) -> None:
    whole = save(enhanced(noise(5, 4, 6), [[0.0, 0.0, 2.0 * k] for k in range(5)]), tmp_path / "whole.dcm")
    cut = save(enhanced(noise(5, 4, 6), [[0.0, 0.0, 2.0 * k] for k in range(5)]), tmp_path / "cut.dcm")
    truncate(cut, -20)
    images, rejected = scan(DICOM, [whole, cut], "mri")
    assert [image.files for image in images] == [(whole,)]
    assert [file.reason for file in rejected] == ["truncated"]


@pytest.mark.parametrize(
    ("tags", "is_slice"),
    [
        ({"Rows": 0}, True),
        ({"SOPClassUID": "1.2.3"}, True),
        ({"Modality": "MB"}, True),
        ({"BitsStored": 20}, True),
        ({"PhotometricInterpretation": "RGB"}, True),
        ({"PhotometricInterpretation": "RGB", "SeriesInstanceUID": "1.2.3.4"}, False),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, False),
    ],
)
@pytest.mark.parametrize("position", [0, -1])
def test_a_series_is_marked_by_a_file_that_its_header_rejects_and_that_has_its_uid(
    tmp_path: Path, position: int, tags: dict[str, object], is_slice: bool
) -> None:
    write_series(tmp_path / "a", noise(8, 4, 6))
    path = sorted((tmp_path / "a").iterdir())[position]
    header = pydicom.dcmread(path)
    for keyword, value in tags.items():
        setattr(header, keyword, value)
    header.save_as(path)
    index = index_without_cache(tmp_path / "a")
    assert [record.shape[2] for record in index.records] == [7]
    assert len(index.rejected) == 1
    assert ("damaged-neighbour" in (index.records[0].quality or "").split()) == is_slice
    if is_slice:
        with pytest.raises(ReadError, match="damaged file in this folder"):
            read_volume(tmp_path / "a")


def test_an_empty_file_with_another_kind_of_name_marks_no_series(shared_data: Path, tmp_path: Path) -> None:
    copy_series(shared_data, tmp_path / "a")
    (tmp_path / "a" / "notes.txt").touch()
    index = index_without_cache(tmp_path / "a")
    assert "damaged-neighbour" not in (index.records[0].quality or "")


def test_a_file_without_header_marks_no_series_in_a_folder_of_two(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    for number, path in enumerate(sorted((tmp_path / "a").iterdir())):
        other = dataset(noise(4, 6), ImagePositionPatient=[0.0, 0.0, 2.0 * number], SeriesInstanceUID="1.2.3.4")
        save(other, tmp_path / "a" / f"other-{path.name}")
    (tmp_path / "a" / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\2\0")
    index = index_without_cache(tmp_path / "a")
    assert len(index.records) == 2
    assert not any("damaged-neighbour" in (record.quality or "") for record in index.records)


@pytest.mark.parametrize("values", [[7] * 96, [0] * 96, range(96)])
def test_bytes_inserted_into_the_pixels_are_noticed_at_the_end_of_the_file(
    tmp_path: Path, values: Sequence[int]
) -> None:
    path = save(dataset(np.array(values, np.uint16).reshape(8, 12)), tmp_path / "a.dcm")
    assert DICOM.inspect(path).rejected == ()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + bytes(4) + whole[-100:])
    assert [file.reason for file in DICOM.inspect(path).rejected] == ["length-mismatch"]


def test_elements_after_the_pixels_and_padding_to_a_block_are_valid(tmp_path: Path) -> None:
    element = dataset(noise(4, 6))
    element.add_new(0xFFFCFFFC, "OB", bytes(10))
    padded = save(dataset(noise(4, 6)), tmp_path / "padded.dcm")
    padded.write_bytes(padded.read_bytes() + bytes(-padded.stat().st_size % 512))
    assert DICOM.inspect(save(element, tmp_path / "element.dcm")).rejected == ()
    assert DICOM.inspect(padded).rejected == ()
