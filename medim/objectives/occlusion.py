"""Occlusion: mask part of the input so that the features must encode the hidden region.

The mask is a box, the complement of a box (Hjelm et al. 2019, section 4.3), or random cubes (MAE, He et al. 2022, arXiv
2111.06377).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from medim.objectives.objective import Encode
from medim.types import Features, UsageError, Views

OcclusionBlock = int | Literal["receptive_field"]


def block_size(occlusion: OcclusionBlock, shape: tuple[int, ...], receptive_fields: tuple[int, ...], level: int) -> int:
    """Side of the hidden and of the visible block, in voxels; 0 if there is no occlusion.

    Raises:
        UsageError: a view is too small for two blocks.
    """
    block = receptive_fields[level] if occlusion == "receptive_field" else occlusion
    if block:
        check_block(shape, block)
    return block


def encode_occluded(encode: Encode, views: Views, block: int) -> Features:
    """Encode the occluded views; if `block` is 0, return the clean features."""
    if not block:
        return encode.clean
    image = views.image.flatten(0, 1)
    return encode(
        occlude_image(image, draw_occlusion_mask(len(image), tuple(image.shape[2:]), block, encode.generator))
    )


def check_block(shape: tuple[int, ...], block: int) -> None:
    """Check that one visible and one hidden block fit into a view.

    Raises:
        UsageError: no axis has the length of two blocks, or an axis is shorter than one block.
    """
    if block < 1 or max(shape) < 2 * block or min(shape) < block:
        raise UsageError(
            f"occlusion: a view of shape {shape} is too small for a visible and a hidden block of side {block}. "
            f"Expected every side to be at least {block} and one at least {2 * block}: "
            "use larger views or a smaller occlusion block."
        )


def draw_occlusion_mask(count: int, shape: tuple[int, ...], block: int, generator: torch.Generator) -> torch.Tensor:
    """Draw occlusion masks: a box in half of the images, the complement of a box in the other half.

    In every image at least one cube of side `block` stays visible and at least one is completely hidden. These are the
    two constraints of the paper, with a block of the size of the receptive field of a local feature.

    Args:
        count: number of images.
        shape: spatial shape of the images, in voxels.
        block: side of the block, in voxels.
        generator: source of randomness, on the CPU.

    Returns:
        (count, 1, ...) bool, True for hidden voxels.
    """
    check_block(shape, block)
    mask = torch.zeros(count, 1, *shape, dtype=torch.bool)
    splittable = [axis for axis, side in enumerate(shape) if side >= 2 * block]
    for n in range(count):
        open_axis = splittable[_draw_integer(0, len(splittable) - 1, generator)]
        box: Any = [_draw_interval(side, block, axis == open_axis, generator) for axis, side in enumerate(shape)]
        mask[(n, 0, *box)] = True
        if _draw_integer(0, 1, generator):
            mask[n] = ~mask[n]
    return mask


def check_cubes(name: str, shape: tuple[int, ...], block: int, share: float) -> None:
    """Check that a view contains at least two cubes and that the hidden share is neither 0 nor 1.

    Raises:
        UsageError: a value is out of range; the message starts with `name`, the name of the objective.
    """
    if not 1 <= block <= min(shape) or max(shape) < 2 * block:
        raise UsageError(
            f"{name}.mask_patch_size: expected a side that fits at least twice into a view of {shape}, got {block}."
        )
    if not 0 < share < 1:
        raise UsageError(f"{name}.mask_ratio: expected a share above 0 and below 1, got {share}.")


def draw_cube_mask(
    count: int, shape: tuple[int, ...], block: int, share: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw cubes of a regular grid with a random origin per image, so that no voxel is always at the edge of a cube.

    Args:
        count: number of images.
        shape: spatial shape of the images, in voxels.
        block: side of a cube, in voxels.
        share: share of cubes to draw; at least one cube is drawn and at least one is not.
        generator: source of randomness, on the CPU.

    Returns:
        (count, 1, ...) bool, True in the cubes drawn.
    """
    grid = [-(-side // block) + 1 for side in shape]
    cells = int(torch.tensor(grid).prod())
    number = min(max(1, round(share * cells)), cells - 1)
    selection = torch.rand(count, cells, generator=generator).argsort(dim=1) < number
    cubes = selection.reshape(count, 1, *grid)
    for axis in range(2, cubes.ndim):
        cubes = cubes.repeat_interleave(block, dim=axis)
    origins = torch.randint(block, (count, len(shape)), generator=generator)
    windows = [tuple(slice(o, o + side) for o, side in zip(row, shape, strict=True)) for row in origins.tolist()]
    return torch.stack([image[(slice(None), *window)] for image, window in zip(cubes, windows, strict=True)])


def occlude_image(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Fill the hidden voxels with the mean of the image.

    Args:
        image: (N, C, ...).
        mask: (N, 1, ...) bool.
    """
    mean = image.mean(dim=tuple(range(2, image.ndim)), keepdim=True)
    return torch.where(mask.to(image.device), mean, image)


def _draw_interval(side: int, block: int, leave_block: bool, generator: torch.Generator) -> slice:
    """Draw a run of at least `block` voxels; with `leave_block`, one of its ends keeps `block` free voxels."""
    length = _draw_integer(block, side - block if leave_block else side, generator)
    start = _draw_integer(0, side - length - (block if leave_block else 0), generator)
    if leave_block and _draw_integer(0, 1, generator):
        start = side - length - start
    return slice(start, start + length)


def _draw_integer(low: int, high: int, generator: torch.Generator) -> int:
    """Draw an integer in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))
