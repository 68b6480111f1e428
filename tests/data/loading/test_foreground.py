from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from medim.data.loading import foreground as module
from medim.data.loading.foreground import ForegroundVoxels, list_foreground
from medim.types import Array


def voxels_of_class(foreground: ForegroundVoxels, k: int) -> Array:
    start = int(foreground.counts[:k].sum())
    return foreground.indices[start : start + int(foreground.counts[k])]


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("shape", [(9, 11), (7, 8, 9)])
def test_small_classes_are_listed_completely(
    shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_VALUES", block)
    mask = np.random.default_rng(0).choice([0, 0, 0, 2, 7], shape).astype(np.uint8)
    foreground = list_foreground(mask)
    assert foreground.shape == shape
    assert foreground.classes.tolist() == [2, 7]
    for k, value in enumerate((2, 7)):
        np.testing.assert_array_equal(voxels_of_class(foreground, k), np.flatnonzero(mask == value))
    assert foreground.is_valid()


def test_large_classes_are_sampled_and_the_mask_alone_determines_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLASS_VOXELS", 50)
    mask = np.random.default_rng(0).choice([1, 2], (20, 20, 20), p=[0.997, 0.003]).astype(np.uint8)
    foreground = list_foreground(mask)
    monkeypatch.setattr(module, "BLOCK_VALUES", 999)
    again = list_foreground(np.asfortranarray(mask))
    sample = voxels_of_class(foreground, 0)
    assert foreground.counts.tolist() == [50, (mask == 2).sum()]
    assert (mask.ravel()[sample] == 1).all()
    assert (np.diff(sample.astype(int)) > 0).all()
    assert sample.max() > 6000  # of the whole mask, not of its beginning
    np.testing.assert_array_equal(foreground.indices, again.indices)


def test_classes_have_equal_probability_whatever_their_size() -> None:
    mask = np.ones((10, 10, 10), np.uint8)
    mask[3, 4, 5], mask[0, 0, 0] = 2, 0
    foreground, rng = list_foreground(mask), np.random.default_rng(0)
    voxels = [foreground.draw_voxel(rng) for _ in range(400)]
    assert 160 < sum(voxel == (3, 4, 5) for voxel in voxels) < 240
    assert len(set(voxels)) > 150
    assert (0, 0, 0) not in voxels


def test_a_mask_of_background_has_no_voxel_to_draw() -> None:
    foreground = list_foreground(np.zeros((4, 5), np.uint8))
    assert foreground.draw_voxel(np.random.default_rng(0)) is None
    assert foreground.is_valid()


def test_the_memory_does_not_grow_with_the_mask() -> None:
    mask = np.ones((8, 1024, 1024), np.uint8)
    tracemalloc.start()
    foreground = list_foreground(mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert foreground.counts.tolist() == [10_000]
    assert peak < 5 * mask.nbytes  # eight bytes per voxel for all positions at once
