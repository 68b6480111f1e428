"""MetaImage and NRRD through SimpleITK."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medim.data.readers import ReadError, read_volume
from tests.data.synthetic import noise


def write(path: Path, **geometry: Any) -> np.ndarray[Any, Any]:
    sitk: Any = pytest.importorskip("SimpleITK")
    array = noise(6, 5, 4)  # (k, j, i)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((10.0, 20.0, 30.0))
    sitk.WriteImage(image, str(path))
    return array.transpose(2, 1, 0)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
def test_a_volume_is_turned_from_lps_to_ras(tmp_path: Path, name: str) -> None:
    array = write(tmp_path / name)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.array[0], array[::-1, ::-1])
    assert volume.spacing == (1.0, 2.0, 3.0)
    np.testing.assert_allclose(volume.native_affine @ [1, 1, 1, 1], [-11, -22, 33, 1])
    np.testing.assert_allclose(volume.affine @ [2, 3, 1, 1], [-11, -22, 33, 1])


def test_without_simple_itk_the_message_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.mha")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ReadError, match=r'pip install "medim\[train\]" \[reader-missing\]'):
        read_volume(tmp_path / "a.mha")


def test_a_truncated_volume_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.nrrd")
    whole = (tmp_path / "a.nrrd").read_bytes()
    (tmp_path / "a.nrrd").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReadError) as caught:
        read_volume(tmp_path / "a.nrrd")
    assert caught.value.reason == "unreadable"
