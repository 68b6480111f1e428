from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medim.data.loading.datasets import LabelledDataset, ViewDataset
from medim.data.loading.store import Store
from medim.types import Array, Step, UsageError, UserError, Volume

AUGMENT: list[Step] = [
    {"op": "flip"},
    {"op": "affine", "probability": 0.8},
    {"op": "noise", "probability": 1.0},
    {"op": "intensity_scale"},
]


def volume(array: Array) -> Volume:
    return Volume(array, np.eye(4), np.eye(4), array.shape[1:])


def places(*shape: int) -> Array:
    """An image whose voxels tell where they are, exact in float16."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    out = Store(tmp_path)
    for n, shape in enumerate([(12, 10, 11), (6, 10, 20), (5, 4, 3)]):
        image = places(*shape)
        out.put(f"3d{n}", volume(image), volume((image % 3).astype(np.uint8)))
    for n in range(4):
        out.put(f"2d{n}", volume(places(28, 28) + n))
    return out


THREE = ["3d0", "3d1", "3d2"]
TWO = ["2d0", "2d1", "2d2", "2d3"]


class TestViews:
    def test_a_view_is_the_images_box_at_its_location(self, store: Store) -> None:
        data = ViewDataset(store, THREE, shape=(6, 6, 6), count=2)
        for i in range(2):
            whole = store.load_volume(THREE[i]).array
            for seed in range(10):
                image, location = data[i, seed]
                assert (image.shape, image.dtype) == ((2, 1, 6, 6, 6), torch.float32)
                assert (location.shape, location.dtype) == ((2, 3), torch.float32)
                for view, at in zip(image.numpy(), location.int().tolist(), strict=True):
                    np.testing.assert_array_equal(
                        view, whole[:, at[0] : at[0] + 6, at[1] : at[1] + 6, at[2] : at[2] + 6]
                    )

    def test_every_place_comes_up(self, store: Store) -> None:
        data = ViewDataset(store, THREE, shape=(6, 8, 10))
        seen = {tuple(data[0, seed][1][0].int().tolist()) for seed in range(400)}
        assert len(seen) == 7 * 3 * 2

    def test_a_small_image_is_centred_and_padded_with_its_minimum(self, store: Store) -> None:
        store.put("neg", volume(places(5, 4, 3) - 7))
        image, location = ViewDataset(store, ["neg"], shape=(8, 4, 6))[0, 0]
        assert location.tolist() == [[-1, 0, -1]]
        np.testing.assert_array_equal(image[0, :, 1:6, :, 1:4], places(5, 4, 3) - 7)
        outside = torch.ones_like(image[0], dtype=torch.bool)
        outside[:, 1:6, :, 1:4] = False
        assert (image[0][outside] == -7).all()

    def test_two_views_at_one_place_share_it_and_differ_by_augmentation(self, store: Store) -> None:
        apart = ViewDataset(store, THREE, shape=(6, 6, 6), count=2)
        together = ViewDataset(store, THREE, shape=(6, 6, 6), count=2, same_crop=True, augmentations=AUGMENT)
        assert any(not torch.equal(*apart[0, seed][1]) for seed in range(5))
        for seed in range(5):
            image, location = together[0, seed]
            assert torch.equal(*location)
            assert not torch.equal(*image)

    def test_the_seed_alone_decides_whatever_was_asked_before(self, store: Store) -> None:
        data = ViewDataset(store, TWO, shape=(20, 24), count=2, augmentations=AUGMENT)
        items = [(i, seed) for i in range(4) for seed in (0, 2**31)]
        expected = [data[item] for item in items]
        torch.manual_seed(5)
        again = ViewDataset(store, TWO, shape=(20, 24), count=2, augmentations=AUGMENT, cache_bytes=0)
        for item, (image, location) in reversed(list(zip(items, expected, strict=True))):
            other_image, other_location = again[item]
            assert torch.equal(image, other_image)
            assert torch.equal(location, other_location)

    def test_loading_processes_change_nothing(self, store: Store) -> None:
        data = ViewDataset(store, TWO, shape=(20, 20), augmentations=AUGMENT)
        items = [[(i % 4, 100 + i + n) for i in range(3)] for n in range(4)]
        alone = list(DataLoader(data, batch_sampler=items))  # type: ignore[arg-type]
        helped = list(DataLoader(data, batch_sampler=items, num_workers=2))  # type: ignore[arg-type]
        for (image, location), (other, place) in zip(alone, helped, strict=True):
            assert image.shape == (3, 1, 1, 20, 20)
            assert torch.equal(image, other)
            assert torch.equal(location, place)

    def test_what_fits_is_read_once_and_the_rest_in_boxes(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        boxes: list[object] = []
        read = Store.read_image
        monkeypatch.setattr(
            Store, "read_image", lambda self, key, box=None: boxes.append((key, box)) or read(self, key, box)
        )
        data = ViewDataset(store, THREE, shape=(4, 4, 3), cache_bytes=store.get_entry("3d0").nbytes + 100)
        for seed in range(3):
            for i in range(2):
                data[i, seed]
        assert boxes[0] == ("3d0", None)
        assert [key for key, box in boxes[1:]] == ["3d1"] * 3
        assert all(box is not None for key, box in boxes[1:])

    def test_a_loading_process_starts_with_an_empty_cache(self, store: Store) -> None:
        for n in range(30):
            store.put(f"big{n}", volume(np.random.default_rng(n).normal(size=(1, 64, 64))))
        data = ViewDataset(store, [f"big{n}" for n in range(30)], shape=(8, 8))
        empty = len(pickle.dumps(data))
        for i in range(30):
            data[i, 0]
        assert len(pickle.dumps(data)) < empty + 10_000

    def test_the_cached_image_is_never_written_to(self, store: Store) -> None:
        data = ViewDataset(store, TWO, shape=(28, 28))
        image, _ = data[0, 0]
        image.zero_()
        assert data[0, 0][0].max() > 0

    def test_a_batch_of_small_views_is_quick(self, store: Store) -> None:
        data = ViewDataset(store, TWO, shape=(24, 24))
        data[0, 0]
        took = []
        for round_ in range(5):
            start = time.process_time()
            for n in range(128):
                data[n % 4, n + round_]
            took.append(time.process_time() - start)
        assert min(took) < 0.05

    def test_an_image_of_other_dimensions_is_an_error_that_names_both(self, store: Store) -> None:
        with pytest.raises(UserError, match="3 numbers for a 3D image"):
            ViewDataset(store, THREE, shape=(8, 8))

    def test_no_images_are_an_error(self, store: Store) -> None:
        with pytest.raises(UserError, match="at least one image"):
            ViewDataset(store, [], shape=(8, 8))

    def test_a_misspelt_augmentation_names_the_nearest(self, store: Store) -> None:
        with pytest.raises(UsageError, match="Did you mean 'noise'"):
            ViewDataset(store, TWO, shape=(8, 8), augmentations=[{"op": "noize"}])


class TestLabelled:
    def test_a_class_goes_with_its_image(self, store: Store) -> None:
        data = LabelledDataset(store, TWO, [3, 0, 1, 1], shape=(28, 28))
        assert len(data) == 4
        for i, target in enumerate([3, 0, 1, 1]):
            image, got = data[i, 7]
            assert (image.shape, image.dtype) == ((1, 28, 28), torch.float32)
            assert (got.shape, got.dtype, got.item()) == ((), torch.int64, target)
            np.testing.assert_array_equal(image, store.load_volume(TWO[i]).array)

    def test_a_mask_is_cut_at_the_place_of_its_image(self, store: Store) -> None:
        data = LabelledDataset(store, THREE, shape=(8, 8, 8))
        for i in range(3):
            for seed in range(5):
                image, mask = data[i, seed]
                assert (mask.shape, mask.dtype) == ((8, 8, 8), torch.int64)
                inside = image[0] != 0
                assert inside.any()
                assert torch.equal(mask[inside], (image[0][inside] % 3).long())
                assert (mask[~inside] == 0).all()

    def test_geometry_moves_image_and_mask_alike_and_intensity_the_image_alone(self, store: Store) -> None:
        blob = np.zeros((1, 20, 20, 20), np.float32)
        blob[:, 5:15, 7:12, 3:16] = 1
        store.put("blob", volume(blob), volume(blob.astype(np.uint8)))
        data = LabelledDataset(store, ["blob"], shape=(20, 20, 20), augmentations=AUGMENT)
        plain = LabelledDataset(store, ["blob"], shape=(20, 20, 20))[0, 0][1]
        moved = 0
        for seed in range(10):
            image, mask = data[0, seed]
            assert set(mask.unique().tolist()) == {0, 1}
            assert ((image[0] > 0.5) == (mask == 1)).float().mean() > 0.97
            moved += int(not torch.equal(mask, plain))
        assert moved > 5
        assert torch.equal(data[0, 3][1], data[0, 3][1])

    def test_an_image_without_mask_is_an_error_that_counts(self, store: Store) -> None:
        with pytest.raises(UserError, match="4 of 4 images have no mask"):
            LabelledDataset(store, TWO, shape=(8, 8))

    def test_targets_for_other_images_are_refused(self, store: Store) -> None:
        with pytest.raises(UserError, match=r"one per image \(4\)"):
            LabelledDataset(store, TWO, [0, 1], shape=(8, 8))


class TestForegroundCrops:
    """Two lesions in the masks "aa" (3D) and "bb" (2D): class 1 of many voxels, class 3 of one."""

    @pytest.fixture
    def lesions(self, tmp_path: Path) -> Store:
        out = Store(tmp_path / "lesions")
        mask = np.zeros((1, 12, 13, 13), np.uint8)
        mask[0, :3, 9:12, 4:8], mask[0, 6, 6, 6] = 1, 3
        out.put("aa", volume(places(12, 13, 13)), volume(mask))
        out.put("bb", volume(places(12, 13)), volume(mask.max(-1)))
        out.put("empty", volume(places(12, 13, 13)), volume(0 * mask))
        return out

    @pytest.mark.parametrize(("key", "shape"), [("aa", (4, 5, 4)), ("bb", (4, 5))])
    def test_every_crop_has_a_voxel_of_a_class_at_its_centre_or_ends_at_the_border(
        self, lesions: Store, key: str, shape: tuple[int, ...]
    ) -> None:
        whole = lesions.read_mask(key)[0]
        data = LabelledDataset(lesions, [key], shape=shape, foreground_share=1.0)
        crops_of_small_class = 0
        for seed in range(60):
            image, mask = (tensor.numpy() for tensor in data[0, seed])
            first = np.unravel_index(int(image.min()), whole.shape)  # the voxels contain their positions
            box = tuple(slice(a, a + n) for a, n in zip(first, shape, strict=True))
            np.testing.assert_array_equal(mask, whole[box])
            centre = tuple(n // 2 for n in shape)
            if mask[centre] == 3:
                assert np.argwhere(mask == 3).tolist() == [list(centre)]
                crops_of_small_class += 1
            else:
                voxels = np.argwhere(whole == 1)
                limits = np.array(whole.shape) - shape
                assert (np.clip(voxels - centre, 0, limits) == first).all(1).any()
        assert 18 < crops_of_small_class < 42

    def test_the_share_is_a_probability_and_the_other_crops_are_those_of_share_0(self, lesions: Store) -> None:
        def build(share: float) -> LabelledDataset:
            return LabelledDataset(
                lesions, ["aa"], shape=(4, 5, 4), augmentations=[{"op": "noise"}], foreground_share=share
            )

        uniform, mixed, foreground = build(0.0), build(0.33), build(1.0)
        origins = []
        for seed in range(200):
            images = [data[0, seed][0] for data in (uniform, mixed, foreground)]
            origins.append([torch.equal(images[1], images[0]), torch.equal(images[1], images[2])])
        assert all(any(row) for row in origins)
        assert 46 < 200 - sum(is_uniform for is_uniform, _ in origins) < 86

    def test_the_seed_alone_determines_a_crop(self, lesions: Store) -> None:
        options: dict[str, Any] = {"shape": (4, 5, 4), "augmentations": AUGMENT, "foreground_share": 0.5}
        data = LabelledDataset(lesions, ["aa", "empty"], **options)
        items = [[(n % 2, 10 * n + k) for k in range(3)] for n in range(4)]
        expected = list(DataLoader(data, batch_sampler=items))  # type: ignore[arg-type]
        (lesions.folder / "aa" / "aa.foreground.b2nd").unlink()  # as in a store of an earlier version
        uncached = LabelledDataset(Store(lesions.folder), ["aa", "empty"], cache_bytes=0, **options)
        torch.manual_seed(5)
        batches = list(DataLoader(uncached, batch_sampler=items, num_workers=2))  # type: ignore[arg-type]
        for (image, mask), (other, its_mask) in zip(expected, batches, strict=True):
            assert torch.equal(image, other)
            assert torch.equal(mask, its_mask)

    @pytest.mark.parametrize(("key", "shape"), [("empty", (4, 5, 4)), ("aa", (12, 13, 13)), ("aa", (16, 13, 18))])
    def test_images_without_foreground_and_crops_of_whole_images_do_not_change(
        self, lesions: Store, key: str, shape: tuple[int, ...]
    ) -> None:
        uniform, foreground = (
            LabelledDataset(lesions, [key], shape=shape, augmentations=AUGMENT, foreground_share=share)
            for share in (0.0, 1.0)
        )
        for seed in range(3):
            for tensor, other in zip(uniform[0, seed], foreground[0, seed], strict=True):
                assert torch.equal(tensor, other)

    def test_an_axis_that_is_shorter_than_the_crop_is_padded_on_both_sides(self, lesions: Store) -> None:
        data = LabelledDataset(lesions, ["aa"], shape=(4, 17, 4), foreground_share=1.0)
        for seed in range(5):
            image, mask = data[0, seed]
            assert (image[0, :, :2] == 0).all()
            assert (image[0, :, -2:] == 0).all()
            assert (mask > 0).any()

    def test_lists_are_read_once_while_the_cache_has_room(
        self, lesions: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []
        read = Store.read_foreground
        monkeypatch.setattr(Store, "read_foreground", lambda self, key: calls.append(key) or read(self, key))
        for cache_bytes, expected in ((1 << 20, 1), (0, 5)):
            calls.clear()
            data = LabelledDataset(lesions, ["aa"], shape=(4, 4, 4), foreground_share=1.0, cache_bytes=cache_bytes)
            for seed in range(5):
                data[0, seed]
            assert len(calls) == expected
            assert len(pickle.loads(pickle.dumps(data))._images._foreground) == 0

    def test_targets_without_masks_are_refused(self, lesions: Store) -> None:
        with pytest.raises(ValueError, match="foreground_share: expected masks"):
            LabelledDataset(lesions, ["aa"], [0], shape=(4, 4, 4), foreground_share=0.1)
