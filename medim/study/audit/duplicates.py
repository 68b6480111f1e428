"""Images that stand on both sides of a split under two names: the same pixels, or nearly the same picture."""

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
    """Two images of two splits whose perceptual hashes hardly differ.

    Attributes:
        trained: of the training split.
        held_out: of another split.
        bits: in which the two hashes differ, of 64.
    """

    trained: str
    held_out: str
    bits: int


@dataclass(frozen=True)
class Duplicates:
    """What stands on both sides.

    Attributes:
        exact: images with the same pixels, whatever their scale; a list a set of copies.
        near: pairs that look alike and have other pixels. Some are two people: see `docs/concepts/data.md`.
        bits: that a pair of `near` may differ in.
        images: that were compared.
        unhashed: of them, those that have no perceptual hash (nothing in the middle slice).
    """

    exact: tuple[tuple[str, ...], ...]
    near: tuple[NearDuplicate, ...]
    bits: int
    images: int
    unhashed: int


def find_duplicates(
    splits: Mapping[str, Split], fingerprints: Mapping[str, str], figures: Mapping[str, QualityMetrics]
) -> Duplicates:
    """Find what stands in the training split and in another one.

    Args:
        splits: of all images.
        fingerprints: image key to fingerprint, of the images that are used.
        figures: image key to figures, as far as they are known.
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
    return Duplicates(exact, tuple(near), MAX_DUPLICATE_BITS, len(fingerprints), len(fingerprints) - len(keys))
