from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from medim.data.loading.store import StoreEntry
from medim.data.preprocessing.steps import preprocess
from medim.study.audit.shortcuts import (
    TrainTestSplit,
    input_intensity,
    input_size,
    measure_padding,
    measure_shortcut,
    predict_label,
)
from medim.types import Array, Volume

COUNT = 120


def sides(labels: Array) -> TrainTestSplit:
    """Two images a subject; the last third is measured."""
    return TrainTestSplit(labels, np.arange(len(labels)) < 80, [f"s{n // 2}" for n in range(len(labels))])


def halves(seed: int = 0) -> Array:
    return np.random.default_rng(seed).permutation(np.arange(COUNT) % 2)


def entry(shape: tuple[int, ...], native: tuple[int, ...], start: Sequence[float], step: float = 1.0) -> StoreEntry:
    """A grid whose first voxel stands at `start` of the file's own grid, in voxels."""
    affine = np.eye(4)
    affine[: len(shape), : len(shape)] *= step
    affine[: len(shape), 3] = start
    return StoreEntry(
        shape=shape,
        channels=1,
        minimum=(0.0,),
        affine=affine,
        native_affine=np.eye(4),
        native_shape=native,
        has_mask=False,
        fingerprint="",
        nbytes=0,
        metrics=None,
    )


def test_numbers_that_hold_the_label_tell_it() -> None:
    labels = halves()
    found = predict_label(labels[:, None] + np.random.default_rng(1).normal(0, 0.3, (COUNT, 3)), sides(labels))
    assert found.auroc["value"] is not None
    assert found.auroc["value"] > 0.95
    assert found.above_chance
    assert found.chance == {"auroc": 0.5, "balanced_accuracy": 0.5}


def test_noise_tells_nothing() -> None:
    alarms = [
        predict_label(np.random.default_rng(n).normal(size=(COUNT, 3)), sides(halves(n))).above_chance for n in range(4)
    ]
    assert sum(alarms) <= 1


def test_what_is_no_straight_line_is_told_by_trees() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (COUNT, 1))
    found = predict_label(x, sides((np.abs(x[:, 0]) > 0.5).astype(int)))
    assert found.classifier == "gradient boosting"
    assert found.auroc["value"] == pytest.approx(1, abs=0.05)


def test_three_classes_have_a_chance_of_a_third() -> None:
    labels = np.arange(COUNT) % 3
    assert predict_label(np.eye(3)[labels], sides(labels)).chance["balanced_accuracy"] == pytest.approx(1 / 3)


def test_numbers_that_are_the_same_everywhere_are_at_exactly_chance() -> None:
    found = measure_shortcut("input size", [{"voxels": 24.0}] * COUNT, sides(halves()))
    assert not found.varies
    assert found.prediction.auroc["value"] == 0.5
    assert not found.prediction.above_chance


def test_the_labels_of_the_evaluation_split_are_not_learnt_from() -> None:
    labels = halves()
    features = np.random.default_rng(3).normal(size=(COUNT, 2))
    other = np.where(np.arange(COUNT) < 80, labels, 1 - labels)
    first, second = (predict_label(features, sides(values)).auroc["value"] for values in (labels, other))
    assert first is not None
    assert second == pytest.approx(1 - first)


@pytest.mark.parametrize(
    ("made", "window", "expected"),
    [
        (entry((4, 6), (4, 6), (0, 0)), None, [0, 0, 0, 0, 0]),
        (entry((8, 6), (4, 6), (-1, 0)), None, [1, 3, 0, 0, 0.5]),
        (entry((4, 6), (9, 9), (2, 3)), None, [0, 0, 0, 0, 0]),
        (entry((4, 6), (4, 6), (0, 0)), (7, 6), [1, 2, 0, 0, 3 / 7]),
        (entry((4, 6), (4, 6), (0, 0)), (2, 6), [0, 0, 0, 0, 0]),
        (entry((4, 4), (4, 4), (-4, 0)), None, [4, 0, 4, 0, 1]),
        (entry((8, 8), (4, 4), (-0.25, -0.25), step=0.5), None, [0, 0, 0, 0, 0]),
    ],
)
def test_padding_is_counted_on_every_side(
    made: StoreEntry, window: tuple[int, ...] | None, expected: list[float]
) -> None:
    assert list(measure_padding(made, window).values()) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(20, 26, 18), (11, 30, 16), (7, 7, 7)])
def test_padding_of_real_steps_is_what_they_added(shape: tuple[int, ...]) -> None:
    turned = np.diag([-1.0, 1.0, 2.0, 1.0])[:, [1, 0, 2, 3]]
    volume = Volume(np.random.default_rng(0).random((1, *shape)).astype(np.float32), turned, turned, shape)
    steps = [{"op": "ras"}, {"op": "pad_or_crop", "shape": [16, 16, 16]}]
    got = preprocess(volume, steps)
    made = StoreEntry(
        shape=got.shape,
        channels=1,
        minimum=(0.0,),
        affine=got.affine,
        native_affine=volume.native_affine,
        native_shape=shape,
        has_mask=False,
        fingerprint="",
        nbytes=0,
        metrics=None,
    )
    native = [shape[1], shape[0], shape[2]]  # ras swaps the first two axes
    inside = np.prod([min(n, 16) / 16 for n in native])
    assert measure_padding(made)["share"] == pytest.approx(1 - inside)


def test_one_field_of_view_has_one_size_and_no_padding() -> None:
    rng, sizes, shares = np.random.default_rng(0), set(), set()
    for _ in range(5):
        shape = tuple(int(n) for n in rng.integers(12, 20, 3))
        volume = Volume(rng.random((1, *shape)).astype(np.float32), np.eye(4), np.eye(4), shape)
        got = preprocess(volume, [{"op": "centre", "shape": [12, 10, 8]}])
        made = StoreEntry(
            shape=got.shape,
            channels=1,
            minimum=(0.0,),
            affine=got.affine,
            native_affine=np.eye(4),
            native_shape=shape,
            has_mask=False,
            fingerprint="",
            nbytes=0,
            metrics=None,
        )
        sizes.add(tuple(input_size(made).values()))
        shares.add(measure_padding(made, [12, 10, 8])["share"])
    assert len(sizes) == 1
    assert shares == {0.0}


def test_intensities_are_those_of_the_voxels() -> None:
    volume = Volume(np.arange(101.0, dtype=np.float32).reshape(1, 101, 1), np.eye(4), np.eye(4), (101, 1))
    found = input_intensity(volume)
    assert (found["mean"], found["p0"], found["p25"], found["p100"]) == (50, 0, 25, 100)
