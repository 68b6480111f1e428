"""The images of a run: preprocessed, and split by subject."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medim.config import RunConfig
from medim.data.contamination import Case
from medim.data.index.index import Index, Record, Rejection
from medim.data.loading.splits import on_both_sides, split
from medim.data.loading.store import Store, fill
from medim.data.preprocessing.quality import Figures
from medim.types import Split, Step, UserError
from medim.version import versions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cohort:
    """Preprocessed images of an index.

    Attributes:
        index: where they come from.
        store: where they lie.
        keys: image key to store key.
        splits: image key to split.
        prints: image key to fingerprint.
        overlap: how many held-out images (and subjects) have pixels that stand in the training split too.
        rejected: images that could not be read or preprocessed.
    """

    index: Index
    store: Store
    keys: dict[str, str]
    splits: dict[str, Split]
    prints: dict[str, str]
    overlap: dict[str, int]
    rejected: tuple[Rejection, ...]

    def cases(self, records: Sequence[Record]) -> list[Case]:
        """Fingerprint and subject of some images."""
        return [(self.prints[record.image], record.subject) for record in records]

    def records(self, part: Split) -> tuple[Record, ...]:
        """The usable images of a split, in the index's order."""
        return tuple(r for r in self.index.records if r.image in self.keys and self.splits[r.image] == part)

    def spec(self, config: RunConfig, *, seed: int, split_seed: int) -> dict[str, Any]:
        """What a saved network says of its input and its origin; see `medim.models.serialization`."""
        return {
            "modality": config.modality,
            "spatial_dims": config.spatial_dims,
            "in_channels": self.store.entry(next(iter(self.keys.values()))).channels,
            "input_shape": list(config.views.shape),
            "encoder": config.encoder,
            "preprocessing": config.preprocessing,
            "inference": {"mode": "whole"},
            "classes": [],
            "preset": config.name,
            "provenance": {
                "config_hash": config.hash,
                "index_hash": self.index.hash,
                "seed": seed,
                "split_seed": split_seed,
                "parent": None,
                **versions(),
            },
        }

    def figures(self) -> dict[str, Figures]:
        """Image key to the figures of the image as it was read."""
        found = {image: self.store.entry(key).figures for image, key in self.keys.items()}
        return {image: figures for image, figures in found.items() if figures is not None}

    def store_keys(self, records: Sequence[Record]) -> list[str]:
        """Store keys of some images."""
        return [self.keys[record.image] for record in records]


def open_cohort(
    index: Index,
    records: Sequence[Record],
    steps: Sequence[Step],
    *,
    split_seed: int,
    store: Path | None = None,
    jobs: int = 1,
    strict: bool = False,
) -> Cohort:
    """Preprocess what the store does not hold yet, and split by subject; images with the same pixels stay together.

    Args:
        index: the images; the split is over all of them, whatever `records` asks for.
        records: those to preprocess.
        steps: preprocessing.
        split_seed: seed of the split where the source defines none.
        store: folder of the store; None is the user's cache.
        jobs: preprocessing processes.
        strict: refuse a source whose own splits put the same pixels on two sides.

    Raises:
        UserError: no image is left, the split leaves a side empty, or `strict`.
    """
    shelf = Store(store)

    def progress(done: int, total: int) -> None:
        if done == total or done % 500 == 0:
            log.info("preprocessing: %d of %d images", done, total)

    keys, failed = fill(shelf, index, records, steps, jobs=jobs, progress=progress)
    for rejection in failed:
        log.warning("%s: left out (%s: %s)", rejection.path, rejection.reason, rejection.detail)
    if not keys:
        raise UserError(
            f"none of {len(records)} images could be preprocessed; "
            f"the first says: {failed[0].detail if failed else 'no images given'}"
        )
    prints = {image: shelf.entry(key).fingerprint for image, key in keys.items()}
    splits = split(index, seed=split_seed, prints=prints)
    overlap = on_both_sides(index, splits, prints, strict=strict)
    return Cohort(index, shelf, keys, splits, prints, overlap, failed)
