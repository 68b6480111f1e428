"""Check that masks can be read and are on the grid of their image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medim.data.index.join import PendingRecord
from medim.data.index.layouts import Layout
from medim.data.index.scan_cache import FileScanner
from medim.data.mask_classes import MaskClasses, format_values, list_values, name_values
from medim.data.readers import ReadError, read_mask
from medim.data.readers.inspection import FileInspection, ImageInfo, RejectedFile
from medim.types import Array

_MAX_CORNER_OFFSET = 0.05  # largest distance between the corners of mask and image, as a fraction of a voxel


def inspect_mask(path: Path) -> FileInspection:
    """Inspect the grid and the values of a mask."""
    mask = read_mask(path)
    return FileInspection(images=(ImageInfo(shape=mask.shape, affine=mask.affine, values=list_values(mask.array)),))


def check_masks(
    pending_records: Sequence[PendingRecord], layout: Layout, scanner: FileScanner
) -> tuple[list[PendingRecord], list[RejectedFile], MaskClasses]:
    """Reject image and mask if the mask cannot be read or is on another grid.

    Returns:
        The accepted pending records, the rejected files, and the classes of the masks.

    Raises:
        UserError: the masks have too many values for classes.
    """
    paths = list(dict.fromkeys(pending.mask for pending in pending_records if pending.mask is not None))
    inspections = dict(zip(paths, scanner(inspect_mask, paths), strict=True))
    valid_records, rejected, values = [], [], set[int]()
    for pending in pending_records:
        image = pending.image
        try:
            mask_values = _check_mask(inspections[pending.mask], image, layout) if pending.mask is not None else ()
        except ReadError as error:
            reason = error.reason if error.reason in {"label-off-grid", "unknown-class"} else "label-unreadable"
            detail = f"its label: {error.detail}"
            rejected.append(
                RejectedFile(path=image.files[0], reason=reason, detail=detail, identities=image.identities)
            )
            rejected.append(RejectedFile(path=pending.mask or Path(), reason=error.reason, detail=error.detail))
            continue
        valid_records.append(pending)
        values.update(mask_values)
    unmatched_masks = set(layout.unmatched_masks) | set(layout.masks.values())
    for path in unmatched_masks - set(paths):
        default = RejectedFile(path=path, reason="label-without-image", detail="a label without a readable image")
        rejected.append(layout.unmatched_masks.get(path, default))
    return valid_records, rejected, layout.classes or name_values(values)


def _check_mask(inspection: FileInspection, image: ImageInfo, layout: Layout) -> tuple[int, ...]:
    """Check a mask and return its values.

    Raises:
        ReadError: the mask cannot be read, is on another grid, or contains a class without a name.
    """
    if inspection.rejected:
        raise ReadError(inspection.rejected[0].reason, inspection.rejected[0].detail)
    _check_mask_grid(inspection.images[0], image)
    values = inspection.images[0].values
    if layout.classes and (unknown_values := layout.classes.find_unknown_values(values)):
        raise ReadError(
            "unknown-class",
            f"the label contains the value {format_values(unknown_values)}, which dataset.json does not name",
        )
    return values


def _check_mask_grid(mask: ImageInfo, image: ImageInfo) -> None:
    """Reject a mask that is not on the grid of its image.

    Raises:
        ReadError: shape or corner positions differ.
    """
    if mask.shape != image.shape:
        shapes = "x".join(map(str, mask.shape)), "x".join(map(str, image.shape))
        raise ReadError("label-off-grid", f"the label has {shapes[0]} voxels, the image {shapes[1]}")
    distance, limit = _measure_corner_distance(mask, image)
    if distance > limit:
        raise ReadError("label-off-grid", f"the corners of label and image are up to {distance:.2f} mm apart")


def is_on_grid(mask: ImageInfo, image: ImageInfo) -> bool:
    """Whether a mask is on the voxel grid of an image."""
    if mask.shape != image.shape:
        return False
    distance, limit = _measure_corner_distance(mask, image)
    return distance <= limit


def _measure_corner_distance(mask: ImageInfo, image: ImageInfo) -> tuple[float, float]:
    """Measure the largest distance between corners of equal shapes, and compute its limit, in mm."""
    distance = np.abs(_compute_corners(mask.affine, mask.shape) - _compute_corners(image.affine, image.shape)).max()
    limit = _MAX_CORNER_OFFSET * np.linalg.norm(mask.affine[:3, : len(mask.shape)], axis=0).min()
    return float(distance), float(limit)


def _compute_corners(affine: Array, shape: Sequence[int]) -> Array:
    """Compute the (8, 3) positions of a grid's corners in mm."""
    ends = np.array([*shape, *[1] * (3 - len(shape))]) - 1
    indices = np.array(np.meshgrid(*[(0, end) for end in ends], indexing="ij")).reshape(3, -1)
    return np.asarray((affine[:3, :3] @ indices + affine[:3, 3:]).T)
