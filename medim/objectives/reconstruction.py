"""Masked reconstruction: train encoder and decoder to predict hidden parts of an image."""

from __future__ import annotations

from torch import nn

from medim.config import Share, Size
from medim.models.layers import build_pointwise_conv
from medim.objectives.objective import Encode, Term
from medim.objectives.occlusion import check_cubes, draw_cube_mask, occlude_image
from medim.types import UsageError, Views


class Reconstruction(nn.Module):
    """Masked in-painting (Pathak et al. 2016, arXiv 1604.07379), random cubes as in MAE (He et al. 2022, 2111.06377).

    Random cubes of an image are filled with its mean. From the rest, encoder and decoder predict the difference between
    the hidden voxels and this mean. The decoder is saved together with the encoder, and segmentation fine-tuning starts
    from both.

    Args:
        in_channels: channels of the image.
        spatial_dims: 2 or 3.
        input_shape: spatial shape of the views.
        decoded_channels: channels of the decoded map; 0 if the run has no decoder.
        mask_patch_size: side of a cube, in voxels.
        mask_ratio: share of hidden cubes, above 0 and below 1.
    """

    reads_summary = False
    draws_per_image = True

    def __init__(
        self,
        in_channels: int,
        spatial_dims: int,
        input_shape: tuple[int, ...],
        decoded_channels: int,
        *,
        mask_patch_size: Size = 8,
        mask_ratio: Share = 0.6,
    ) -> None:
        super().__init__()
        if not decoded_channels:
            raise UsageError(
                "reconstruction: it needs a decoder; add a decoder to the config, such as decoder: {name: unet}."
            )
        check_cubes("reconstruction", input_shape, mask_patch_size, mask_ratio)
        self._mask_patch_size, self._mask_ratio = mask_patch_size, mask_ratio
        self.to_image = build_pointwise_conv(spatial_dims, decoded_channels, in_channels)

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `reconstruction`: squared error over hidden voxels, relative to that of the mean filling (chance: 1)."""
        image = views.image.flatten(0, 1)  # (N, C, ...)
        shape = tuple(image.shape[2:])
        mask = draw_cube_mask(len(image), shape, self._mask_patch_size, self._mask_ratio, encode.generator)
        mask = mask.to(image.device)
        occluded = occlude_image(image, mask)
        prediction = self.to_image(encode.decode(encode(occluded))).float()
        missing = (image - occluded).float()  # 0 where visible
        error = (prediction - missing).square().mul(mask).sum() / missing.square().sum().clamp_min(1e-12)
        return {"reconstruction": Term(error, 1.0)}
