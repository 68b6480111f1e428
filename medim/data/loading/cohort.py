"""Cohort: the images of a run, preprocessed and split by subject."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from medim.config import RunConfig
from medim.data.contamination import CaseIdentity
from medim.data.index.index import ImageRecord, Index, Rejection
from medim.data.loading.splits import assign_splits, count_overlap
from medim.data.loading.store import Store, fill_store
from medim.data.preprocessing.quality import QualityMetrics
from medim.model_spec import ModelSpec, Provenance
from medim.types import Array, Split, Step, UserError, Volume
from medim.version import collect_versions

log = logging.getLogger(__name__)
CACHE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Preprocessed images of an index.

    Attributes:
        index: index of the images.
        store: store of the preprocessed images.
        keys: image key to store key.
        splits: image key to split.
        fingerprints: image key to fingerprint.
        overlap: numbers of held-out images and subjects with the same pixels as images of the training split.
        rejections: images that could not be read or preprocessed.
    """

    index: Index
    store: Store
    keys: dict[str, str]
    splits: dict[str, Split]
    fingerprints: dict[str, str]
    overlap: dict[str, int]
    rejections: tuple[Rejection, ...]

    def cases(self, records: Sequence[ImageRecord]) -> list[CaseIdentity]:
        """List fingerprint and subject of some images."""
        return [(self.fingerprints[record.image], record.subject) for record in records]

    def records(self, part: Split) -> tuple[ImageRecord, ...]:
        """List the usable images of a split, in the order of the index."""
        return tuple(r for r in self.index.records if r.image in self.keys and self.splits[r.image] == part)

    def labelled_records(self, part: Split) -> tuple[ImageRecord, ...]:
        """List the usable images of a split that have a label (a class), in the order of the index."""
        return tuple(record for record in self.records(part) if record.label is not None)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Labels of the training split, in the order of the index."""
        train_labels = {record.label for record in self.records("train")}
        return tuple(name for name in self.index.labels if name in train_labels)

    def class_indices(self, records: Sequence[ImageRecord]) -> Array:
        """Compute the (N,) indices in `classes` of the labels of some images."""
        return np.array([self.classes.index(str(record.label)) for record in records])

    def build_spec(self, config: RunConfig, *, seed: int, split_seed: int) -> ModelSpec:
        """Build the description of a network's input and origin; see `medim.models.serialization`."""
        return ModelSpec(
            kind="encoder",
            modality=config.modality,
            spatial_dims=config.spatial_dims,
            in_channels=self.store.get_entry(next(iter(self.keys.values()))).channels,
            input_shape=tuple(config.views.shape),
            encoder=config.encoder,
            preprocessing=tuple(config.preprocessing),
            preset=config.name,
            provenance=Provenance(
                config_hash=config.hash,
                index_hash=self.index.hash,
                where=self.index.public_where,
                seed=seed,
                split_seed=split_seed,
                versions=collect_versions(),
            ),
        )

    def quality_metrics(self) -> dict[str, QualityMetrics]:
        """Map image keys to the quality metrics of the images as read."""
        metrics_by_image = {image: self.store.get_entry(key).metrics for image, key in self.keys.items()}
        return {image: metrics for image, metrics in metrics_by_image.items() if metrics is not None}

    def read_mask(self, record: ImageRecord) -> Array:
        """Read the preprocessed mask (1, ...) of an image."""
        return self.store.read_mask(self.keys[record.image])

    def list_mask_classes(self, record: ImageRecord) -> list[int]:
        """List the numbers of the classes in the mask of an image."""
        numbers: list[int] = self.store.read_foreground(self.keys[record.image]).classes.tolist()
        return numbers

    def store_keys(self, records: Sequence[ImageRecord]) -> list[str]:
        """List the store keys of some images."""
        return [self.keys[record.image] for record in records]


class VolumeCache:
    """Cached images of a cohort: read from the store once, later from memory if they fit.

    Args:
        cohort: cohort of the images.
    """

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._volumes: dict[str, Volume] = {}

    def read_volumes(self, records: Sequence[ImageRecord]) -> Iterator[Volume]:
        """Read images one after the other, in the order of `records`."""
        for record in records:
            volume = self._volumes.get(record.image)
            if volume is None:
                volume = self._cohort.store.load_volume(self._cohort.keys[record.image])
            if len(self._volumes) * volume.array.nbytes < CACHE_BYTES:  # images of a source have similar sizes
                self._volumes[record.image] = volume
            yield volume


def open_cohort(
    index: Index,
    records: Sequence[ImageRecord],
    steps: Sequence[Step],
    *,
    split_seed: int,
    store: Path | None = None,
    jobs: int = 1,
    fail_on_contamination: bool = False,
) -> Cohort:
    """Preprocess images that are not in the store, and split by subject; images with equal pixels share a split.

    Args:
        index: the images. The split covers all of them, independent of `records`.
        records: images to preprocess.
        steps: preprocessing steps.
        split_seed: seed of the split, for images without a split in the source.
        store: folder of the store; None for the user's cache.
        jobs: number of preprocessing processes.
        fail_on_contamination: reject a source if its own splits separate images with the same pixels.

    Raises:
        UserError: no image is usable, a split is empty, or `fail_on_contamination` and the splits overlap.
    """
    image_store = Store(store)

    def log_progress(count: int, total: int) -> None:
        if count == total or count % 500 == 0:
            log.info("preprocessing: %d of %d images", count, total)

    keys, rejections = fill_store(image_store, index, records, steps, jobs=jobs, progress=log_progress)
    for rejection in rejections:
        log.warning("%s: excluded (%s: %s)", rejection.path, rejection.reason, rejection.detail)
    if not keys:
        raise UserError(
            f"none of {len(records)} images could be preprocessed; "
            f"first reason: {rejections[0].detail if rejections else 'no images given'}"
        )
    fingerprints = {image: image_store.get_entry(key).fingerprint for image, key in keys.items()}
    splits = assign_splits(index, seed=split_seed, fingerprints=fingerprints)
    overlap = count_overlap(index, splits, fingerprints, fail_on_contamination=fail_on_contamination)
    return Cohort(
        index=index,
        store=image_store,
        keys=keys,
        splits=splits,
        fingerprints=fingerprints,
        overlap=overlap,
        rejections=rejections,
    )
