"""What every reader refuses before and after it has read voxels."""

from __future__ import annotations

import numpy as np
import pytest
from nibabel import orientations

from medim.data.readers import base
from medim.data.readers.base import (
    MAX_RATIO,
    MAX_VOXELS,
    MIN_CHECKED_BYTES,
    MIN_RATIO_VOXELS,
    ReadError,
    VoxelRange,
    as_class_numbers,
    check_compression,
    check_memory,
    check_size,
    check_voxels,
    ras_volume,
)
from tests.data.synthetic import noise


def test_an_axis_of_no_length_is_no_image() -> None:
    for shape in ((4, 0, 5), (4, -1)):
        with pytest.raises(ReadError, match=r"\[empty-image\]"):
            check_size(shape, 2)
    with pytest.raises(ReadError, match=r"\[empty-image\]"):
        check_voxels(np.zeros((0, 3)))


def test_2_29_voxels_are_the_limit() -> None:
    assert check_size((MAX_VOXELS // 4, 4), 8) == 8 * MAX_VOXELS
    with pytest.raises(ReadError, match=r"\[too-large\]"):
        check_size((MAX_VOXELS // 4 + 1, 4), 1)


def test_only_a_large_image_is_refused_for_its_compression() -> None:
    check_compression(MIN_RATIO_VOXELS, MIN_RATIO_VOXELS, 1)
    check_compression(MIN_RATIO_VOXELS + 1, MAX_RATIO * 1000, 1000)
    with pytest.raises(ReadError, match=r"the limit is 200 \[compression-ratio\]"):
        check_compression(MIN_RATIO_VOXELS + 1, MAX_RATIO * 1000 + 1, 1000)


def test_what_does_not_fit_into_the_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "available_memory", lambda: MIN_CHECKED_BYTES)
    check_memory(MIN_CHECKED_BYTES)
    with pytest.raises(ReadError, match=r"0\.5 GiB of memory; 0\.25 GiB are available \[too-much-memory\]"):
        check_memory(2 * MIN_CHECKED_BYTES)
    monkeypatch.setattr(base, "available_memory", lambda: 0)
    check_memory(MIN_CHECKED_BYTES - 1)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ILA"])
def test_an_image_filled_through_its_view_is_that_of_nibabel(codes: str) -> None:
    array = noise(4, 5, 6)
    affine = orientations.inv_ornt_aff(
        orientations.ornt_transform(orientations.axcodes2ornt(codes), orientations.axcodes2ornt("RAS")), (4, 5, 6)
    )
    volume = ras_volume(array, affine)
    expected = orientations.apply_orientation(array, orientations.io_orientation(affine))
    np.testing.assert_array_equal(volume.array[0], expected)
    assert volume.array.flags.c_contiguous
    assert orientations.aff2axcodes(volume.affine) == ("R", "A", "S")


def test_a_range_by_parts_is_that_of_the_whole() -> None:
    for array in (noise(4, 5, 6), np.full((4, 5), 3.0), np.array([[1.0, np.nan], [np.inf, 0.0]])):
        voxel_range, reasons = VoxelRange(), []
        for part in array:
            voxel_range.update(part)
        for check in (voxel_range.check, lambda array=array: check_voxels(array)):
            try:
                check()
            except ReadError as error:
                reasons.append(str(error))
        assert len(set(reasons)) == len(reasons) // 2


@pytest.mark.parametrize("value", [-1.0, 0.5, 65536.0, np.nan, np.inf, 1e30])
def test_mask_values_are_integers_from_0_to_65535(value: float) -> None:
    classes = np.arange(256.0).reshape(4, 8, 8)
    np.testing.assert_array_equal(as_class_numbers(classes), classes.astype(np.uint8))
    classes[2, 3, 4] = value
    with pytest.raises(ReadError, match=r"\[not-a-mask\]"):
        as_class_numbers(classes)
