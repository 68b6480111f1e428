from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.meta_tensor import MetaTensor
from monai.transforms.croppad.array import CropForeground, DivisiblePad, ResizeWithPadOrCrop, SpatialCrop, SpatialPad
from monai.transforms.intensity.array import NormalizeIntensity, ScaleIntensityRangePercentiles
from monai.transforms.io.array import LoadImage
from monai.transforms.spatial.array import Orientation, Resize, Spacing
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medim.data.preprocessing.geometry import straighten_axes
from medim.data.preprocessing.steps import (
    check_steps,
    fixed_spacing,
    preprocess,
    resample_mask,
    resample_to,
    restore_grid,
    to_native,
)
from medim.data.readers import read_volume
from medim.types import Array, Step, UsageError, UserError, Volume


def smooth_image(shape: tuple[int, ...], seed: int = 0, channels: int = 1) -> Array:
    noise = np.random.default_rng(seed).normal(size=(channels, *shape))
    smooth = np.stack([ndimage.gaussian_filter(channel, 1.5) for channel in noise])
    return (100 * smooth / smooth.std() + 300).astype(np.float32)


def affine_of(spacing: tuple[float, ...], turn: tuple[float, float, float] = (0, 0, 0)) -> Array:
    out = np.eye(4)
    if len(spacing) == 2:
        out[:2, :2] = np.diag(spacing)
    else:
        out[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ np.diag(spacing)
        out[:3, 3] = (-31.5, 12.25, -7.0)
    return out


def volume_of(array: Array, affine: Array | None = None) -> Volume:
    affine = np.eye(4) if affine is None else affine
    return Volume(array, affine, affine, array.shape[1:])


def as_meta(volume: Volume) -> MetaTensor:
    return MetaTensor(torch.from_numpy(volume.array), affine=torch.from_numpy(volume.affine))


def matrix(meta: MetaTensor) -> Array:
    return np.asarray(meta.affine.numpy())


OBLIQUE = (20.0, -14.0, 33.0)


class TestResample:
    @pytest.mark.parametrize("order", [0, 1, 3])
    @pytest.mark.parametrize("turn", [(0, 0, 0), OBLIQUE])
    @pytest.mark.parametrize("spacing", [(1.6, 1.5, 1.5), (0.6, 2.0, 1.0), (3.0, 0.9, 2.2)])
    def test_grid_and_values_are_those_of_monai_spacing(
        self, spacing: tuple[float, ...], turn: tuple[float, float, float], order: int
    ) -> None:
        volume = volume_of(smooth_image((22, 27, 19)), affine_of((1.0, 0.9, 2.1), turn))
        mode: str | int = {0: "nearest", 1: "bilinear", 3: 3}[order]
        padding = "nearest" if order == 3 else "border"
        expected = Spacing(spacing, mode=mode, padding_mode=padding)(as_meta(volume))
        got = preprocess(volume, [{"op": "resample", "spacing": spacing, "order": order}])
        assert got.array.shape == expected.shape
        np.testing.assert_allclose(got.affine, matrix(expected), atol=1e-9)
        difference = np.abs(got.array - expected.numpy()) / np.ptp(volume.array)
        assert difference.max() < 1e-5

    def test_2d_is_that_of_monai_spacing(self) -> None:
        volume = volume_of(smooth_image((40, 33)), affine_of((0.7, 0.5)))
        expected = Spacing((1.0, 1.1), mode="bilinear", padding_mode="border")(as_meta(volume))
        got = preprocess(volume, [{"op": "resample", "spacing": (1.0, 1.1)}])
        assert got.array.shape == expected.shape
        assert np.abs(got.array - expected.numpy()).max() < 1e-5 * np.ptp(volume.array)
        np.testing.assert_allclose(got.affine[:2, :2], matrix(expected)[:2, :2])

    def test_a_spacing_within_a_thousandth_changes_nothing(self) -> None:
        volume = volume_of(smooth_image((9, 8, 7)), affine_of((1.0004, 1.0, 0.9996)))
        got = preprocess(volume, [{"op": "resample", "spacing": (1, 1, 1)}])
        np.testing.assert_array_equal(got.array, volume.array)
        np.testing.assert_allclose(got.affine, volume.affine)

    def test_a_sheared_grid_is_straightened_and_points_stay_in_place(self) -> None:
        shear = np.eye(4)
        shear[0, 2] = 0.25
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in (24, 20, 16)), indexing="ij"), -1)
        world = grid @ shear[:3, :3].T
        volume = volume_of((world @ [1.0, 2.0, 3.0])[None].astype(np.float32), shear)
        got = preprocess(volume, [{"op": "orthogonalise_affine"}, {"op": "resample", "spacing": (1, 1, 1)}])
        axes = got.affine[:3, :3]
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
        index = np.stack(np.meshgrid(*(np.arange(n) for n in got.shape), indexing="ij"), -1)
        expected = (index @ axes.T + got.affine[:3, 3]) @ [1.0, 2.0, 3.0]
        inside = (index @ axes.T + got.affine[:3, 3]) @ np.linalg.inv(shear[:3, :3]).T
        inside = ((inside >= 0) & (inside <= np.array([23, 19, 15]))).all(-1)
        assert inside.mean() > 0.5
        np.testing.assert_allclose(got.array[0][inside], expected[inside], atol=1e-3)

    def test_antialiasing_removes_a_pattern_finer_than_the_new_grid(self) -> None:
        stripes = np.tile(np.array([0.0, 1.0], np.float32), 32)[None, :, None] * np.ones((1, 1, 32), np.float32)
        plain = preprocess(volume_of(stripes), [{"op": "resample", "spacing": (4, 1)}])
        clean = preprocess(volume_of(stripes), [{"op": "resample", "spacing": (4, 1), "antialias": True}])
        assert plain.array[:, :-1].max() == 0.0
        np.testing.assert_allclose(clean.array[:, 2:-2], 0.5, atol=0.02)

    def test_a_large_axis_aligned_volume_takes_no_general_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden(*_: object, **__: object) -> None:
            raise AssertionError("axis-aligned grids are interpolated one axis after another")

        monkeypatch.setattr(ndimage, "affine_transform", forbidden)
        volume = volume_of(smooth_image((20, 20, 20)), affine_of((1, 1, 1), OBLIQUE))
        preprocess(volume, [{"op": "resample", "spacing": (0.7, 1.3, 2)}])


