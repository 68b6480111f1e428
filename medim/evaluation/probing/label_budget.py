"""The images that a probe learns from and is measured on, and how many labels it may use."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medim.data.contamination import CaseIdentity
from medim.data.index.index import ImageRecord, Index
from medim.data.labels import check_label_kind
from medim.data.loading.splits import assign_splits, count_overlap, select_label_budget
from medim.data.loading.store import Store, fill_store
from medim.types import Array, Split, UserError, Volume

log = logging.getLogger(__name__)
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Budget:
    """How many labels a probe may use: a number of images, or a share of the labelled training images."""

    labelled: int | None = None
    fraction: float | None = None

    @property
    def name(self) -> str:
        """`50` images, or `10%`."""
        return f"{self.labelled}" if self.fraction is None else f"{100 * self.fraction:g}%"

    def draw_subset(self, records: Sequence[ImageRecord], seed: int) -> tuple[ImageRecord, ...]:
        """The images it gives; see `medim.data.loading.splits.select_label_budget`."""
        return select_label_budget(records, labelled=self.labelled, fraction=self.fraction, seed=seed)


@dataclass(frozen=True)
class ProbeCohort:
    """Preprocessed images of a source, as a probe uses them.

    Attributes:
        store: where they lie.
        keys: image key to store key.
        train: the training split, labelled or not.
        labelled: those of it with a label.
        val: labelled images of the validation split.
        classes: the labels of the training split.
        cases: fingerprint and subject of each of `val`.
        overlap: how many images of `val` (and subjects) have pixels that stand in the training split too.
        rejected: images that could not be read or preprocessed.
    """

    store: Store
    keys: dict[str, str]
    train: tuple[ImageRecord, ...]
    labelled: tuple[ImageRecord, ...]
    val: tuple[ImageRecord, ...]
    classes: tuple[str, ...]
    cases: tuple[CaseIdentity, ...]
    overlap: dict[str, int]
    rejected: int
    _volume_cache: dict[str, Volume] = field(default_factory=dict, repr=False, compare=False)

    @property
    def feature_records(self) -> tuple[ImageRecord, ...]:
        """Those whose features are wanted."""
        return self.labelled + self.val

    def read_volumes(self, records: Sequence[ImageRecord]) -> Iterator[Volume]:
        """Read images one after the other, the first time from the store; later from memory where they fit."""
        for record in records:
            volume = self._volume_cache.get(record.image) or self.store.load_volume(self.keys[record.image])
            if len(self._volume_cache) * volume.array.nbytes < CACHE_BYTES:  # images of a source are of about one size
                self._volume_cache[record.image] = volume
            yield volume

    def class_indices(self, records: Sequence[ImageRecord]) -> Array:
        """(N,) class indices."""
        return np.array([self.classes.index(str(record.label)) for record in records])


def open_probe_cohort(
    index: Index, spec: dict[str, Any], *, split_seed: int, store: Path | None = None, strict: bool = False
) -> ProbeCohort:
    """Preprocess what the store does not hold yet: the training split, and what of the validation split has a label.

    Args:
        index: the images.
        spec: the encoder's (see `medim.models.serialization`).
        split_seed: of the split by subject.
        store: folder of preprocessed images; None is the user's cache.
        strict: refuse a source whose own splits put the same pixels on two sides.

    Raises:
        UserError: a split without labels, a class alone or in the validation split alone, images the encoder cannot
            take, or `strict`.
    """
    train, val = _split_records(index, assign_splits(index, seed=split_seed))
    _check_labels(index, train, val)  # before hours of preprocessing, and after it
    image_store = Store(store)

    def log_progress(done: int, total: int) -> None:
        if done == total or done % 500 == 0:
            log.info("preprocessing: %d of %d images", done, total)

    keys, rejections = fill_store(image_store, index, [*train, *val], spec["preprocessing"], progress=log_progress)
    for rejection in rejections:
        log.warning("%s: left out (%s: %s)", rejection.path, rejection.reason, rejection.detail)
    fingerprints = {image: image_store.get_entry(key).fingerprint for image, key in keys.items()}
    splits = assign_splits(index, seed=split_seed, fingerprints=fingerprints)
    train, val = (tuple(r for r in part if r.image in keys) for part in _split_records(index, splits))
    _check_labels(index, train, val)
    for key in keys.values():
        entry = image_store.get_entry(key)
        if (len(entry.shape), entry.channels) != (spec["spatial_dims"], spec["in_channels"]):
            raise UserError(
                f"{index.root}: expected {spec['spatial_dims']}D images of {spec['in_channels']} channel(s), as the "
                f"encoder takes, got {len(entry.shape)}D of {entry.channels}. Give images like those it was trained on."
            )
    labelled = tuple(record for record in train if record.label is not None)
    cases = tuple((fingerprints[record.image], record.subject) for record in val)
    overlap = count_overlap(index, splits, fingerprints, strict=strict)
    return ProbeCohort(
        image_store, keys, train, labelled, val, _present_classes(index, labelled), cases, overlap, len(rejections)
    )


def draw_probe_subsets(
    cohort: ProbeCohort, budgets: Sequence[Budget], seeds: Sequence[int]
) -> dict[tuple[Budget, int], tuple[ImageRecord, ...]]:
    """The label subset of each budget and seed, nested for one seed.

    A budget that takes every labelled image has one subset, which is given for the first seed alone.

    Raises:
        UserError: a subset without a label of some class.
        UsageError: a budget out of range.
    """
    subsets = {}
    for label_budget in dict.fromkeys(budgets):
        for seed in dict.fromkeys(seeds):
            subset = label_budget.draw_subset(cohort.labelled, seed)
            if len(subset) == len(cohort.labelled) and seed != seeds[0]:
                continue
            missing = [name for name in cohort.classes if name not in {record.label for record in subset}]
            if missing:
                raise UserError(
                    f"budget {label_budget.name}, seed {seed}: expected a label of every class "
                    f"({', '.join(cohort.classes)}),"
                    f" got {len(subset)} image(s) without {', '.join(missing)}. Give a larger budget."
                )
            subsets[label_budget, seed] = subset
    return subsets


def number_subjects(records: Sequence[ImageRecord]) -> Array:
    """(N,) the subject of each image, numbered as they come: pseudonyms differ from site to site, their order not."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(record.subject, len(numbers)) for record in records])


