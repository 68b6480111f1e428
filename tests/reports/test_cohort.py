"""The cohort on a page: what an index and a store say, 24 images of it, and nothing of whom they are of."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medim.data.index.index import Index, build_index
from medim.data.index.rejection_codes import REJECTION_REASONS
from medim.data.loading.quality_table import flag_images, write_quality
from medim.data.preprocessing.quality import measure_quality
from medim.reports.contact_sheet import build_contact_sheet, encode_picture, sample_records
from medim.reports.report import write_report_page
from medim.types import Modality, Volume
from tests.data.loading.test_store import record
from tests.data.synthetic import noise, write_nifti, write_series, xray
from tests.data.synthetic import save as save_dicom

TRACES = ("avasarala", "chrisjen", "4711", "19610412", "1961-04", "tycho", "holden")


def page_of(source: Path, modality: Modality, out: Path) -> tuple[Index, str]:
    index = build_index(source, modality)
    index.write(out)
    return index, write_report_page(out).read_text()


def tiles(html: str) -> list[str]:
    return re.findall(r'<figure class="tile">(.*?)</figure>', html, flags=re.DOTALL)


def cells(html: str, caption: str) -> list[list[str]]:
    """The rows of a table of the page, as text."""
    found = re.search(rf"<caption>{caption}</caption>.*?<tbody[^>]*>(.*?)</tbody>", html, flags=re.DOTALL)
    assert found is not None, caption
    rows = re.findall(r"<tr.*?</tr>", found[1], flags=re.DOTALL)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def people(*counts: int) -> list[Any]:
    return [
        dataclasses.replace(record(f"{subject}-{n}", (8, 9)), subject=f"s{subject}")
        for subject, count in enumerate(counts)
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((2,) * 48, [f"{subject}-0" for subject in range(0, 48, 2)]),
        ((1, 30), ["0-0", *[f"1-{n}" for n in range(23)]]),
        ((20, 3, 9), [f"0-{n}" for n in range(12)] + [f"1-{n}" for n in range(3)] + [f"2-{n}" for n in range(9)]),
        ((1, 1), ["0-0", "1-0"]),
        ((), []),
    ],
)
def test_the_images_of_a_sheet_are_spread_over_subjects(counts: Sequence[int], expected: list[str]) -> None:
    assert [r.image for r in sample_records(people(*counts))] == expected


def test_a_volume_is_shown_as_a_doctor_looks_at_it() -> None:
    """One bright corner, at the patient's right, front and top, in slices twice as thick as wide."""
    array = np.zeros((1, 20, 20, 10), np.float32)
    array[0, 10:, 10:, 5:] = 1
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    seen = shown(Volume(array, affine, affine, (20, 20, 10)))
    assert seen.shape == (144, 432)
    for view in np.split(seen, 3, axis=1):
        assert [part.mean() > 128 for part in (view[:68, :68], view[:68, 76:], view[76:, :68], view[76:, 76:])] == [
            True,
            False,
            False,
            False,
        ]


def test_a_picture_keeps_its_proportions_and_its_window() -> None:
    ramp = np.linspace(0, 1, 5000).reshape(1, 100, 50).astype(np.float32)
    ramp[0, 0, 0] = 1e6  # a hot pixel
    affine = np.diag([0.5, 2.0, 1.0, 1.0])
    seen = shown(Volume(ramp, affine, affine, (100, 50)))
    assert seen.shape == (112, 224)  # 50 mm by 100 mm
    assert seen[2].mean() < 20
    assert seen[-2].mean() > 235