class TestAffine:
    @pytest.mark.parametrize("scale", [1e-7, 1e-5, 4e-4])
    def test_oblique_series_land_on_one_grid_across_readers_once_orthogonal(self, scale: float) -> None:
        """Section 8d of the deployment design: rounding of direction cosines moved MONAI's grid by millimetres."""
        array = smooth_image((48, 40, 12))
        exact = affine_of((0.5, 0.5, 5.0), OBLIQUE)
        rng = np.random.default_rng(1)
        grids = []
        for _ in range(4):
            noisy = exact.copy()
            noisy[:3, :3] += rng.normal(scale=scale, size=(3, 3)) * [0.5, 0.5, 5.0]
            steps: list[Step] = [{"op": "orthogonalise_affine"}, {"op": "ras"}]
            straight = preprocess(volume_of(array, noisy), steps)
            grids.append(preprocess(straight, [{"op": "resample", "spacing": (1.5, 1.5, 3)}]))
            monai = Spacing((1.5, 1.5, 3), padding_mode="border")(as_meta(straight))
            np.testing.assert_allclose(matrix(monai), grids[-1].affine, atol=1e-6)
        extent = np.array([*(n - 1 for n in grids[0].shape), 1])
        for grid in grids[1:]:
            assert grid.shape == grids[0].shape
            for corner in ([0, 0, 0, 1], extent):
                assert np.abs(grid.affine @ corner - grids[0].affine @ corner).max() < max(200 * scale, 1e-6)

    def test_orthogonalising_keeps_lengths_and_the_first_voxel(self) -> None:
        noisy = affine_of((0.5, 0.9, 5.0), OBLIQUE)
        noisy[0, 1] += 3e-5
        straight = straighten_axes(noisy, 3)
        gram = straight[:3, :3].T @ straight[:3, :3]
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-12)
        np.testing.assert_allclose(np.sqrt(np.diag(gram)), np.linalg.norm(noisy[:3, :3], axis=0), rtol=1e-12)
        np.testing.assert_array_equal(straight[:3, 3], noisy[:3, 3])

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
    @pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (-1, -1, 1)])
    def test_ras_is_monai_orientation(self, order: tuple[int, ...], signs: tuple[int, ...]) -> None:
        affine = affine_of((1.0, 1.2, 2.0), (12.0, -8.0, 15.0))
        affine[:3, :3] = (affine[:3, :3] * np.array(signs))[:, order]
        volume = volume_of(smooth_image((7, 9, 11), channels=2), affine)
        expected = Orientation("RAS", labels=None)(as_meta(volume))
        got = preprocess(volume, [{"op": "ras"}])
        np.testing.assert_array_equal(got.array, expected.numpy())
        np.testing.assert_allclose(got.affine, matrix(expected), atol=1e-9)

    def test_an_affine_without_volume_is_an_error_that_says_so(self) -> None:
        flat = np.eye(4)
        flat[2, 2] = 0
        with pytest.raises(UserError, match="expected linearly independent axes"):
            preprocess(volume_of(smooth_image((4, 4, 4)), flat), [{"op": "orthogonalise_affine"}])


