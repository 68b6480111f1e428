"""Paint in what is hidden: encoder and decoder learn together from the image itself."""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv
from torch import nn

from medim.objectives.objective import Encode, Term
from medim.objectives.occlusion import occlude
from medim.types import UsageError, Views


class Reconstruction(nn.Module):
    """Masked in-painting (Pathak et al. 2016, arXiv 1604.07379), random cubes as in MAE (He et al. 2022, 2111.06377).

    Random cubes of an image are filled with its mean; from the rest, encoder and decoder predict how what they held
    differs from it. The decoder is saved beside the encoder, and segmentation starts from both.

    Args:
        in_channels: channels of the image.
        spatial_dims: 2 or 3.
        input_shape: spatial shape of the views.
        decoded_channels: channels of the decoded map; 0 where the run has no decoder.
        block: side of a cube, in voxels.
        hidden: share of the cubes that is hidden, above 0 and below 1.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_dims: int,
        input_shape: tuple[int, ...],
        decoded_channels: int,
        *,
        block: int = 8,
        hidden: float = 0.6,
    ) -> None:
        super().__init__()
        if not decoded_channels:
            raise UsageError("reconstruction: it decodes; add a decoder to the config, such as decoder: {name: unet}.")
        if not 1 <= block <= min(input_shape) or max(input_shape) < 2 * block:
            raise UsageError(
                f"reconstruction.block: expected cubes of which a view of {input_shape} holds two or more, got {block}."
            )
        if not 0 < hidden < 1:
            raise UsageError(f"reconstruction.hidden: expected a share above 0 and below 1, got {hidden}.")
        self._block, self._hidden = block, hidden
        self.to_image = Conv[Conv.CONV, spatial_dims](decoded_channels, in_channels, 1)

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `reconstruction`: squared error over hidden voxels, in units of what their filling errs (chance: 1)."""
        image = views.image.flatten(0, 1)  # (N, C, ...)
        shape = tuple(image.shape[2:])
        hidden = draw_cubes(len(image), shape, self._block, self._hidden, encode.generator).to(image.device)
        filled = occlude(image, hidden)
        painted = self.to_image(encode.decode(encode(filled))).float()
        missing = (image - filled).float()  # 0 where visible
        error = (painted - missing).square().mul(hidden).sum() / missing.square().sum().clamp_min(1e-12)
        return {"reconstruction": Term(error, 1.0)}


def draw_cubes(
    count: int, shape: tuple[int, ...], block: int, share: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw cubes of a regular grid; its origin moves from image to image, so that no voxel lies always on an edge.

    Args:
        count: number of images.
        shape: spatial shape of the images, in voxels.
        block: side of a cube, in voxels.
        share: of the cubes to draw; at least one is drawn and one is not.
        generator: source of randomness, on the CPU.

    Returns:
        (count, 1, ...) bool, True in the cubes drawn.
    """
    grid = [-(-side // block) + 1 for side in shape]
    cells = int(torch.tensor(grid).prod())
    number = min(max(1, round(share * cells)), cells - 1)
    drawn = torch.rand(count, cells, generator=generator).argsort(dim=1) < number
    cubes = drawn.reshape(count, 1, *grid)
    for axis in range(2, cubes.ndim):
        cubes = cubes.repeat_interleave(block, dim=axis)
    origins = torch.randint(block, (count, len(shape)), generator=generator)
    windows = [tuple(slice(o, o + side) for o, side in zip(row, shape, strict=True)) for row in origins.tolist()]
    return torch.stack([image[(slice(None), *window)] for image, window in zip(cubes, windows, strict=True)])
