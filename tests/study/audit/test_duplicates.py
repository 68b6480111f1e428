from __future__ import annotations

import numpy as np
import pytest

from medim.data.fingerprints import compute_fingerprint
from medim.data.preprocessing.quality import measure_quality
from medim.study.audit.duplicates import NearDuplicate, find_duplicates
from medim.types import Array, Split, Volume


def volume_of(array: Array) -> Volume:
    return Volume(array[None].astype(np.float32), np.eye(4), np.eye(4), array.shape)


@pytest.fixture
def pictures() -> dict[str, Volume]:
    """Four people; of the first a copy on another scale and a noisy one, and an image of nothing."""
    rng = np.random.default_rng(0)
    people = {name: rng.normal(size=(7, 7)).repeat(8, 0).repeat(8, 1) * 100 for name in "abcd"}
    noisy = people["a"] + rng.normal(0, 2, people["a"].shape)
    made = {**people, "copy": 3 * people["a"] + 7, "noisy": noisy, "empty": np.zeros((56, 56))}
    return {name: volume_of(array) for name, array in made.items()}


def found(pictures: dict[str, Volume], held: set[str]) -> tuple[tuple[tuple[str, ...], ...], set[tuple[str, str]]]:
    splits: dict[str, Split] = {name: "val" if name in held else "train" for name in pictures}
    prints = {name: compute_fingerprint(volume) for name, volume in pictures.items()}
    got = find_duplicates(splits, prints, {name: measure_quality(volume) for name, volume in pictures.items()})
    assert (got.images, got.n_unhashed) == (7, 1)
    assert all(
        isinstance(pair, NearDuplicate) and 0 <= pair.hamming_distance <= got.max_hamming_distance for pair in got.near
    )
    return got.exact, {(pair.train_image, pair.other_image) for pair in got.near}


def test_a_copy_on_the_other_side_is_found_under_another_scale(pictures: dict[str, Volume]) -> None:
    exact, near = found(pictures, {"copy", "b"})
    assert exact == (("a", "copy"),)
    assert near == {("noisy", "copy")}


def test_a_noisy_copy_on_the_other_side_is_a_lookalike(pictures: dict[str, Volume]) -> None:
    exact, near = found(pictures, {"noisy"})
    assert exact == ()
    assert near == {("a", "noisy"), ("copy", "noisy")}


def test_copies_on_one_side_are_no_leak(pictures: dict[str, Volume]) -> None:
    assert found(pictures, {"c", "d"}) == ((), set())
