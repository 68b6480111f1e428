"""What every reader refuses before and after it has read voxels."""

from __future__ import annotations

import numpy as np
import pytest

from medim.data.readers.base import MAX_BYTES, ReadError, check_size, check_voxels


def test_an_axis_of_no_length_is_no_image() -> None:
    for shape in ((4, 0, 5), (4, -1)):
        with pytest.raises(ReadError, match=r"\[empty-image\]"):
            check_size(shape, 2)
    with pytest.raises(ReadError, match=r"\[empty-image\]"):
        check_voxels(np.zeros((0, 3)))


def test_8_gib_is_the_limit() -> None:
    assert check_size((MAX_BYTES // 4,), 4) == MAX_BYTES
    with pytest.raises(ReadError, match=r"\[too-large\]"):
        check_size((MAX_BYTES // 4 + 1,), 4)
