"""Images that stand on both sides of a split under two names: the same pixels, or nearly the same picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medim.data.fingerprints import overlap
from medim.data.loading.quality_table import NEAR, near_duplicates
from medim.data.preprocessing.quality import Figures
from medim.types import Split


@dataclass(frozen=True)
class Lookalike:
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
    near: tuple[Lookalike, ...]
    bits: int
    images: int
    unhashed: int


def duplicates(splits: Mapping[str, Split], prints: Mapping[str, str], figures: Mapping[str, Figures]) -> Duplicates:
    """Find what stands in the training split and in another one.

    Args:
        splits: of all images.
        prints: image key to fingerprint, of the images that are used.
        figures: image key to figures, as far as they are known.
    """
    sides = {image: "train" if splits[image] == "train" else "held out" for image in prints}
    hashes = {image: figures[image].hash for image in prints if image in figures}
    keys = [image for image, found in hashes.items() if found is not None]
    values = np.array([int(str(hashes[image]), 16) for image in keys], np.uint64)
    near = []
    for firsts, seconds, apart in near_duplicates(values, NEAR):
        for one, two, bits in zip(firsts, seconds, apart, strict=True):
            trained, held = sorted((keys[one], keys[two]), key=lambda image: sides[image] == "held out")
            same = prints[trained] and prints[trained] == prints[held]
            if sides[trained] != sides[held] and not same:
                near.append(Lookalike(trained, held, int(bits)))
    exact = tuple(tuple(images) for images in overlap(prints, sides))
    return Duplicates(exact, tuple(near), NEAR, len(prints), len(prints) - len(keys))