def shown(volume: Volume) -> np.ndarray[Any, Any]:
    head, data = encode_picture(volume).split(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_images_that_cannot_be_read_are_shown_as_such_and_counted(tmp_path: Path) -> None:
    for name in "abc":
        write_nifti(tmp_path / "source" / f"{name}.nii.gz", noise(8, 9, 10))
    index = build_index(tmp_path / "source", "mri")
    (tmp_path / "source" / "b.nii.gz").write_bytes(b"gone")
    index.write(tmp_path / "index")
    html = write_report_page(tmp_path / "index").read_text()
    assert "1 image could not be read." in html
    assert ["<img" in tile for tile in tiles(html)] == [True, False, True]
    assert "cannot be read" in tiles(html)[1]
    assert "Measured on the 2 images of the contact sheet only" in html
    shutil.rmtree(tmp_path / "source")
    assert "3 images could not be read." in write_report_page(tmp_path / "index").read_text()


def test_a_store_tells_the_figures_of_every_image_and_who_looks_alike(tmp_path: Path) -> None:
    array = noise(24, 26, 20)
    for number in range(30):
        write_nifti(tmp_path / "source" / f"i{number:02}.nii.gz", noise(24, 26, 20, seed=number))
    write_nifti(tmp_path / "source" / "copy.nii.gz", 2 * array + 1)
    index = build_index(tmp_path / "source", "mri")
    out = tmp_path / "store"
    figures = {r.image: measure_quality(index.open(r)) for r in index.records[:-1]}
    write_quality(out, flag_images(index.records, figures))
    index.write(out)
    html = write_report_page(out).read_text()
    assert ["could not be preprocessed", "1", "1"] in cells(html, "From files to images")
    assert "Measured on 30 images as read" in html
    flagged = {row[0]: row[1] for row in cells(html, "Flags of 30 images")}
    assert (flagged["near-duplicate"], flagged["noisy"], flagged["clipped"]) == ("2", "30", "0")
    assert cells(html, "Near-duplicate images of two subjects") == [
        ["copy", "i00", "0", "not reported and not reported"]
    ]
    assert len(tiles(html)) == 24
    path = out / "quality.csv"
    path.write_text(path.read_text().replace(",i00,", ",nosuch,"))
    html = write_report_page(out).read_text()
    assert ["copy", "nosuch", "0", "not reported and not reported"] in cells(
        html, "Near-duplicate images of two subjects"
    )


def test_the_histograms_are_told_in_words(tmp_path: Path) -> None:
    for number in range(6):
        write_nifti(tmp_path / "source" / f"{number}.nii.gz", noise(8 + number, 9, 10))
    _, html = page_of(tmp_path / "source", "mri", tmp_path / "index")
    assert "Size, voxels, of 6 images. left to right: 8 to 13, median 10.5" in html
    assert "Spacing of the 3D images" not in html  # all have one, and the table says which
    assert ["Field of view left to right, mm", "8", "10.5", "13"] in cells(html, "Grids of the 3D images")


def test_no_planted_name_is_in_any_byte_of_the_page(tmp_path: Path) -> None:
    source = tmp_path / "source"
    named = {"PatientBirthDate": "19610412", "InstitutionName": "Tycho Station", "ReferringPhysicianName": "Holden^J"}
    write_series(source / "Avasarala_Chrisjen", SeriesDescription="Avasarala head", **named)
    save_dicom(xray(noise(20, 20).astype(np.uint16), **named), source / "Avasarala_Chrisjen" / "ID-4711.dcm")
    write_series(source / "other", noise(5, 4, 6, seed=1), Modality="CT", **named)
    index, html = page_of(source, "mri", tmp_path / "index")
    assert len(index.records) == 1
    assert len(index.rejected) >= 2
    assert [trace for trace in TRACES if trace in html.lower()] == []
    assert f"<figcaption>{index.records[0].subject}</figcaption>" in html
    assert "This page contains patient images: do not send it outside your site." in html


@pytest.mark.parametrize(
    ("name", "modality", "images", "reasons"),
    [
        ("mri-hippocampus", "mri", 198, {}),
        ("xray-dicom", "xray", 4, {"duplicate": 1}),
        ("bad-inputs", "mri", 1, {"label-without-image": 3, "label-off-grid": 2, "empty-file": 1, "truncated": 1}),
    ],
)
def test_the_page_of_real_images(
    shared_data: Path, tmp_path: Path, name: str, modality: Modality, images: int, reasons: dict[str, int]
) -> None:
    index, html = page_of(shared_data / name, modality, tmp_path / "index")
    assert len(html.encode()) < 3_000_000
    assert len(tiles(html)) == min(images, 24)
    assert all(
        re.search(r'<img src="data:image/jpeg;base64,[^"]+" alt="Image \d+ of \d+, [^"]{20,}">', t) for t in tiles(html)
    )
    captions = [re.findall(r"<figcaption>(.*?)</figcaption>", tile)[0] for tile in tiles(html)]
    assert captions == [r.subject for r in sample_records(index.records)]
    assert len(set(captions)) == min(len({r.subject for r in index.records}), 24)
    flow = {row[0]: row[1] for row in cells(html, "From files to images")}
    assert (flow["Images"], flow["Rejected"]) == (str(images), str(sum(reasons.values())))
    if reasons:
        told = {row[0]: row for row in cells(html, "Rejected files, by reason")}
        assert {code: int(row[1]) for code, row in told.items()} == reasons
        first = {r.reason: (r.detail, r.path) for r in reversed(index.rejected)}
        assert {code: (row[3], row[4]) for code, row in told.items()} == first
        assert {code: row[2] for code, row in told.items()} == {code: REJECTION_REASONS[code] for code in reasons}
    assert html == write_report_page(tmp_path / "index").read_text()
    assert build_contact_sheet(index, "")[0].tiles == build_contact_sheet(index, "")[0].tiles
