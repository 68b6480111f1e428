"""MONAI `ImageReader` based on medim's readers, for use in any MONAI pipeline. Needs the train extra."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config.type_definitions import PathLike
from monai.data.image_reader import ImageReader
from monai.utils.enums import MetaKeys, SpaceKeys

from medim.data.readers import find_reader, read_volume, split_item
from medim.types import Array, Volume


class MedimReader(ImageReader):
    """MONAI reader for all inputs of `read_volume`: a file, a folder with one DICOM series, or `archive.npz#train/12`.

    Example:
        `LoadImage(reader=MedimReader(), ensure_channel_first=True)(path)` returns a (1, D, H, W) or (1, H, W)
        `MetaTensor` with the array and the RAS+ affine of `read_volume(path)`. Several paths with equal grids become
        channels.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether every path is a folder or is accepted by a reader."""
        files = [split_item(name)[0] for name in _as_paths(filename)]
        return all(file.is_dir() or find_reader(file) is not None for file in files)

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[Volume]:
        """Read each path.

        Raises:
            ReadError: a path is not an image.
        """
        return [read_volume(path) for path in _as_paths(data)]

    def get_data(self, img: Sequence[Volume]) -> tuple[Array, dict[str, object]]:
        """Return the volumes as channels, with MONAI's metadata.

        Raises:
            ValueError: the volumes differ in shape or affine.
        """
        first = img[0]
        for other in img[1:]:
            if other.shape != first.shape or not np.allclose(other.affine, first.affine, atol=1e-3):
                raise ValueError(
                    f"expected images on one grid, got shapes {first.shape} and {other.shape}, or different affines"
                )
        meta: dict[str, object] = {
            MetaKeys.AFFINE: first.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: first.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(first.shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM: 0,
            MetaKeys.SPACE: SpaceKeys.RAS,
        }
        return np.concatenate([volume.array for volume in img]), meta


def _as_paths(data: Sequence[PathLike] | PathLike) -> list[Path]:
    return [Path(name) for name in ([data] if isinstance(data, str | os.PathLike) else data)]
