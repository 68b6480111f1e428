"""The same image under another name: a digest of its pixels, and what a set of digests tells.

Two files that hold one image (a DICOM series and the NIfTI made of it, a copy with another slope) have one fingerprint.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from medim.types import Array, Volume

BLOCKS_PER_SIDE = {2: 14, 3: 6}  # a side, by spatial dimensions: about 200 numbers an image
CLIP_DEVIATIONS = 4.0  # mean deviations: one hot voxel must not hide the rest
LEVELS_PER_DEVIATION = (
    5 * (1 + 5**0.5) / 2
)  # a mean deviation; irrational, so that whole grey values do not lie between two levels


def compute_fingerprint(volume: Volume) -> str:
    """A digest of an image as a reader gives it, the same after any rescaling `slope * voxel + intercept`, slope > 0.

    Voxels count from their mean, in mean deviations, and the means of a coarse grid of blocks are rounded to 1/8. A
    block's mean hardly feels the rounding of single voxels (a slope kept as float32 moves them by 4e-8), so next to
    none lies between two levels: of 4,698 rescaled X-rays of 28x28 one was missed, of 1,980 rescaled MRI crops none;
    exact copies never are. Images that differ in a few voxels alone count as one.

    Args:
        volume: before any preprocessing.

    Returns:
        32 hex digits; empty for an image of one value, which has nothing to be known by.
    """
    array = volume.array
    if array.min() == array.max():
        return ""
    edges = [np.arange(k) * n // k for n in volume.shape for k in [min(n, BLOCKS_PER_SIDE[volume.spatial_dims])]]
    slabs = np.split(array, edges[0][1:], axis=1)  # one at a time in float64, to spare memory
    mean = array.mean(dtype=np.float64)
    deviation = sum(float(np.abs(slab - mean).sum()) for slab in slabs) / array.size
    means = [
        _compute_block_means(np.clip((slab - mean) / deviation, -CLIP_DEVIATIONS, CLIP_DEVIATIONS), edges[1:])
        for slab in slabs
    ]
    levels = np.rint(LEVELS_PER_DEVIATION * np.stack(means)).astype(np.int8)
    return hashlib.sha256(repr(array.shape).encode() + levels.tobytes()).hexdigest()[:32]


def shared_images(fingerprints: Mapping[str, str], groups: Mapping[str, str]) -> list[list[str]]:
    """Images with the same pixels that `groups` puts in different places.

    Args:
        fingerprints: image key to fingerprint.
        groups: image key to its split, or to its subject.

    Returns:
        Image keys, a list for each such set, in the order of `fingerprints`.
    """
    images_by_digest: dict[str, list[str]] = defaultdict(list)
    for image, digest in fingerprints.items():
        if digest:
            images_by_digest[digest].append(image)
    return [images for images in images_by_digest.values() if len({groups[image] for image in images}) > 1]


def merge_groups(groups: Iterable[Iterable[str]]) -> list[list[str]]:
    """Groups that share a member become one; members in the order in which they come."""
    group_of_member: dict[str, list[str]] = {}
    for group in groups:
        members = list(dict.fromkeys(member for key in group for member in group_of_member.get(key, [key])))
        group_of_member.update(dict.fromkeys(members, members))
    return list({id(group): group for group in group_of_member.values()}.values())


def _compute_block_means(slab: Array, edges: list[Array]) -> Array:
    """Means over blocks of the axes after the second: (C, n, ...) -> (C, ...)."""
    slab = slab.mean(axis=1)
    for axis, starts in enumerate(edges, start=1):
        counts = np.diff([*starts, slab.shape[axis]])
        shape = [-1 if i == axis else 1 for i in range(slab.ndim)]
        slab = np.add.reduceat(slab, starts, axis=axis) / counts.reshape(shape)
    return slab
