"""Foreground voxels of a mask, listed per class, as centres of training crops.

A lesion fills a small part of an image, so most crops at random positions contain none of it. nnU-Net (Isensee et al.,
Nature Methods 2021) therefore draws a third of the crops around a foreground voxel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medim.data.preprocessing.geometry import BLOCK_VALUES
from medim.types import IGNORE_INDEX, Array

N_VALUES = 256  # of a mask, which is uint8
MAX_CLASS_VOXELS = 10_000  # per class, as in nnU-Net
SUBSAMPLE_SEED = 20_211


@dataclass(frozen=True, kw_only=True, eq=False)
class ForegroundVoxels:
    """Voxels of the classes in a mask, without the background.

    Attributes:
        shape: spatial shape of the mask, in voxels.
        classes: (K,) values of the mask, ascending.
        counts: (K,) number of listed voxels of each class, at most `MAX_CLASS_VOXELS`.
        indices: (sum of `counts`,) flat indices into the mask in C order, class by class and ascending within a class;
            unsigned integers.
    """

    shape: tuple[int, ...]
    classes: Array
    counts: Array
    indices: Array

    def draw_voxel(self, rng: np.random.Generator) -> tuple[int, ...] | None:
        """Draw one of the classes with equal probability, and one of its voxels; None if there is no foreground."""
        if not len(self.counts):
            return None
        k = int(rng.integers(len(self.counts)))
        index = self.indices[int(self.counts[:k].sum()) + int(rng.integers(self.counts[k]))]
        return tuple(int(position) for position in np.unravel_index(index, self.shape))

    def is_valid(self) -> bool:
        """Whether the classes, counts and indices are consistent with each other and with the shape."""
        return (
            (self.indices.ndim, self.indices.dtype.kind) == (1, "u")
            and self.classes.shape == self.counts.shape
            and bool((self.counts > 0).all())
            and int(self.counts.sum()) == len(self.indices)
            and int(self.indices.max(initial=0)) < int(np.prod(self.shape))
        )


def list_foreground(mask: Array) -> ForegroundVoxels:
    """List the foreground voxels of a mask.

    A class of more than `MAX_CLASS_VOXELS` voxels is represented by a random sample, which depends on the mask only.

    Args:
        mask: class numbers, spatial shape, uint8; 0 is background, and voxels of `IGNORE_INDEX` are left out.

    Examples:
        >>> foreground = list_foreground(np.array([[0, 2], [1, 2]], np.uint8))
        >>> foreground.classes.tolist(), foreground.counts.tolist(), foreground.indices.tolist()
        ([1, 2], [1, 2], [2, 1, 3])
    """
    flat = mask.ravel()
    blocks = [flat[start : start + BLOCK_VALUES] for start in range(0, flat.size, BLOCK_VALUES)]  # to limit memory
    sizes = np.array([np.bincount(block, minlength=N_VALUES) for block in blocks]).reshape(-1, N_VALUES)
    totals = sizes.sum(axis=0)
    totals[IGNORE_INDEX] = 0
    classes = np.flatnonzero(totals[1:]) + 1
    samples = {int(value): _sample_ranks(int(totals[value]), int(value)) for value in classes}
    voxels: dict[int, list[Array]] = {value: [] for value in samples}
    ranks = np.zeros(N_VALUES, np.int64)  # of the first voxel of each class in the block, among all of the class
    for number, (block, block_sizes) in enumerate(zip(blocks, sizes, strict=True)):
        positions = np.flatnonzero(block)
        positions = positions[np.argsort(block[positions], kind="stable")]  # class by class, ascending within a class
        start = 0
        for value in map(int, np.flatnonzero(block_sizes[1:IGNORE_INDEX]) + 1):
            stop, rank = start + int(block_sizes[value]), int(ranks[value])
            low, high = np.searchsorted(samples[value], (rank, rank + stop - start))
            voxels[value].append(number * BLOCK_VALUES + positions[start:stop][samples[value][low:high] - rank])
            start = stop
        ranks += block_sizes
    indices = [np.empty(0, np.int64), *(part for parts in voxels.values() for part in parts)]
    return ForegroundVoxels(
        shape=mask.shape,
        classes=classes,
        counts=np.array([len(sample) for sample in samples.values()], np.int64),
        indices=np.concatenate(indices).astype(np.min_scalar_type(mask.size)),
    )


def _sample_ranks(count: int, value: int) -> Array:
    """Draw at most `MAX_CLASS_VOXELS` of the numbers below `count`, ascending; the seed is the value of the class."""
    if count <= MAX_CLASS_VOXELS:
        return np.arange(count)
    rng = np.random.default_rng((SUBSAMPLE_SEED, value))
    return np.sort(rng.choice(count, MAX_CLASS_VOXELS, replace=False, shuffle=False))