class TestIntensity:
    @pytest.mark.parametrize("shape", [(30, 20), (12, 14, 10)])
    def test_clip_and_range_are_monai_scale_intensity_range_percentiles(self, shape: tuple[int, ...]) -> None:
        array = np.random.default_rng(0).gamma(1.0, 4000.0, size=(1, *shape)).astype(np.float32)
        expected = ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True)(torch.from_numpy(array))
        steps: list[Step] = [{"op": "clip_percentiles"}, {"op": "normalise", "method": "range"}]
        np.testing.assert_allclose(preprocess(volume_of(array), steps).array, expected, atol=1e-5)

    def test_symmetric_runs_from_minus_one_to_one(self) -> None:
        array = smooth_image((9, 10), channels=2) * np.array([1, 1e4], np.float32).reshape(2, 1, 1)
        half, full = (
            preprocess(volume_of(array), [{"op": "normalise", "method": method}]).array
            for method in ("range", "symmetric")
        )
        np.testing.assert_allclose(full, 2 * half - 1, atol=1e-6)

    def test_zscore_is_monai_normalize_intensity_channel_by_channel(self) -> None:
        array = smooth_image((9, 10, 11), channels=2) * np.array([1, 1e4], np.float32).reshape(2, 1, 1, 1)
        expected = NormalizeIntensity(channel_wise=True)(torch.from_numpy(array))
        np.testing.assert_allclose(preprocess(volume_of(array), [{"op": "normalise"}]).array, expected, atol=1e-4)

    @pytest.mark.parametrize("value", [0.0, 7.3, -1.7e6])
    @pytest.mark.parametrize("method", ["zscore", "range", "symmetric"])
    def test_a_constant_image_becomes_zeros(self, method: str, value: float) -> None:
        volume = volume_of(np.full((1, 11, 13, 7), value, np.float32))
        got = preprocess(volume, [{"op": "clip_percentiles"}, {"op": "normalise", "method": method}])
        np.testing.assert_array_equal(got.array, 0.0)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_voxels_that_are_no_numbers_are_counted_in_the_error(self, bad: float) -> None:
        array = smooth_image((5, 5, 5))
        array[0, 1, 2, 3:5] = bad
        with pytest.raises(UserError, match="2 of 125"):
            preprocess(volume_of(array), [])


