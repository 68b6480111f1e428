"""What travels through the house: a `Volume` in, `Views` of it, `Features` of those.

Shapes are said here once. Spatial axes come last; `...` stands for (D, H, W) or (H, W).

* 3D: axes run to the patient's Right, Anterior, Superior (RAS+), so `array[c, i + 1]` lies to the right of `array[c,
i]`.
* 2D: axes run down the rows and along the columns, as the picture is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
Modality = Literal["mri", "xray"]
Split = Literal["train", "val", "test"]
Step = dict[str, Any]  # one preprocessing step: {"op": name, **options}


class UserError(Exception):
    """A failure the user can act on: says what was expected, what came, where, and what to do.

    The command line prints the message without a traceback and leaves with `exit_code` (see `docs/reference/cli.md`).
    """

    exit_code = 1


class UsageError(UserError):
    """A misspelt option, config key or table entry; the message holds the nearest right spelling."""

    exit_code = 2


@dataclass(frozen=True, eq=False)
class Volume:
    """An image with its place in space.

    Attributes:
        array: (C, D, H, W) or (C, H, W), float32 (images) or an integer type (masks).
        affine: (4, 4) float64, voxel index to mm, RAS+. In 2D rows and columns are the first two axes.
        native_affine: (4, 4) affine of the file's own grid, for writing a result back on it.
        native_shape: spatial shape of the file's own grid.
    """

    array: Array
    affine: Array
    native_affine: Array
    native_shape: tuple[int, ...]

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
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
        """The same source with other voxels, on the grid that `affine` describes (default: unchanged)."""
        return replace(self, array=array, affine=self.affine if affine is None else affine)


@dataclass(frozen=True, eq=False)
class Views:
    """A batch of B images, V views of each.

    Attributes:
        image: (B, V, C, ...), float.
        location: (B, V, spatial_dims), where the view's first voxel lies in the preprocessed image, in voxels.
    """

    image: torch.Tensor
    location: torch.Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """What an encoder makes of a batch of N images.

    Attributes:
        maps: local features, fine to coarse, each (N, channels[i], ...), neighbouring cells of map i lying strides[i]
            voxels apart.
        summary: (N, summary_channels), the global feature.
    """

    maps: tuple[torch.Tensor, ...]
    summary: torch.Tensor
