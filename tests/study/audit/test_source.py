"""The audit of a source finds one body under two names in two splits, and what predicts the class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from medim.cli import app
from medim.data.index.index import build_index
from medim.data.lookalikes import FALSE_PAIRS
from medim.parsing import read_csv
from medim.study.audit.source import SourceAudit, audit_source, measure_corners
from medim.types import Array, UserError, Volume

COUNT = 48


def draw_film(rng: np.random.Generator, size: int = 64) -> Array:
    """A film with structures of its own."""
    film = ndimage.gaussian_filter(rng.normal(size=(size, size)), 3)
    return np.asarray((film - film.min()) / np.ptp(film) * 200 + 20)


def write_films(folder: Path, *, marker: bool, copy: bool) -> Path:
    """Films of two classes; optionally a marker in a corner of one class, and a brighter copy in the other split."""
    rng = np.random.default_rng(0)
    rows, films = ["image,label,subject,split"], []
    for number in range(COUNT):
        film = draw_film(rng)
        if marker and number % 2:
            film[-9:, :9] = 255
        films.append(film)
        split = "val" if number % 3 == 0 else "train"
        rows.append(f"f{number:02d},{'ill' if number % 2 else 'well'},s{number:02d},{split}")
    if copy:
        films.append(np.clip(0.8 * films[0] + 40, 0, 255))
        rows.append(f"f{COUNT},well,s{COUNT},train")
    for number, film in enumerate(films):
        Image.fromarray(film.astype(np.uint8)).save(folder / f"f{number:02d}.png")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def audit_films(folder: Path, false_pairs: float = FALSE_PAIRS) -> SourceAudit:
    index = build_index(folder, "xray", labels=folder / "labels.csv", keep_names=True)
    return audit_source(index, false_pairs=false_pairs)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> SourceAudit:
    """The audit of films with a copy and a marker."""
    return audit_films(write_films(tmp_path_factory.mktemp("films"), marker=True, copy=True))


def test_a_copy_under_another_name_in_the_other_split_is_a_leak(planted: SourceAudit) -> None:
    result = planted
    (pair,) = result.leaks
    assert {pair.image, pair.other_image} == {"f00", f"f{COUNT}"}
    assert result.pairs == result.strangers == result.leaks
    assert {pair.split, pair.other_split} == {"val", "train"}
    assert (result.images, result.subjects) == (COUNT + 1, COUNT + 1)


def test_a_clean_source_raises_nothing(tmp_path: Path) -> None:
    result = audit_films(write_films(tmp_path, marker=False, copy=False))
    assert (result.pairs, result.notes, result.rejections) == ((), (), ())
    assert [shortcut.name for shortcut in result.shortcuts] == ["raw size", "raw intensity", "corners", "file"]
    assert not any(shortcut.prediction.above_chance for shortcut in result.shortcuts)


def test_a_marker_in_the_corner_of_one_class_is_found_in_the_corners(planted: SourceAudit) -> None:
    above_chance = {shortcut.name: shortcut.prediction.above_chance for shortcut in planted.shortcuts}
    assert above_chance["corners"]
    assert not above_chance["raw size"]


def test_corners_are_measured_on_the_scale_of_the_image() -> None:
    image = np.zeros((1, 16, 16), np.float32)
    image[0, :2, -2:], image[0, 4:12, 4:12] = 500.0, 1000.0
    corners = measure_corners(Volume(image, np.eye(4), np.eye(4), (16, 16)))
    assert (corners["mean 01"], corners["mean 00"], corners["std 01"]) == (0.5, 0.0, 0.0)


def test_a_source_without_classes_or_with_a_file_that_became_unreadable_is_noted(tmp_path: Path) -> None:
    write_films(tmp_path, marker=False, copy=False)
    (tmp_path / "labels.csv").unlink()
    index = build_index(tmp_path, "xray", keep_names=True)
    (tmp_path / "f07.png").write_bytes(b"\x89PNG damaged")
    result = audit_source(index, false_pairs=FALSE_PAIRS)
    assert result.notes == ("shortcuts: not computed, no image has a class label",)
    assert [rejection.path for rejection in result.rejections] == ["f07.png"]
    assert result.images == COUNT - 1
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=f"none of {COUNT} images could be read"):
        audit_source(index, false_pairs=FALSE_PAIRS)


def test_the_command_writes_pairs_figures_and_a_page_and_can_fail(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    films = write_films(tmp_path / "films", marker=False, copy=True)
    out = tmp_path / "audit"
    command = ["audit", str(films), "--modality", "xray", "--labels", str(films / "labels.csv"), "--out", str(out)]
    ran = CliRunner().invoke(app, [*command, "--jobs", "1", "--fail-on-contamination"])
    assert ran.exit_code == 1, ran.output
    assert "look-alikes in two splits: 1; --fail-on-contamination allows none" in " ".join(ran.output.split())
    (row,) = read_csv(out / "lookalikes.csv")
    assert {row["split"], row["other_split"]} == {"val", "train"}
    content = json.loads((out / "audit.json").read_text())
    assert content["search"]["n_compared"] == (COUNT + 1) * COUNT // 2
    assert len(content["shortcuts"]) == 4
    page = (out / "audit.html").read_text()
    assert "1 pair of look-alikes in two splits" in page
    assert page.count("data:image/jpeg") == 2
    again = CliRunner().invoke(app, [*command, "--false-pairs", "0"])
    assert again.exit_code == 2
    assert "--false-pairs: expected a number above 0" in again.output
