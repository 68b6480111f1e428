from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medim.data.fingerprints import compute_fingerprint, merge_groups, shared_images
from medim.data.readers import read_volume
from medim.types import Array, Volume
from tests.data.synthetic import noise, write_nifti, write_series

SHAPES = [(1, 12, 9), (1, 40, 33), (1, 7, 12, 9), (2, 3, 16, 20)]


def volume(array: Array) -> Volume:
    return Volume(array.astype(np.float32), np.eye(4), np.eye(4), array.shape[1:])


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    depth=st.sampled_from([2, 256, 4096, 65536]),
    seed=st.integers(0, 2**32 - 1),
    slope=st.floats(1e-3, 1e3),
    intercept=st.floats(-3, 3),
)
def test_a_rescaled_copy_has_the_same_fingerprint_in_whatever_precision_the_slope_was_applied(
    shape: tuple[int, ...], depth: int, seed: int, slope: float, intercept: float
) -> None:
    stored = np.random.default_rng(seed).integers(0, depth, shape)
    shift = intercept * slope * depth
    copies = [stored, stored * slope + shift, stored.astype(np.float32) * np.float32(slope) + np.float32(shift)]
    assert len({compute_fingerprint(volume(copy)) for copy in copies}) == 1


@settings(max_examples=50, deadline=None)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1), slope=st.floats(0.01, 100))
def test_a_continuous_image_and_its_rescaled_copy_have_the_same_fingerprint(
    shape: tuple[int, ...], seed: int, slope: float
) -> None:
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    assert compute_fingerprint(volume(array)) == compute_fingerprint(
        volume(array * np.float32(slope) + np.float32(slope))
    )


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_other_pixels_and_the_same_pixels_in_another_place_or_inverted_have_another_fingerprint(
    shape: tuple[int, ...], seed: int
) -> None:
    array = np.random.default_rng(seed).normal(size=shape)
    others = [np.random.default_rng(seed + 1).normal(size=shape), array[:, ::-1], -array, array.swapaxes(1, 2)]
    assert len({compute_fingerprint(volume(other)) for other in [array, *others]}) == 5


def test_a_hot_voxel_does_not_hide_the_rest() -> None:
    first, second = (np.random.default_rng(seed).integers(50, 250, (1, 64, 64)) for seed in range(2))
    first[0, 5, 5] = second[0, 5, 5] = 65535
    assert compute_fingerprint(volume(first)) != compute_fingerprint(volume(second))


def test_an_image_of_one_value_has_no_fingerprint_and_is_like_no_other() -> None:
    blank = compute_fingerprint(volume(np.full((1, 8, 8), 0.1)))
    assert blank == ""
    assert shared_images({"a": blank, "b": blank}, {"a": "train", "b": "val"}) == []


def test_a_dicom_series_and_the_nifti_made_of_it_have_one_fingerprint_whatever_the_order_and_slope(
    tmp_path: Path,
) -> None:
    slices = noise(5, 8, 6)
    plain, turned = (tmp_path / name for name in ("plain", "turned"))
    write_series(plain, slices)
    write_series(turned, slices, order=[3, 0, 4, 1, 2], RescaleSlope="0.37", RescaleIntercept="-20")
    series = [read_volume(folder) for folder in (plain, turned)]
    path = write_nifti(tmp_path / "other.nii.gz", series[0].array[0][::-1], series[0].affine @ np.diag([-1, 1, 1, 1]))
    assert len({compute_fingerprint(v) for v in [*series, read_volume(path)]}) == 1


def test_two_of_the_real_x_rays_are_one_image(shared_data: Path) -> None:
    files = sorted((shared_data / "xray-dicom").glob("*.dcm"))
    found = {path.stem: compute_fingerprint(read_volume(path)) for path in files}
    assert len(files) == 5
    assert len(set(found.values())) == 4
    assert shared_images(found, {name: name for name in found}) == [["test1", "test4"]]


def test_real_crops_of_the_brain_are_told_apart(shared_data: Path) -> None:
    files = sorted((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))[:40]
    volumes = [read_volume(path) for path in files]
    assert len({compute_fingerprint(v) for v in volumes}) == len(files) == 40
    rescaled = [v.with_array(v.array * np.float32(0.0137) + np.float32(5)) for v in volumes]
    assert [compute_fingerprint(v) for v in volumes] == [compute_fingerprint(v) for v in rescaled]


def test_an_overlap_is_images_of_one_fingerprint_in_two_places() -> None:
    prints = {"a": "1", "b": "2", "c": "1", "d": "2", "e": "1"}
    splits = {"a": "train", "b": "train", "c": "val", "d": "train", "e": "train"}
    assert shared_images(prints, splits) == [["a", "c", "e"]]
    assert shared_images(prints, {image: image for image in prints}) == [["a", "c", "e"], ["b", "d"]]


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1), max_size=8))
def test_united_groups_are_the_connected_ones(groups: list[list[str]]) -> None:
    expected = [set(group) for group in groups]
    for _ in groups:  # join any two that share a member, until there are none
        for i, one in enumerate(expected):
            for other in expected[i + 1 :]:
                if one & other:
                    one |= other
                    other.clear()
    found = merge_groups(groups)
    assert sorted(map(sorted, found)) == sorted(sorted(group) for group in expected if group)
    assert all(len(set(group)) == len(group) for group in found)
