"""The images that a probe learns from and is measured on, and how many labels it may use."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medim.data.contamination import Case
from medim.data.index.index import Index, Record
from medim.data.labels import check_one_kind
from medim.data.loading.splits import budget, on_both_sides, split
from medim.data.loading.store import Store, fill
from medim.types import Array, Split, UserError, Volume

log = logging.getLogger(__name__)
KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Budget:
    """How many labels a probe may use: a number of images, or a share of the labelled training images."""

    labelled: int | None = None
    fraction: float | None = None

    @property
    def name(self) -> str:
        """`50` images, or `10%`."""
        return f"{self.labelled}" if self.fraction is None else f"{100 * self.fraction:g}%"

    def of(self, records: Sequence[Record], seed: int) -> tuple[Record, ...]:
        """The images it gives; see `medim.data.loading.splits.budget`."""
        return budget(records, labelled=self.labelled, fraction=self.fraction, seed=seed)


@dataclass(frozen=True)
class Sample:
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
    train: tuple[Record, ...]
    labelled: tuple[Record, ...]
    val: tuple[Record, ...]
    classes: tuple[str, ...]
    cases: tuple[Case, ...]
    overlap: dict[str, int]
    rejected: int
    _kept: dict[str, Volume] = field(default_factory=dict, repr=False, compare=False)

    @property
    def used(self) -> tuple[Record, ...]:
        """Those whose features are wanted."""
        return self.labelled + self.val

    def volumes(self, records: Sequence[Record]) -> Iterator[Volume]:
        """Read images one after the other, the first time from the store; later from memory where they fit."""
        for record in records:
            volume = self._kept.get(record.image) or self.store.volume(self.keys[record.image])
            if len(self._kept) * volume.array.nbytes < KEPT_BYTES:  # images of a source are of about one size
                self._kept[record.image] = volume
            yield volume

    def targets(self, records: Sequence[Record]) -> Array:
        """(N,) class indices."""
        return np.array([self.classes.index(str(record.label)) for record in records])


def open_sample(
    index: Index, spec: dict[str, Any], *, split_seed: int, store: Path | None = None, strict: bool = False
) -> Sample:
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
    train, val = _parts(index, split(index, seed=split_seed))
    _check_labels(index, train, val)  # before hours of preprocessing, and after it
    shelf = Store(store)

    def progress(done: int, total: int) -> None:
        if done == total or done % 500 == 0:
            log.info("preprocessing: %d of %d images", done, total)

    keys, failed = fill(shelf, index, [*train, *val], spec["preprocessing"], progress=progress)
    for rejection in failed:
        log.warning("%s: left out (%s: %s)", rejection.path, rejection.reason, rejection.detail)
    prints = {image: shelf.entry(key).fingerprint for image, key in keys.items()}
    splits = split(index, seed=split_seed, prints=prints)
    train, val = (tuple(r for r in part if r.image in keys) for part in _parts(index, splits))
    _check_labels(index, train, val)
    for key in keys.values():
        entry = shelf.entry(key)
        if (len(entry.shape), entry.channels) != (spec["spatial_dims"], spec["in_channels"]):
            raise UserError(
                f"{index.root}: expected {spec['spatial_dims']}D images of {spec['in_channels']} channel(s), as the "
                f"encoder takes, got {len(entry.shape)}D of {entry.channels}. Give images like those it was trained on."
            )
    labelled = tuple(record for record in train if record.label is not None)
    cases = tuple((prints[record.image], record.subject) for record in val)
    overlap = on_both_sides(index, splits, prints, strict=strict)
    return Sample(shelf, keys, train, labelled, val, _classes(index, labelled), cases, overlap, len(failed))


def draw(
    sample: Sample, budgets: Sequence[Budget], seeds: Sequence[int]
) -> dict[tuple[Budget, int], tuple[Record, ...]]:
    """The label subset of each budget and seed, nested for one seed.

    A budget that takes every labelled image has one subset, which is given for the first seed alone.

    Raises:
        UserError: a subset without a label of some class.
        UsageError: a budget out of range.
    """
    subsets = {}
    for chosen in dict.fromkeys(budgets):
        for seed in dict.fromkeys(seeds):
            subset = chosen.of(sample.labelled, seed)
            if len(subset) == len(sample.labelled) and seed != seeds[0]:
                continue
            missing = [name for name in sample.classes if name not in {record.label for record in subset}]
            if missing:
                raise UserError(
                    f"budget {chosen.name}, seed {seed}: expected a label of every class ({', '.join(sample.classes)}),"
                    f" got {len(subset)} image(s) without {', '.join(missing)}. Give a larger budget."
                )
            subsets[chosen, seed] = subset
    return subsets


def groups_of(records: Sequence[Record]) -> Array:
    """(N,) the subject of each image, numbered as they come: pseudonyms differ from site to site, their order not."""
    places: dict[str, int] = {}
    return np.array([places.setdefault(record.subject, len(places)) for record in records])


def _parts(index: Index, splits: Mapping[str, Split]) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The training split, and what of the validation split has a label."""
    train = tuple(record for record in index.records if splits[record.image] == "train")
    return train, tuple(r for r in index.records if splits[r.image] == "val" and r.label is not None)


def _classes(index: Index, records: Sequence[Record]) -> tuple[str, ...]:
    found = {record.label for record in records}
    return tuple(name for name in index.labels if name in found)


def _check_labels(index: Index, train: Sequence[Record], val: Sequence[Record]) -> None:
    check_one_kind(record.label for record in index.records)
    if index.findings:
        raise UserError(
            f"{index.root}: expected one class an image, got findings. A probe tells classes apart: give --labels CSV "
            "with columns image,label, or fine-tune (`medim finetune --task classification`)."
        )
    classes, measured = _classes(index, train), _classes(index, val)
    for part, found in (("training", classes), ("validation", measured)):
        if not found:
            raise UserError(
                f"{index.root}: expected images with a label (a class) in the {part} split, got none. A probe "
                "classifies whole images: give --labels CSV with columns image,label."
            )
    if len(classes) < 2:
        raise UserError(f"{index.root}: expected labels of 2 or more classes to tell apart, got {classes[0]!r} alone.")
    strange = [name for name in measured if name not in classes]
    if strange:
        raise UserError(
            f"{index.root}: expected every label of the validation split in the training split too, got "
            f"{', '.join(strange)} in the former alone. Choose another --split-seed, or leave these images out."
        )
