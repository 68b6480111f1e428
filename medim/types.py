"""Types shared by all packages: `Volume` (an image), `Views` (a batch) and `Features` (encoder output).

Array conventions: spatial axes come last; `...` in a shape means (D, H, W) or (H, W).

* 3D: axes point to the patient's Right, Anterior and Superior (RAS+), so the voxel `array[c, i + 1]` is to the right
  of `array[c, i]`.
* 2D: the first axis runs down the rows, the second along the columns, as the image is displayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
PredictFn = Callable[[Array], Array]  # a network: (N, C, ...) float32 to (N, K, ...) or (N, K)
Modality = Literal["mri", "xray"]
Split = Literal["train", "val", "test"]
Step = dict[str, Any]  # one preprocessing step: {"op": name, **options}
IGNORE_INDEX = 255  # class number of the voxels of a mask that nobody has labelled


class UserError(Exception):
    """An error that the user can correct. The message contains the place, the problem and the remedy.

    The command line prints the message without a traceback and exits with `exit_code` (see `docs/reference/cli.md`).
    """

    exit_code = 1


class UsageError(UserError):
    """A misspelt option, config key or table entry; the message suggests the nearest valid spelling.

    Examples:
        >>> error = UsageError("--set step=10: no key 'step'. Did you mean 'steps'?")
        >>> error.exit_code
        2
    """

    exit_code = 2


@dataclass(frozen=True, eq=False)
class Volume:
    """An image with its position in space.

    Attributes:
        array: (C, D, H, W) or (C, H, W), float32 (images) or an integer type (masks).
        affine: (4, 4) float64, voxel index to mm, RAS+. In 2D rows and columns are the first two axes.
        native_affine: (4, 4) affine of the file's own grid, on which results are written.
        native_shape: spatial shape of the file's own grid.

    Examples:
        >>> grid = np.diag([1.0, 1.0, 2.5, 1.0])
        >>> volume = Volume(np.zeros((1, 4, 4, 3), np.float32), affine=grid, native_affine=grid, native_shape=(4, 4, 3))
        >>> volume.spatial_dims, volume.shape, volume.spacing
        (3, (4, 4, 3), (1.0, 1.0, 2.5))
        >>> volume
        Volume(4 x 4 x 3 voxels of 1 x 1 x 2.5 mm, float32, RAS)
    """

    array: Array
    affine: Array
    native_affine: Array
    native_shape: tuple[int, ...]

    def __repr__(self) -> str:
        """Describe the image in one line, without its voxels."""
        spacing = " x ".join(f"{side:.3g}" for side in self.spacing)
        size = " x ".join(map(str, self.shape))
        channels = f", {self.array.shape[0]} channels" if self.array.shape[0] > 1 else ""
        return f"Volume({size} voxels of {spacing} mm{channels}, {self.array.dtype}, {_orientation(self.affine)})"

    @property
    def spatial_dims(self) -> int:
        """Number of spatial dimensions: 2 or 3."""
        return self.array.ndim - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape in voxels, without the channel axis."""
        return tuple(self.array.shape[1:])

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between voxel centres along each spatial axis, in mm."""
        return tuple(float(v) for v in np.linalg.norm(self.affine[:3, : self.spatial_dims], axis=0))

    def with_array(self, array: Array, affine: Array | None = None) -> Volume:
        """Return a copy with other voxels, on the grid of `affine` (default: the same grid)."""
        return replace(self, array=array, affine=self.affine if affine is None else affine)


def _orientation(affine: Array) -> str:
    """Letters of the directions in which the voxel axes of an affine point, such as RAS."""
    directions = affine[:3, :3]
    axes = np.abs(directions).argmax(axis=0)
    return "".join(("LPI", "RAS")[int(directions[axis, i] > 0)][axis] for i, axis in enumerate(axes))


@dataclass(frozen=True, eq=False)
class Views:
    """A batch of B images with V views per image.

    Attributes:
        image: (B, V, C, ...), float.
        location: (B, V, spatial_dims), index of the view's first voxel in the preprocessed image, in voxels.

    Examples:
        >>> import torch
        >>> views = Views(image=torch.zeros(8, 2, 1, 32, 32), location=torch.zeros(8, 2, 2))
        >>> tuple(views.image.shape[:2])  # 8 images with 2 views each
        (8, 2)
    """

    image: torch.Tensor
    location: torch.Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Encoder output for a batch of N images.

    Attributes:
        maps: local features, fine to coarse, each (N, channels[i], ...). Neighbouring cells of map i are strides[i]
            voxels apart.
        summary: (N, summary_channels), the global feature.

    Examples:
        >>> import torch
        >>> features = Features(maps=(torch.zeros(2, 16, 8, 8), torch.zeros(2, 32, 4, 4)), summary=torch.zeros(2, 64))
        >>> [tuple(map_.shape) for map_ in features.maps]
        [(2, 16, 8, 8), (2, 32, 4, 4)]
    """

    maps: tuple[torch.Tensor, ...]
    summary: torch.Tensor
