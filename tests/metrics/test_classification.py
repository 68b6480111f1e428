from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.spatial import cKDTree
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

from medim.metrics.bootstrap import bootstrap_interval, mean_over_subjects
from medim.metrics.classification import classification_metrics, classification_statistics
from medim.metrics.segmentation import segmentation_metrics
from medim.types import Array


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
    assert [found[name]["dice"] for name in ("one", "two", "three")] == [1, 0, 1]
    assert [found[name]["surface_dice"] for name in ("one", "two", "three")] == [1, 0, 1]
    assert [found[name]["hd95"] for name in ("one", "two", "three")] == [0, None, None]


def test_neither_an_empty_mask_nor_a_full_one_raises_a_warning() -> None:
    empty, full = np.zeros((5, 5, 5), np.uint8), np.ones((5, 5, 5), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert segmentation_metrics(full, full, (1, 1, 1), ["it"])["it"]["dice"] == 1
        assert segmentation_metrics(empty, full, (1, 1, 1), ["it"])["it"] == {
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


def random_scores(cases: int, classes: int, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, cases - classes)])
    logits = rng.normal(size=(cases, classes)).round(1)  # rounded: ties occur
    logits[np.arange(cases), labels] += 0.8
    probabilities = np.exp(logits)
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


def brute_force_ece(probabilities: Array, labels: Array) -> float:
    confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("classes", [2, 4])
def test_classification_metrics_equal_their_definitions(classes: int) -> None:
    probabilities, labels = random_scores(80, classes, seed=1)
    predicted = probabilities.argmax(axis=1)
    found = classification_metrics(probabilities, labels)
    scores = probabilities[:, 1] if classes == 2 else probabilities
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr"))
    precisions = average_precision_score(np.eye(classes)[labels], probabilities, average=None)
    assert found["average_precision"] == pytest.approx(precisions[1] if classes == 2 else precisions.mean())
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["ece"] == pytest.approx(brute_force_ece(probabilities, labels))


@pytest.mark.parametrize("classes", [2, 4])
def test_the_weighted_statistics_equal_the_metrics_of_the_cases_repeated(classes: int) -> None:
    probabilities, labels = random_scores(60, classes, seed=2)
    weights = np.random.default_rng(3).multinomial(60, np.full(60, 1 / 60), size=20)
    for name, statistic in classification_statistics(probabilities, labels).items():
        values = statistic(weights.astype(float))
        for row, value in zip(weights, values, strict=True):
            repeated = np.repeat(np.arange(60), row)
            expected = classification_metrics(probabilities[repeated], labels[repeated])[name]
            assert value == pytest.approx(expected), name


@pytest.mark.parametrize("name", ["auroc", "average_precision"])
@pytest.mark.parametrize("probabilities", [np.array([[0.9, 0.1], [0.2, 0.8]]), np.eye(3)[:2]])
def test_a_ranking_is_undefined_where_one_class_occurs(name: str, probabilities: Array) -> None:
    assert classification_metrics(probabilities, np.array([1, 1]))[name] is None
    assert np.isnan(classification_statistics(probabilities, np.array([1, 1]))[name](np.ones((3, 2)))).all()


def test_the_mean_of_one_case_a_subject_has_the_interval_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, size=400)
    found = mean_over_subjects(list(values), [f"s{i}" for i in range(400)], resamples=4000)
    half = 1.96 * values.std() / 20
    assert found["value"] == pytest.approx(values.mean())
    assert found["ci_low"] == pytest.approx(values.mean() - half, abs=0.002)
    assert found["ci_high"] == pytest.approx(values.mean() + half, abs=0.002)


def test_the_interval_is_over_subjects_so_repeating_each_case_of_a_subject_does_not_narrow_it() -> None:
    values = list(np.random.default_rng(1).random(30))
    subjects = [f"s{i}" for i in range(30)]
    once = mean_over_subjects(values, subjects, seed=5)
    often = mean_over_subjects(values * 10, subjects * 10, seed=5)
    assert once["ci_low"] == pytest.approx(often["ci_low"])
    assert once["ci_high"] == pytest.approx(often["ci_high"])
    assert (once["n"], often["n"]) == (30, 300)


def test_one_seed_gives_one_interval_whatever_the_keys_of_the_subjects() -> None:
    values = list(np.random.default_rng(1).random(12))
    one = mean_over_subjects(values, [f"s-{i % 6}" for i in range(12)], seed=3)
    assert one == mean_over_subjects(values, [f"other-{i % 6}" for i in range(12)], seed=3)
    assert one != mean_over_subjects(values, [f"s-{i % 6}" for i in range(12)], seed=4)


def test_cases_without_a_value_are_left_out_and_counted() -> None:
    found = mean_over_subjects([1.0, None, 3.0, float("nan")], ["a", "b", "c", "d"])
    assert (found["value"], found["n"]) == (2.0, 2)
    assert mean_over_subjects([None], ["a"]) == {"value": None, "ci_low": None, "ci_high": None, "n": 0}


def test_a_single_subject_has_a_value_and_no_interval() -> None:
    assert mean_over_subjects([1.0, 2.0], ["a", "a"]) == {"value": 1.5, "ci_low": None, "ci_high": None, "n": 2}


def test_resamples_of_a_single_class_are_left_out_of_the_interval_of_auroc() -> None:
    probabilities, labels = random_scores(12, 2, seed=4)
    labels[:] = 0
    labels[:3] = 1  # a resample of 12 without any of the three: (9/12)^12 = 3 %
    found = bootstrap_interval(classification_statistics(probabilities, labels)["auroc"], [str(i) for i in range(12)])
    assert found["ci_low"] is not None
    assert 0 <= found["ci_low"] <= found["value"] <= found["ci_high"] <= 1  # type: ignore[operator]


def test_no_interval_where_most_resamples_define_no_value() -> None:
    found = bootstrap_interval(lambda w: np.where(w[:, 0] == 1, 0.5, np.nan), ["a", "b", "c"])  # P(drawn once) = 4/9
    assert found == {"value": 0.5, "ci_low": None, "ci_high": None, "n": 3}


def test_a_large_set_is_resampled_in_parts_with_the_same_result() -> None:
    values = list(np.random.default_rng(1).random(9000))
    subjects = [f"s{i}" for i in range(9000)]
    found = mean_over_subjects(values, subjects, resamples=1000)  # 9 million weights
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * 1.96 * np.std(values) / 9000**0.5, rel=0.15)  # type: ignore[operator]
