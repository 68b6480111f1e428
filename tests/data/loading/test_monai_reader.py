"""The MONAI reader loads what `read_volume` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medim.data.readers import read_volume
from tests.data.synthetic import noise, write_archive, write_nifti, write_series

pytest.importorskip("monai")


def check(path: Path | str) -> None:
    from monai.transforms import LoadImage

    from medim.data.loading.monai_reader import MedimReader

    loaded: Any = LoadImage(reader=MedimReader(), ensure_channel_first=True)(str(path))
    volume = read_volume(path)
    assert loaded.dtype.is_floating_point
    np.testing.assert_array_equal(loaded.numpy(), volume.array)
    np.testing.assert_allclose(loaded.affine.numpy(), volume.affine)
    assert tuple(loaded.meta["spatial_shape"]) == volume.shape


def test_every_kind_of_source_is_loaded_as_read_volume_does(tmp_path: Path) -> None:
    check(write_nifti(tmp_path / "a.nii.gz", affine=np.diag([-1.0, 2.0, -3.0, 1.0])))
    write_series(tmp_path / "series")
    check(tmp_path / "series")
    Image.fromarray(noise(4, 6).astype(np.uint8)).save(tmp_path / "a.png")
    check(tmp_path / "a.png")
    check(f"{write_archive(tmp_path / 'x.npz')}#train/3")


def test_a_real_series_is_loaded(shared_data: Path) -> None:
    check(shared_data / "mri-dicom" / "Study2" / "14_HCropVolume")
    check(shared_data / "xray-dicom" / "test2.dcm")
    check(shared_data / "xray-pneumonia" / "pneumoniamnist.npz#val/7")


def test_several_images_on_one_grid_become_channels(tmp_path: Path) -> None:
    from monai.transforms import LoadImage

    from medim.data.loading.monai_reader import MedimReader

    paths = [write_nifti(tmp_path / f"{k}.nii.gz", noise(4, 5, 6, seed=k)) for k in range(2)]
    load = LoadImage(reader=MedimReader(), image_only=True)
    assert load([str(path) for path in paths]).shape == (2, 4, 5, 6)
    other = write_nifti(tmp_path / "other.nii.gz", noise(4, 5, 7))
    with pytest.raises(Exception, match="one grid"):
        load([str(paths[0]), str(other)])


def test_monai_chooses_the_reader_by_suffix(tmp_path: Path) -> None:
    from medim.data.loading.monai_reader import MedimReader

    assert MedimReader().verify_suffix(str(tmp_path / "a.nii.gz"))
    assert MedimReader().verify_suffix([str(tmp_path), str(tmp_path / "x.npz#train/1")])
    assert not MedimReader().verify_suffix(str(tmp_path / "a.txt"))
