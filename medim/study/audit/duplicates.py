"""Find duplicates across splits: images with identical pixels, and near-duplicates by perceptual hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medim.data.fingerprints import shared_images
from medim.data.loading.quality_table import MAX_DUPLICATE_BITS, find_near_duplicates
from medim.data.preprocessing.quality import QualityMetrics
from medim.types import Split


@dataclass(frozen=True)
class NearDuplicate:
    """Two images of different splits with similar perceptual hashes.

    Attributes:
        train_image: image of the training split.
        other_image: image of another split.
        hamming_distance: number of bits by which the hashes differ, of 64.
    """

    train_image: str
    other_image: str
    hamming_distance: int


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Duplicates across the splits.

    Attributes:
        exact: sets of images with identical pixels, up to intensity scale.
        near: pairs of similar images with different pixels. Some may be of two different subjects: see
            `docs/concepts/data.md`.
        max_hamming_distance: largest difference of hashes in a pair of `near`, in bits.
        images: number of images compared.
        n_unhashed: number of these images without a perceptual hash (uniform middle slice).
    """

    exact: tuple[tuple[str, ...], ...]
    near: tuple[NearDuplicate, ...]
    max_hamming_distance: int
    images: int
    n_unhashed: int


def find_duplicates(
    splits: Mapping[str, Split], fingerprints: Mapping[str, str], figures: Mapping[str, QualityMetrics]
) -> Duplicates:
    """Find images of the training split that also occur in another split.

    Args:
        splits: split by image key, for all images.
        fingerprints: fingerprint by image key, for the images in use.
        figures: quality metrics by image key, as far as available.
    """
    sides = {image: "train" if splits[image] == "train" else "held out" for image in fingerprints}
    hashes = {image: figures[image].hash for image in fingerprints if image in figures}
    keys = [image for image, image_hash in hashes.items() if image_hash is not None]
    values = np.array([int(str(hashes[image]), 16) for image in keys], np.uint64)
    near = []
    for firsts, seconds, distances in find_near_duplicates(values, MAX_DUPLICATE_BITS):
        for first, second, bits in zip(firsts, seconds, distances, strict=True):
            train_image, other_image = sorted((keys[first], keys[second]), key=lambda image: sides[image] == "held out")
            is_copy = fingerprints[train_image] and fingerprints[train_image] == fingerprints[other_image]
            if sides[train_image] != sides[other_image] and not is_copy:
                near.append(NearDuplicate(train_image, other_image, int(bits)))
    exact = tuple(tuple(images) for images in shared_images(fingerprints, sides))
    return Duplicates(
        exact=exact,
        near=tuple(near),
        max_hamming_distance=MAX_DUPLICATE_BITS,
        images=len(fingerprints),
        n_unhashed=len(fingerprints) - len(keys),
    )
