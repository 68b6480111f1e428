"""Look-alikes: copies, crops, other grey levels and repeated scans are found among strangers, and strangers are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from medim.data import lookalikes
from medim.data.lookalikes import LookAlikes, build_map, check_false_pairs, choose_map_spacing, find_lookalikes
from medim.data.readers import read_volume
from medim.types import Array, UsageError, Volume

RNG = np.random.default_rng(0)
SHAPES = {2: (120, 96), 3: (24, 22, 18)}


def make_person(dims: int, rng: np.random.Generator) -> Array:
    """A body of the common anatomy (a large ellipsoid) with details of its own."""
    shape = SHAPES[dims]
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    body = 100.0 * (sum(axis**2 for axis in grid) < 0.7)
    details = ndimage.gaussian_filter(rng.normal(size=shape), 3 if dims == 2 else 1.5)
    return np.asarray(body + 40 * details / details.std() * (body > 0))


def make_volume(array: Array) -> Volume:
    """An image with cells of 2.5 mm."""
    affine = np.diag([2.5, 2.5, 2.5, 1.0])
    return Volume(array[None].astype(np.float32), affine, affine, array.shape)


CHANGES: dict[str, Callable[[Array], Array]] = {
    "copy": lambda image: image,
    "other scale": lambda image: 3.7 * image + 250,
    "gamma": lambda image: np.sign(image) * np.abs(image) ** 0.6,
    "inverted": lambda image: image.max() - image,
    "noise": lambda image: image + RNG.normal(0, 8, image.shape),
    "crop": lambda image: image[tuple(slice(2, n - 1) for n in image.shape)],
    "larger crop of one side": lambda image: image[: image.shape[0] - 4],
    "moved": lambda image: np.roll(image, 2, axis=0),
}


@cache
def make_strangers(dims: int) -> tuple[list[Array], list[Array]]:
    """Images of 40 people, and their maps."""
    rng = np.random.default_rng(3)
    people = [make_person(dims, rng) for _ in range(40)]
    return people, [build_map(make_volume(image), 2.5) for image in people]


def search(dims: int, change: Callable[[Array], Array] | None, count: int = 40) -> LookAlikes:
    """Search strangers, and a changed image of the fifth one as the last, if any."""
    people, maps = make_strangers(dims)
    maps = maps[:count] if change is None else [*maps[:count], build_map(make_volume(change(people[5])), 2.5)]
    return find_lookalikes(maps, [str(number) for number in range(len(maps))])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_no_stranger_is(change: str, dims: int) -> None:
    result = search(dims, CHANGES[change])
    assert [(pair.first, pair.second) for pair in result.pairs] == [(5, 40)]
    assert result.pairs[0].correlation >= result.threshold
    assert result.n_compared == 41 * 40 // 2


@pytest.mark.parametrize("dims", [2, 3])
def test_strangers_alone_are_no_look_alikes(dims: int) -> None:
    result = search(dims, None)
    assert result.pairs == ()
    assert result.false_pairs == lookalikes.FALSE_PAIRS


def test_of_a_few_images_only_near_copies_are_reported() -> None:
    result = search(2, CHANGES["noise"], count=6)
    assert [(pair.first, pair.second) for pair in result.pairs] == [(5, 6)]
    assert (result.false_pairs, result.threshold) == (None, pytest.approx(lookalikes.MIN_CORRELATION))
    assert np.isnan(result.pairs[0].deviation)


def test_one_image_or_none_has_no_look_alike() -> None:
    image = build_map(make_volume(make_person(2, RNG)), 2.5)
    assert find_lookalikes([], []).pairs == find_lookalikes([image], ["a"]).pairs == ()


def test_constant_images_are_not_alike() -> None:
    flat = [build_map(make_volume(np.full((20, 20), 7.0)), 2.5)] * 3
    assert find_lookalikes(flat, list("abc")).pairs == ()


def test_a_large_source_is_searched_by_candidates_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    (full,) = search(2, CHANGES["moved"]).pairs
    monkeypatch.setattr(lookalikes, "_EXHAUSTIVE_FLOPS", 0)
    monkeypatch.setattr(lookalikes, "_BLOCK_ROWS", 16)
    (pair,) = search(2, CHANGES["moved"]).pairs
    assert (pair.first, pair.second) == (full.first, full.second)
    assert pair.correlation == pytest.approx(full.correlation, abs=1e-5)


def test_volumes_of_other_orientation_and_voxels_are_compared_in_mm() -> None:
    people, maps = make_strangers(3)
    turned = np.flip(people[4], 0).transpose(2, 0, 1)
    affine = np.array([[0, -2.5, 0, 57.5], [0, 0, 2.5, 0], [2.5, 0, 0, 0], [0, 0, 0, 1.0]])
    volume = Volume(turned[None].astype(np.float32), affine, affine, turned.shape)
    pairs = find_lookalikes([*maps, build_map(volume, 2.5)], list(map(str, range(41)))).pairs
    assert [(pair.first, pair.second) for pair in pairs] == [(4, 40)]


def test_repeated_scans_of_one_subject_do_not_hide_a_copy_under_another_name() -> None:
    rng = np.random.default_rng(2)
    people = [make_person(2, rng) for _ in range(25)]
    scans = [person + rng.normal(0, 5, person.shape) for person in people for _ in range(2)]
    maps = [build_map(make_volume(image), 2.5) for image in (*scans, people[3])]
    pairs = find_lookalikes(maps, [*(str(number // 2) for number in range(50)), "other"]).pairs
    assert {(6, 50), (7, 50), (6, 7)} <= {(pair.first, pair.second) for pair in pairs}
    assert len(pairs) == 25 + 2


def test_the_map_spacing_follows_the_median_volume() -> None:
    assert choose_map_spacing([(50, 50, 50)] * 3) == lookalikes.FINEST_SPACING
    spacing = choose_map_spacing([(240, 240, 180)])
    assert 240 * 240 * 180 / spacing**3 == pytest.approx(lookalikes.VOLUME_CELLS)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_number_of_false_pairs_that_cannot_be_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="--false-pairs"):
        check_false_pairs(value)


def test_one_scan_under_two_names_is_found(shared_data: Path) -> None:
    folder = shared_data / "mri-left-atrium-twins"
    maps = [build_map(read_volume(folder / f"{name}.nii.gz"), 2.5) for name in ("first", "second")]
    (pair,) = find_lookalikes(maps, ["first", "second"]).pairs
    assert pair.correlation > 0.95
