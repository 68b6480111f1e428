"""Masks: whether each can be read and lies on its image's grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medim.data.index.join import Draft
from medim.data.index.layouts import Layout
from medim.data.index.scan_cache import Looks
from medim.data.readers import ReadError, read_mask
from medim.data.readers.inspection import Found, Refused, Sight
from medim.types import Array

_ON_GRID = 0.05  # of a voxel: how far a mask's corners may lie from its image's


def look_at_mask(path: Path) -> Sight:
    """The grid of a mask, and its highest value."""
    mask = read_mask(path)
    return Sight(found=(Found(shape=mask.shape, affine=mask.affine, highest=int(mask.array.max())),))


def check_masks(drafts: Sequence[Draft], layout: Layout, looks: Looks) -> tuple[list[Draft], list[Refused], int]:
    """Refuse image and mask where the mask cannot be read or lies on another grid.

    Returns:
        the drafts that stay, what is refused, and the highest value in a mask.
    """
    paths = list(dict.fromkeys(draft.mask for draft in drafts if draft.mask is not None))
    sights = dict(zip(paths, looks(look_at_mask, paths), strict=True))
    kept, refused, highest = [], [], 0
    for draft in drafts:
        image = draft.found
        try:
            value = _highest(sights[draft.mask], image, layout) if draft.mask is not None else 0
        except ReadError as error:
            reason = error.reason if error.reason in {"label-off-grid", "unknown-class"} else "label-unreadable"
            detail = f"its label: {error.detail}"
            refused.append(Refused(path=image.files[0], reason=reason, detail=detail, identities=image.identities))
            refused.append(Refused(path=draft.mask or Path(), reason=error.reason, detail=error.detail))
            continue
        kept.append(draft)
        highest = max(highest, value)
    spare = set(layout.spare) | set(layout.masks.values())
    for path in spare - set(paths):
        default = Refused(path=path, reason="label-without-image", detail="a label without a readable image")
        refused.append(layout.spare.get(path, default))
    return kept, refused, highest


def _highest(mask: Sight, image: Found, layout: Layout) -> int:
    """The highest value in an image's mask.

    Raises:
        ReadError: the mask cannot be read, lies on another grid, or holds a class without a name.
    """
    if mask.refused:
        raise ReadError(mask.refused[0].reason, mask.refused[0].detail)
    _check_grid(mask.found[0], image)
    highest = mask.found[0].highest
    if layout.classes and highest > len(layout.classes):
        raise ReadError(
            "unknown-class", f"the label holds the value {highest}, dataset.json names {len(layout.classes)}"
        )
    return highest


def _check_grid(mask: Found, image: Found) -> None:
    """Refuse a mask that is not on its image's grid.

    Raises:
        ReadError: in that case.
    """
    if mask.shape != image.shape:
        shapes = "x".join(map(str, mask.shape)), "x".join(map(str, image.shape))
        raise ReadError("label-off-grid", f"the label has {shapes[0]} voxels, the image {shapes[1]}")
    away = np.abs(_corners(mask.affine, mask.shape) - _corners(image.affine, image.shape)).max()
    if away > _ON_GRID * np.linalg.norm(mask.affine[:3, : len(mask.shape)], axis=0).min():
        raise ReadError("label-off-grid", f"the corners of label and image lie up to {away:.2f} mm apart")


def _corners(affine: Array, shape: Sequence[int]) -> Array:
    """(8, 3) places of a grid's corners in mm."""
    ends = np.array([*shape, *[1] * (3 - len(shape))]) - 1
    indices = np.array(np.meshgrid(*[(0, end) for end in ends], indexing="ij")).reshape(3, -1)
    return np.asarray((affine[:3, :3] @ indices + affine[:3, 3:]).T)