def _split_records(
    index: Index, splits: Mapping[str, Split]
) -> tuple[tuple[ImageRecord, ...], tuple[ImageRecord, ...]]:
    """The training split, and what of the validation split has a label."""
    train = tuple(record for record in index.records if splits[record.image] == "train")
    return train, tuple(r for r in index.records if splits[r.image] == "val" and r.label is not None)


def _present_classes(index: Index, records: Sequence[ImageRecord]) -> tuple[str, ...]:
    record_labels = {record.label for record in records}
    return tuple(name for name in index.labels if name in record_labels)


def _check_labels(index: Index, train: Sequence[ImageRecord], val: Sequence[ImageRecord]) -> None:
    check_label_kind(record.label for record in index.records)
    if index.findings:
        raise UserError(
            f"{index.root}: expected one class an image, got findings. A probe tells classes apart: give --labels CSV "
            "with columns image,label, or fine-tune (`medim finetune --task classification`)."
        )
    train_classes, val_classes = _present_classes(index, train), _present_classes(index, val)
    for part, part_classes in (("training", train_classes), ("validation", val_classes)):
        if not part_classes:
            raise UserError(
                f"{index.root}: expected images with a label (a class) in the {part} split, got none. A probe "
                "classifies whole images: give --labels CSV with columns image,label."
            )
    if len(train_classes) < 2:
        raise UserError(
            f"{index.root}: expected labels of 2 or more classes to tell apart, got {train_classes[0]!r} alone."
        )
    unknown_labels = [name for name in val_classes if name not in train_classes]
    if unknown_labels:
        raise UserError(
            f"{index.root}: expected every label of the validation split in the training split too, got "
            f"{', '.join(unknown_labels)} in the former alone. Choose another --split-seed, or leave these images out."
        )
