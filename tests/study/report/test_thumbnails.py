from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medim.evaluation.probing.label_budget import Budget
from medim.files import read_json
from medim.study.report.report import write_study_page
from medim.study.report.thumbnails import PICTURE_PIXELS, draw_overlay, largest_slice
from medim.types import Array, Volume


def ball(radius: float, shape: tuple[int, ...] = (40, 40, 20), centre: tuple[int, ...] = (20, 20, 5)) -> Array:
    place = np.indices(shape) - np.array(centre).reshape(-1, *[1] * len(shape))
    return (np.sqrt((place**2).sum(axis=0)) <= radius).astype(np.uint8)


def opened(source: str) -> Array:
    data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)


def coloured(picture: Array) -> tuple[Array, Array]:
    """Where a picture is blue, and where it is orange."""
    red, blue = picture[..., 0], picture[..., 2]
    return blue - red > 60, red - blue > 60


def volume_of(array: Array, spacing: tuple[float, ...]) -> Volume:
    affine = np.diag([*spacing, *[1.0] * (4 - len(spacing))])
    return Volume(array[None].astype(np.float32), affine, affine, array.shape)


def test_the_slice_is_the_one_with_the_largest_truth_or_the_middle() -> None:
    assert largest_slice(ball(4)) == 5
    assert largest_slice(np.zeros((4, 4, 9), np.uint8)) == 4


def test_contours_lie_on_the_borders_of_truth_and_prediction() -> None:
    volume = volume_of(np.random.default_rng(0).normal(100, 5, (40, 40, 20)), (1.0, 1.0, 3.0))
    picture = opened(draw_overlay(volume, ball(12), ball(6)))
    assert picture.shape == (PICTURE_PIXELS, PICTURE_PIXELS, 3)
    rows, columns = np.indices(picture.shape[:2])
    away = (
        np.hypot(rows - PICTURE_PIXELS * 19.5 / 40, columns - PICTURE_PIXELS * 19.5 / 40) * 40 / PICTURE_PIXELS
    )  # both axes are mirrored
    for found, radius in zip(coloured(picture), (12.5, 6.5), strict=True):
        assert found.sum() > 100
        assert np.quantile(np.abs(away[found] - radius), 0.95) < 1.5  # JPEG has ripples beside a line
    assert coloured(picture)[1].sum() < 0.5 * coloured(picture)[0].sum()  # dashed, and the smaller circle


def test_a_picture_without_masks_is_grey_and_keeps_its_proportions() -> None:
    picture = opened(draw_overlay(volume_of(np.random.default_rng(0).normal(size=(10, 20)), (2.0, 0.5))))
    assert picture.shape == (PICTURE_PIXELS, PICTURE_PIXELS // 2, 3)
    assert not any(found.any() for found in coloured(picture))


@pytest.fixture
def small(run_study: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    run_study(budgets=(Budget(labelled=4),), seeds=1)
    return tmp_path / "study"


def test_a_study_ends_with_its_page_its_worst_cases_and_the_health_of_its_encoders(small: Path) -> None:
    worst, runs = read_json(small / "worst.json"), read_json(small / "pretraining.json")["arms"]["dim"]
    assert (worst["arm"], worst["budget"], len(worst["tiles"])) == ("dim", "4", 6)
    shown = [float(tile["caption"].split("probability ")[1].split(",")[0]) for tile in worst["tiles"]]
    assert shown == sorted(shown)
    assert all(tile["source"].startswith("data:image/jpeg") for tile in worst["tiles"])
    assert len(runs) == 2
    assert all(run["curves"][0]["name"] == "local_dim" and run["curves"][0]["chance"] for run in runs)
    html = (small / "report.html").read_text()
    assert all(tile["source"] in html and tile["alt"].split(":")[0] in html for tile in worst["tiles"])
    assert "dim, encoder 1: Loss of local_dim" in html
    assert "do not send it outside your site" in html
    assert len(html) < 5_000_000
    assert str(small.parent) not in html
    assert write_study_page(small).read_text() == html
