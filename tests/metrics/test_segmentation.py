"""Masks of a case against brute force, and values of empty masks."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
from scipy.spatial import cKDTree

from medim.metrics import METRICS, segmentation
from medim.types import Array

segmentation_metrics = partial(segmentation.segmentation_metrics, metrics=METRICS)


def box(shape: tuple[int, ...], *slices: slice, value: int = 1) -> Array:
    array = np.zeros(shape, dtype=np.uint8)
    array[slices] = value
    return array


def brute_force(prediction: Array, truth: Array, spacing: tuple[float, ...]) -> dict[str, float]:
    """Dice, HD95 and surface Dice at 1 mm by counting, over all pairs of surface voxels."""

    def surface(mask: Array) -> Array:
        padded = np.pad(mask, 1)
        inner = padded.copy()
        for axis in range(mask.ndim):
            inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
        return (np.argwhere(padded & ~inner) - 1) * np.array(spacing)

    p, t = prediction > 0, truth > 0
    ours, theirs = surface(p), surface(t)
    there, back = cKDTree(theirs).query(ours)[0], cKDTree(ours).query(theirs)[0]
    return {
        "dice": 2 * (p & t).sum() / (p.sum() + t.sum()),
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
        "surface_dice": ((there <= 1).sum() + (back <= 1).sum()) / (len(there) + len(back)),
    }


@pytest.mark.parametrize("shape", [(24, 20), (14, 12, 10)])
def test_segmentation_metrics_equal_brute_force_on_random_masks_in_anisotropic_spacing(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    spacing = (0.6, 1.7, 2.3)[: len(shape)]
    for _ in range(5):
        prediction, truth = (rng.random((2, *shape)) < 0.4).astype(np.uint8)
        found = segmentation_metrics(prediction, truth, spacing, ["it"])["it"]
        expected = brute_force(prediction, truth, spacing)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-5), name


def test_hd95_of_a_shifted_box_is_the_shift_in_mm_along_the_axis_of_its_spacing() -> None:
    truth = box((20, 20, 20), slice(4, 10), slice(4, 10), slice(4, 10))
    for axis, mm in enumerate((0.5, 2.0, 5.0)):
        moved = np.roll(truth, 3, axis)
        found = segmentation_metrics(moved, truth, (0.5, 2.0, 5.0), ["it"])["it"]
        assert found["hd95"] == pytest.approx(3 * mm)


def test_each_class_is_scored_by_its_own_label() -> None:
    truth = box((10, 10), slice(0, 4), value=1) + box((10, 10), slice(6, 10), value=2)
    prediction = np.where(truth == 1, 1, 0).astype(np.uint8)
    found = segmentation_metrics(prediction, truth, (1, 1), ["one", "two", "three"])
    assert [found[name]["dice"] for name in ("one", "two", "three")] == [1, 0, None]
    assert [found[name]["surface_dice"] for name in ("one", "two", "three")] == [1, 0, None]
    assert [found[name]["hd95"] for name in ("one", "two", "three")] == [0, pytest.approx(200**0.5), None]


def test_neither_an_empty_mask_nor_a_full_one_raises_a_warning() -> None:
    empty, full = np.zeros((5, 5, 5), np.uint8), np.ones((5, 5, 5), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert segmentation_metrics(full, full, (1, 1, 1), ["it"])["it"]["dice"] == 1
        missed = segmentation_metrics(empty, full, (1, 1, 1), ["it"])["it"]
        assert missed == {"dice": 0, "hd95": pytest.approx(75**0.5), "surface_dice": 0}
        assert segmentation_metrics(full, empty, (1, 1, 1), ["it"])["it"] == {
            "dice": 0,
            "hd95": None,
            "surface_dice": 0,
        }


def test_a_spacing_that_a_header_rounded_up_stays_within_one_millimetre() -> None:
    truth = box((12, 12), slice(3, 8), slice(3, 8))
    prediction = box((12, 12), slice(4, 9), slice(3, 8))
    exact = segmentation_metrics(prediction, truth, (1.0, 1.0), ["it"])
    rounded = segmentation_metrics(prediction, truth, (1.0000001, 1.0000001), ["it"])
    assert exact["it"]["surface_dice"] == rounded["it"]["surface_dice"] == 1


def test_masks_on_two_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="one grid"):
        segmentation_metrics(np.zeros((4, 4)), np.zeros((4, 5)), (1, 1), ["it"])
