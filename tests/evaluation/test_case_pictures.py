from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medim.data.index.index import Index, build_index
from medim.evaluation.case_pictures import PICTURES_FILE, select_cases, write_case_pictures
from medim.evaluation.cases import score_cases
from medim.files import read_json
from medim.inference.network import Predictor
from medim.pictures.case import COLOURS
from medim.types import Array
from tests.data.synthetic import write_nifti


def find_bright(image: Array) -> Array:
    return np.concatenate([0.5 - image, image - 0.5], axis=1)


BRIGHT = Predictor(
    run=find_bright,
    kind="segmenter",
    modality="mri",
    spatial_dims=3,
    in_channels=1,
    classes=("bright",),
    preprocessing=({"op": "ras"}, {"op": "normalise", "method": "range"}),
    inference={"mode": "whole", "multiple_of": 4},
)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Eight scans of a bright cube, whose mask is a slab that is shifted more from scan to scan."""
    rows = ["image,mask"]
    for number in range(8):
        image = np.random.default_rng(number).uniform(0, 20, (16, 16, 12)).astype(np.float32)
        image[4:12, 4:12, 3:9] = 100
        mask = np.zeros(image.shape, np.uint8)
        mask[4:12, 4 + number : 12, 3:9] = 1
        write_nifti(tmp_path / "source" / f"scan{number}.nii.gz", image)
        write_nifti(tmp_path / "source" / f"mask{number}.nii.gz", mask)
        rows.append(f"scan{number}.nii.gz,mask{number}.nii.gz")
    (tmp_path / "source" / "masks.csv").write_text("\n".join(rows))
    return build_index(tmp_path / "source", "mri", labels=tmp_path / "source" / "masks.csv")


def decode(source: str) -> Array:
    data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int64)


def test_the_worst_typical_and_best_cases_are_drawn_with_label_and_prediction(index: Index, tmp_path: Path) -> None:
    rows = score_cases(BRIGHT, index, index.records)
    write_case_pictures(tmp_path / PICTURES_FILE, index, index.records, rows, BRIGHT)
    pictures = read_json(tmp_path / PICTURES_FILE)["pictures"]
    assert [picture["caption"].split(":")[0] for picture in pictures] == [
        *(f"Worst case {n}" for n in (1, 2, 3)),
        *["Typical case"] * 2,
        "Best case",
    ]
    dice = [float(picture["caption"].split("Dice ")[1].split(" ")[0]) for picture in pictures]
    assert dice == sorted(dice)
    assert dice[-1] == 1
    for picture in pictures:
        image = decode(picture["source"])
        is_contour = np.abs(image - np.array(COLOURS[0])).max(axis=-1) < 40
        half = image.shape[0] // 2
        assert is_contour[:half].sum() > 100  # the label
        assert is_contour[half:].sum() > 100  # the prediction
        assert "contours of label (above) and prediction (below)" in picture["alt"]


def test_an_image_that_is_gone_is_named_and_the_others_are_drawn(index: Index, tmp_path: Path) -> None:
    rows = score_cases(BRIGHT, index, index.records)
    index.locate(index.records[-1]).unlink()
    write_case_pictures(tmp_path / PICTURES_FILE, index, index.records, rows, BRIGHT)
    sources = [picture["source"] for picture in read_json(tmp_path / PICTURES_FILE)["pictures"]]
    assert sources.count(None) == 1


@pytest.mark.parametrize(
    ("scores", "titles"),
    [
        ([], []),
        ([np.nan, 0.3], ["Worst case 1"]),
        ([0.1, 0.2, 0.3, 0.4], ["Worst case 1", "Worst case 2", "Worst case 3", "Best case"]),
        ([*np.linspace(0, 1, 9)], [*(f"Worst case {n}" for n in (1, 2, 3)), "Typical case", "Best case"]),
    ],
)
def test_no_case_is_drawn_twice_and_cases_without_a_score_are_left_out(scores: list[float], titles: list[str]) -> None:
    selected = select_cases(np.array(scores), [str(n) for n in range(len(scores))])
    assert [title for title, _ in selected] == titles
    assert len({place for _, place in selected}) == len(selected)