class TestShape:
    @pytest.mark.parametrize("shape", [(12, 20), (7, 9), (5, 30)])
    def test_pad_or_crop_is_monai_resize_with_pad_or_crop(self, shape: tuple[int, ...]) -> None:
        array = smooth_image((10, 13))
        monai = ResizeWithPadOrCrop(shape, value=float(array.min()))(as_meta(volume_of(array)))
        got = preprocess(volume_of(array), [{"op": "pad_or_crop", "shape": shape}])
        np.testing.assert_array_equal(got.array, monai.numpy())
        np.testing.assert_allclose(got.affine, matrix(monai))

    def test_pad_to_multiple_is_monai_divisible_pad(self) -> None:
        volume = volume_of(smooth_image((13, 16, 21)))
        monai = DivisiblePad(8, value=float(volume.array.min()))(as_meta(volume))
        got = preprocess(volume, [{"op": "pad_to_multiple", "multiple": 8}])
        np.testing.assert_array_equal(got.array, monai.numpy())
        np.testing.assert_allclose(got.affine, matrix(monai))

    def test_crop_foreground_is_monai_crop_foreground(self) -> None:
        array = np.zeros((1, 20, 18, 16), np.float32)
        array[:, 5:12, 3:17, 6:9] = smooth_image((7, 14, 3))
        volume = volume_of(array, affine_of((1, 2, 3), OBLIQUE))
        monai = CropForeground(margin=2, allow_smaller=True)(as_meta(volume))
        got = preprocess(volume, [{"op": "crop_foreground", "margin": 2}])
        np.testing.assert_array_equal(got.array, monai.numpy())
        np.testing.assert_allclose(got.affine, matrix(monai), atol=1e-9)

    def test_centre_is_monai_spatial_crop_around_the_centre_of_mass(self) -> None:
        array = np.zeros((1, 20, 18, 16), np.float32)
        array[:, 11:17, 3:9, 6:13] = np.abs(smooth_image((6, 6, 7)))
        volume, shape = volume_of(array - 5, affine_of((1, 2, 3), OBLIQUE)), (8, 6, 9)
        mass = np.array(ndimage.center_of_mass(array[0]))
        start = np.rint(mass - (np.array(shape) - 1) / 2).astype(int)
        monai = SpatialCrop(roi_start=start, roi_end=start + shape)(as_meta(volume))
        got = preprocess(volume, [{"op": "centre", "shape": shape}])
        np.testing.assert_array_equal(got.array, monai.numpy())
        np.testing.assert_allclose(got.affine, matrix(monai), atol=1e-9)

    def test_centre_continues_the_edge_of_a_smaller_image_as_monai_does(self) -> None:
        volume = volume_of(smooth_image((10, 13)))
        monai = SpatialPad((15, 20), mode="edge")(as_meta(volume))
        got = preprocess(volume, [{"op": "centre", "shape": (15, 20)}])
        np.testing.assert_array_equal(got.array, monai.numpy())
        np.testing.assert_allclose(got.affine, matrix(monai))

    def test_centre_stays_inside_the_image_wherever_it_fits(self) -> None:
        array = np.zeros((1, 12, 12), np.float32)
        array[0, 11, 0] = 1
        got = preprocess(volume_of(array), [{"op": "centre", "shape": (6, 6)}])
        np.testing.assert_array_equal(got.array, array[:, 6:, :6])

    def test_centre_finds_the_same_place_however_the_crop_was_cut_and_scaled(self) -> None:
        array = np.zeros((2, 30, 30), np.float32)
        array[:, 12:18, 10:20] = 100 + smooth_image((6, 10), channels=2)
        array[1] *= 1000
        whole = preprocess(volume_of(array), [{"op": "centre", "shape": (8, 12)}])
        cut = preprocess(volume_of(3 * array[:, 5:27, 2:29] + 7), [{"op": "centre", "shape": (8, 12)}])
        np.testing.assert_allclose(cut.array, 3 * whole.array + 7, rtol=1e-6)

    def test_resize_is_monai_resize(self) -> None:
        volume = volume_of(smooth_image((30, 41, 20)))
        expected = Resize((24, 50, 33), mode="trilinear")(as_meta(volume))
        steps: list[Step] = [{"op": "resize", "shape": (24, 50, 33), "keep_aspect": False, "antialias": False}]
        got = preprocess(volume, steps)
        assert np.abs(got.array - expected.numpy()).max() < 1e-5 * np.ptp(volume.array)
        np.testing.assert_allclose(got.affine, matrix(expected), atol=1e-9)

    def test_shrinking_an_xray_is_monai_resize_with_antialiasing_inside_and_better_at_the_edge(self) -> None:
        array = smooth_image((512, 512)) + 200 * np.random.default_rng(3).normal(size=(1, 512, 512)).astype(np.float32)
        expected = Resize((64, 64), mode="bilinear", anti_aliasing=True)(as_meta(volume_of(array))).numpy()
        got = preprocess(volume_of(array), [{"op": "resize", "shape": (64, 64)}]).array
        inside = (slice(None), slice(3, -3), slice(3, -3))
        assert np.abs(got - expected)[inside].max() < 0.005 * np.ptp(array)
        white = np.ones((1, 512, 512), np.float32)
        got = preprocess(volume_of(white), [{"op": "resize", "shape": (64, 64)}]).array
        np.testing.assert_allclose(got, 1.0, atol=1e-6)  # MONAI darkens its edges to 0.6

    @pytest.mark.parametrize("shape", [(100, 60), (60, 100), (31, 31)])
    def test_resize_keeps_the_aspect_ratio_by_padding(self, shape: tuple[int, int]) -> None:
        array = np.full((1, *shape), 5.0, np.float32)
        array[0, 0, 0] = 1.0
        got = preprocess(volume_of(array, affine_of((0.5, 0.5))), [{"op": "resize", "shape": (64, 64)}])
        assert got.shape == (64, 64)
        filled = (got.array[0] > got.array.min()).any(1).sum(), (got.array[0] > got.array.min()).any(0).sum()
        assert max(filled) == 64
        assert min(filled) == pytest.approx(64 * min(shape) / max(shape), abs=1)
        assert got.spacing == pytest.approx((0.5 * max(shape) / 64,) * 2, rel=0.02)


