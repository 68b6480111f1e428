"""What every preprocessing step keeps to, whichever it is."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from medim.data.preprocessing.steps import STEPS, check_steps, preprocess, restore_grid
from medim.types import Array, UsageError, Volume

OPTIONS: dict[str, dict[int, dict[str, Any]]] = {  # a step that needs options: what to give in 2D and in 3D
    "resample": {2: {"spacing": [1.3, 0.9]}, 3: {"spacing": [1.3, 0.9, 1.7]}},
    "resize": {2: {"shape": [16, 24]}, 3: {"shape": [16, 24, 12]}},
    "pad_or_crop": {2: {"shape": [16, 24]}, 3: {"shape": [16, 24, 9]}},
    "centre": {2: {"shape": [16, 24]}, 3: {"shape": [16, 24, 9]}},
    "pad_to_multiple": {2: {"multiple": 8}, 3: {"multiple": 8}},
}
INTENSITY = ("clip_percentiles", "normalise")  # these change values, not places


def ramp(dims: int, channels: int = 1) -> Volume:
    """An image whose value is linear in the place in mm, on a turned grid where that makes sense."""
    shape = (19, 22, 14)[:dims]
    affine = np.eye(4)
    affine[:dims, :dims] = np.diag([0.8, 1.1, 1.6][:dims])
    if dims == 3:
        affine[:3, :3] = affine[:3, [2, 0, 1]] * [-1, 1, 1]
        affine[:3, 3] = (5.0, -3.0, 40.0)
    values = world(affine, shape) @ np.array([1.0, 2.0, -3.0])
    array = np.stack([values * (c + 1) for c in range(channels)]).astype(np.float32)
    return Volume(array, affine, affine, shape)


def world(affine: Array, shape: tuple[int, ...]) -> Array:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return np.asarray(index @ affine[:3, : len(shape)].T + affine[:3, 3])


def step(name: str, dims: int) -> dict[str, Any]:
    return {"op": name, **OPTIONS.get(name, {}).get(dims, {})}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", STEPS)
class TestEveryStep:
    def test_gives_a_finite_float32_image_of_as_many_channels_and_keeps_the_source(self, name: str, dims: int) -> None:
        volume = ramp(dims, channels=2)
        got = preprocess(volume, [step(name, dims)])
        assert got.array.dtype == np.float32
        assert got.array.flags.c_contiguous
        assert np.isfinite(got.array).all()
        assert (got.array.shape[0], got.spatial_dims, got.affine.shape) == (2, dims, (4, 4))
        assert got.native_affine is volume.native_affine
        assert got.native_shape == volume.native_shape

    def test_leaves_its_input_alone_and_is_deterministic(self, name: str, dims: int) -> None:
        volume = ramp(dims)
        array, affine = volume.array.copy(), volume.affine.copy()
        first, second = (preprocess(volume, [step(name, dims)]) for _ in range(2))
        np.testing.assert_array_equal(volume.array, array)
        np.testing.assert_array_equal(volume.affine, affine)
        np.testing.assert_array_equal(first.array, second.array)
        np.testing.assert_array_equal(first.affine, second.affine)

    def test_restore_brings_it_back_to_the_source_grid(self, name: str, dims: int) -> None:
        volume = ramp(dims)
        got = preprocess(volume, [step(name, dims)])
        back = restore_grid(got.array, got, volume)
        assert back.shape == volume.array.shape
        if got.shape == volume.shape:
            assert set(np.unique(back)) == set(np.unique(got.array))

    def test_a_constant_image_stays_finite(self, name: str, dims: int) -> None:
        volume = ramp(dims)
        got = preprocess(volume.with_array(np.full_like(volume.array, 3.7)), [step(name, dims)])
        assert len(np.unique(got.array)) == 1
        assert np.isfinite(got.array).all()

    def test_a_misspelt_option_is_refused_with_the_right_ones(self, name: str, dims: int) -> None:
        with pytest.raises(UsageError, match="no option 'sizes'"):
            check_steps([{**step(name, dims), "sizes": 1}])


@pytest.mark.parametrize("name", STEPS)
def test_options_are_typed_keywords_and_the_step_is_documented(name: str) -> None:
    volume, *options = inspect.signature(STEPS[name]).parameters.values()
    assert volume.name == "volume"
    assert all(o.kind is inspect.Parameter.KEYWORD_ONLY and o.annotation is not o.empty for o in options)
    assert STEPS[name].__doc__


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", [name for name in STEPS if name not in INTENSITY])
def test_the_affine_says_where_each_voxel_went(name: str, dims: int) -> None:
    volume = ramp(dims)
    options = {"antialias": False} if name == "resize" else {}
    got = preprocess(volume, [{**step(name, dims), **options}])
    place = world(got.affine, got.shape)
    old = (place - volume.affine[:3, 3]) @ np.linalg.pinv(volume.affine[:3, :dims]).T
    inside = ((old > -1e-6) & (old < np.array(volume.shape) - 1 + 1e-6)).all(-1)
    assert inside.mean() > 0.2
    np.testing.assert_allclose(got.array[0][inside], (place @ np.array([1.0, 2.0, -3.0]))[inside], atol=1e-3)
