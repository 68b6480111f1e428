from __future__ import annotations

import numpy as np

from medim.pictures.case import COLOURS, draw_case
from medim.pictures.slices import find_largest_slice
from medim.types import Array, Volume


def make_volume(array: Array, spacing: tuple[float, ...]) -> Volume:
    affine = np.diag([*spacing, *[1.0] * (4 - len(spacing))])
    return Volume(array[None].astype(np.float32), affine, affine, array.shape)


def make_ball(radius: float, shape: tuple[int, ...], centre: tuple[int, ...]) -> Array:
    place = np.indices(shape) - np.array(centre).reshape(-1, *[1] * len(shape))
    return (np.sqrt((place**2).sum(axis=0)) <= radius).astype(np.uint8)


def count_pixels(picture: Array, colour: tuple[int, int, int]) -> int:
    return int((picture == np.array(colour)).all(axis=-1).sum())


def test_the_slice_is_the_one_with_the_largest_area_or_the_middle() -> None:
    labels = make_ball(3, (20, 20, 10), (12, 5, 4))
    assert [find_largest_slice(labels.shape, labels, axis) for axis in range(3)] == [12, 5, 4]
    assert find_largest_slice((20, 20, 10), None, 2) == 5
    assert find_largest_slice((4, 4, 9), np.zeros((4, 4, 9), np.uint8), 2) == 4


def test_three_planes_have_the_proportions_of_the_patient_and_the_contour_of_each_class() -> None:
    grey = np.random.default_rng(0).normal(100, 5, (40, 30, 20))
    labels = make_ball(8, grey.shape, (15, 15, 10)) + make_ball(3, grey.shape, (15, 15, 10))
    volume = make_volume(grey, (1.0, 1.0, 2.0))
    plain = draw_case(volume, {"": None}, side=120)
    assert plain.size == (120 + 120 + 90 + 4 * 6, 120 + 2 * 6)  # 40 x 30, 40 x 40 and 30 x 40 mm at 3 pixels per mm
    assert not any(count_pixels(np.array(plain), colour) for colour in COLOURS)
    picture = np.array(draw_case(volume, {"image": None, "prediction": labels}, ("shell", "core"), side=120))
    shell, core = (count_pixels(picture, colour) for colour in COLOURS[:2])
    assert shell > core > 100


def test_the_left_of_a_slice_is_the_right_of_the_patient_and_its_top_the_front() -> None:
    grey = np.zeros((20, 20, 10))
    labels = np.zeros(grey.shape, np.uint8)
    labels[16:19, 14:17, 4:7] = 1  # to the right and front
    picture = np.array(draw_case(make_volume(grey, (1, 1, 1)), {"": labels}, ("x",), side=100))
    axial = (picture[6:106, 6:106] == np.array(COLOURS[0])).all(axis=-1)
    rows, columns = np.nonzero(axial)
    assert columns.max() < 30
    assert rows.max() < 40


def test_a_2d_picture_with_a_long_text_and_many_classes_is_wide_enough_for_both() -> None:
    labels = np.arange(64).reshape(8, 8) % 15
    classes = [f"class number {n}" for n in range(1, 15)]
    text = "probability of pneumonia 0.731, probability of effusion 0.02"
    picture = draw_case(make_volume(np.ones((8, 8)), (1, 1)), {"prediction": labels}, classes, side=64, text=text)
    assert picture.width > 300
    assert picture.height > 64 + 3 * 20