STEPS_FOR_ROUND_TRIPS: list[Step] = [
    {"op": "pad_or_crop", "shape": (24, 32, 24)},
    {"op": "pad_to_multiple", "multiple": 8},
    {"op": "crop_foreground", "margin": 1},
    {"op": "centre", "shape": (24, 32, 24)},
    {"op": "ras"},
    {"op": "orthogonalise_affine"},
]


class TestWayBack:
    @settings(max_examples=40, deadline=None)
    @given(
        steps=st.lists(st.sampled_from(STEPS_FOR_ROUND_TRIPS), min_size=1, max_size=4),
        shape=st.tuples(*[st.integers(9, 21)] * 3),
        seed=st.integers(0, 99),
        turned=st.booleans(),
        crop=st.booleans(),
    )
    def test_whole_voxel_steps_come_back_bit_equal_where_they_kept_the_voxel(
        self, steps: list[Step], shape: tuple[int, ...], seed: int, turned: bool, crop: bool
    ) -> None:
        array = np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)
        affine = affine_of((0.8, 1.0, 3.0), (8.0, -9.0, 12.0) if turned else (0, 0, 0))
        affine[:3, :3] = affine[:3, [1, 0, 2]] * [1, -1, 1]
        affine[0, 1] += 1e-6  # as read from a header
        source = volume_of(array, affine)
        processed = preprocess(source, [*steps, {"op": "pad_or_crop", "shape": (8, 7, 9)}] if crop else steps)
        back = restore_grid(processed.array, processed, source, fill=np.nan)
        kept = ~np.isnan(back)
        assert kept.any()
        np.testing.assert_array_equal(back[kept], array[kept])
        if not crop:
            assert kept[array > array.min()].all()

    def test_a_smooth_image_survives_resampling_and_back(self) -> None:
        source = volume_of(
            ndimage.gaussian_filter(smooth_image((30, 28, 26)), (0, 3, 3, 3)), affine_of((1, 1, 1), OBLIQUE)
        )
        steps: list[Step] = [
            {"op": "orthogonalise_affine"},
            {"op": "ras"},
            {"op": "resample", "spacing": (0.9, 1.2, 0.8)},
            {"op": "pad_to_multiple", "multiple": 16},
        ]
        processed = preprocess(source, steps)
        back = restore_grid(processed.array, processed, source)
        assert back.shape == source.array.shape
        assert np.abs(back - source.array)[:, 1:-1, 1:-1, 1:-1].max() < 0.03 * np.ptp(source.array)

    def test_a_mask_follows_its_image_and_restores_to_itself_on_a_finer_grid(self) -> None:
        image = volume_of(smooth_image((14, 15, 13)), affine_of((2, 2, 2), OBLIQUE))
        labels = (image.array > 330).astype(np.uint8) + (image.array > 400)
        mask = volume_of(labels, image.affine)
        processed = preprocess(
            image, [{"op": "resample", "spacing": (1, 1, 1)}, {"op": "pad_to_multiple", "multiple": 8}]
        )
        moved = resample_mask(mask, processed)
        assert moved.array.dtype == np.uint8
        assert moved.array.shape == processed.array.shape
        assert set(np.unique(moved.array)) == {0, 1, 2}
        np.testing.assert_array_equal(restore_grid(moved.array, processed, image, order=0), labels)

    def test_a_result_on_another_grid_is_refused(self) -> None:
        volume = volume_of(smooth_image((5, 6, 7)))
        with pytest.raises(UserError, match="expected an array on the grid"):
            restore_grid(np.zeros((1, 5, 6, 8)), volume, volume)

    @pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
    @pytest.mark.parametrize("flips", [(), (0,), (1, 2)])
    def test_to_native_undoes_a_readers_turning(self, axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
        native = np.random.default_rng(0).normal(size=(2, 6, 7, 8)).astype(np.float32)
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for new, old in enumerate(axes):
            turn[old, new] = -1 if old in flips else 1
            turn[old, 3] = native.shape[old + 1] - 1 if old in flips else 0
        affine = affine_of((0.4, 0.9, 3), OBLIQUE)
        array = np.flip(native, tuple(f + 1 for f in flips)).transpose(0, *(a + 1 for a in axes))
        volume = Volume(array, affine @ turn, affine, native.shape[1:])
        np.testing.assert_array_equal(to_native(array, volume), native)

    def test_to_native_refuses_a_resampled_grid(self) -> None:
        volume = volume_of(smooth_image((6, 6, 6)))
        processed = preprocess(volume, [{"op": "resample", "spacing": (1.5, 1.5, 1.5)}])
        with pytest.raises(UserError, match="restore"):
            to_native(processed.array, processed)


class TestResampleTo:
    @settings(max_examples=40, deadline=None)
    @given(shift=st.tuples(*[st.integers(-6, 6)] * 3), order=st.sampled_from([0, 1, 3]))
    def test_a_whole_offset_is_copied_exactly(self, shift: tuple[int, ...], order: int) -> None:
        array = np.random.default_rng(0).normal(size=(1, 6, 5, 4)).astype(np.float32)
        affine = affine_of((0.7, 1.1, 4.0), OBLIQUE)
        target = affine.copy()
        target[:3, 3] += affine[:3, :3] @ shift
        got = resample_to(array, affine, target, array.shape[1:], order=order, fill=-9.0)
        expected = np.full_like(array, -9.0)
        for index in np.ndindex(array.shape[1:]):
            source = np.add(index, shift)
            if (source >= 0).all() and (source < array.shape[1:]).all():
                expected[0][index] = array[0][tuple(source)]
        np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("fill", ["edge", -50.0])
    def test_turned_grids_agree_with_point_by_point_interpolation(self, fill: str | float) -> None:
        array = smooth_image((16, 14, 12))
        source, target = affine_of((1, 1.2, 0.9)), affine_of((0.8, 0.8, 0.8), OBLIQUE)
        got = resample_to(array, source, target, (9, 8, 7), fill=fill)  # type: ignore[arg-type]
        to_source = np.linalg.inv(source) @ target
        index = np.stack([*np.meshgrid(*(np.arange(n) for n in (9, 8, 7)), indexing="ij"), np.ones((9, 8, 7))])
        place = np.einsum("ij,jabc->iabc", to_source, index)[:3]
        expected = ndimage.map_coordinates(array[0], place, order=1, mode="nearest")
        if fill != "edge":
            top = np.array(array.shape[1:]).reshape(3, 1, 1, 1) - 0.5
            expected[((place < -0.5) | (place > top)).any(0)] = fill
        np.testing.assert_allclose(got[0], expected, atol=1e-3)


class TestList:
    def test_a_misspelt_step_names_the_nearest(self) -> None:
        with pytest.raises(UsageError, match="Did you mean 'resample'"):
            check_steps([{"op": "resampel", "spacing": [1, 1, 1]}])

    def test_a_misspelt_option_names_the_nearest(self) -> None:
        with pytest.raises(UsageError, match="Did you mean 'spacing'"):
            check_steps([{"op": "resample", "spacings": [1, 1, 1]}])

    def test_a_value_of_the_wrong_type_is_refused(self) -> None:
        with pytest.raises(UsageError, match="expected"):
            check_steps([{"op": "normalise", "method": "minmax"}])

    @pytest.mark.parametrize(
        "step",
        [
            {"op": "resample", "spacing": [1, 0, 1]},
            {"op": "pad_or_crop", "shape": [8, -8, 8]},
            {"op": "centre", "shape": [8, 0, 8]},
            {"op": "pad_to_multiple", "multiple": 0},
            {"op": "crop_foreground", "margin": -1},
            {"op": "clip_percentiles", "lower": 60, "upper": 40},
        ],
    )
    def test_a_value_out_of_range_is_refused(self, step: Step) -> None:
        with pytest.raises(UsageError, match="expected"):
            preprocess(volume_of(smooth_image((4, 4, 4))), [step])

    def test_a_step_for_volumes_says_so_to_a_2d_image(self) -> None:
        with pytest.raises(UserError, match="2 numbers for a 2D image"):
            preprocess(volume_of(smooth_image((4, 4))), [{"op": "resample", "spacing": [1, 1, 1]}])


def test_the_real_hippocampus_gets_the_same_voxels_from_monai(shared_data: Path) -> None:
    path = sorted((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))[0]
    image = nibabel.load(path)
    volume = volume_of(np.asarray(image.dataobj, np.float32)[None], image.affine)
    monai: list[Callable[[MetaTensor], MetaTensor]] = [
        Orientation("RAS", labels=None),
        Spacing((1.2, 1.2, 1.2), padding_mode="border"),
        ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True),
    ]
    expected = as_meta(volume)
    for transform in monai:
        expected = transform(expected)
    steps: list[Step] = [
        {"op": "orthogonalise_affine"},
        {"op": "ras"},
        {"op": "resample", "spacing": (1.2, 1.2, 1.2)},
        {"op": "clip_percentiles"},
        {"op": "normalise", "method": "range"},
    ]
    got = preprocess(volume, steps)
    assert got.array.shape == expected.shape
    assert np.abs(got.array - expected.numpy()).max() < 1e-5


def test_a_real_oblique_series_lands_on_one_grid_whichever_reader_loads_it(shared_data: Path) -> None:
    """Without the first step MONAI puts the grids of these two readers 0.9 mm apart."""
    folder = shared_data / "mri-dicom" / "Study1" / "36459-FLAIRreg-76244"
    theirs = LoadImage(reader="PydicomReader", ensure_channel_first=True)(folder)
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    itk = SimpleITK.ReadImage(names)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(itk.GetDirection(), (3, 3)) @ np.diag(itk.GetSpacing())
    affine[:3, 3] = itk.GetOrigin()
    array = SimpleITK.GetArrayFromImage(itk).transpose(2, 1, 0)[None].astype(np.float32)
    steps: list[Step] = [
        {"op": "orthogonalise_affine"},
        {"op": "ras"},
        {"op": "resample", "spacing": (1.5, 1.5, 3)},
    ]
    ours = preprocess(read_volume(folder), steps)
    for other in (
        volume_of(theirs.numpy(), theirs.affine.numpy()),
        volume_of(array, np.diag([-1, -1, 1, 1]) @ affine),
    ):
        got = preprocess(other, steps)
        assert got.shape == ours.shape
        np.testing.assert_allclose(got.affine, ours.affine, atol=1e-3)
        assert np.abs(got.array - ours.array).max() < 1e-3 * np.ptp(ours.array)


@pytest.mark.parametrize(
    ("steps", "spacing"),
    [
        ([{"op": "ras"}, {"op": "resample", "spacing": [1, 1, 2.5]}, {"op": "normalise"}], [1.0, 1.0, 2.5]),
        ([{"op": "ras"}, {"op": "normalise"}], None),
        ([{"op": "resample", "spacing": [1, 1]}, {"op": "resize", "shape": [32, 32]}], None),
        ([{"op": "resample", "spacing": [1, 1, 2]}, {"op": "ras"}], None),  # whose axis it was depends on the image
        ([], None),
    ],
)
def test_the_spacing_is_fixed_where_the_last_step_on_the_grid_resamples(
    steps: list[Step], spacing: list[float] | None
) -> None:
    assert fixed_spacing(steps) == spacing
