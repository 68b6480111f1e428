"""Splits and label budgets: assigned by whole subjects, from the index and a seed alone.

All seeded operations use the order in which subjects first appear in the index, not their pseudonyms, which differ
between sites. One seeded order of the subjects is used for everything: its first subjects form the validation split,
or the smallest budget.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import numpy as np

from medim.data.fingerprints import merge_groups, shared_images
from medim.data.labels import stratification_labels
from medim.files import write_csv
from medim.parsing import read_csv
from medim.types import Split, UsageError, UserError

if TYPE_CHECKING:
    from medim.data.index.index import ImageRecord, Index

log = logging.getLogger(__name__)
SPLIT_COLUMNS = ("image", "subject", "split", "label", "label_rank", "used_for_training")


def assign_splits(
    index: Index, *, seed: int = 0, val_fraction: float = 0.2, fingerprints: Mapping[str, str] | None = None
) -> dict[str, Split]:
    """Assign every image to a split.

    Splits defined by the source are kept. Of the other subjects, `val_fraction` (rounded, at least one of two or more)
    form the validation split and the rest the training split, with similar class proportions. Subjects that share an
    image are then moved to one split: that of the source, if it defines one, else validation if one of them is there.
    Other subjects do not move, so commands with different images never train on the held-out images of another command.

    Args:
        index: the images.
        seed: `--split-seed`.
        val_fraction: fraction of subjects, 0 to below 1.
        fingerprints: image key to fingerprint; may be incomplete.

    Returns:
        Image key to "train", "val" or "test".

    Raises:
        UserError: the source defines an unknown split, or assigns one subject to two splits.
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction: expected at least 0 and below 1, got {val_fraction}.")
    split_of_subject: dict[str, Split] = {}
    for record in index.records:
        if record.split is None:
            continue
        if record.split not in get_args(Split):
            raise UserError(
                f"{record.path}: expected split train, val or test, got {record.split!r}. Correct the column."
            )
        if split_of_subject.setdefault(record.subject, cast(Split, record.split)) != record.split:
            raise UserError(
                f"{record.path}: its subject is in {record.split!r} and in {split_of_subject[record.subject]!r}; "
                "a subject belongs to one split. Correct the source's split column or the --subjects table."
            )
    source_subjects = frozenset(split_of_subject)
    groups = _order_subjects([r for r in index.records if r.subject not in source_subjects], seed, each_first=False)
    count = math.floor(val_fraction * len(groups) + 0.5)
    if val_fraction > 0 and len(groups) > 1:
        count = max(count, 1)
    for rank, group in enumerate(groups):
        split_of_subject[group[0].subject] = "val" if rank < count else "train"
    subjects = {record.image: record.subject for record in index.records}
    for linked_subjects in merge_groups(
        [subjects[image] for image in images] for images in shared_images(fingerprints or {}, subjects)
    ):
        source_splits = [split_of_subject[subject] for subject in linked_subjects if subject in source_subjects]
        target_split = (
            source_splits[0]
            if source_splits
            else "val"
            if any(split_of_subject[subject] == "val" for subject in linked_subjects)
            else "train"
        )
        split_of_subject.update(
            dict.fromkeys((subject for subject in linked_subjects if subject not in source_subjects), target_split)
        )
    return {record.image: split_of_subject[record.subject] for record in index.records}


def count_overlap(
    index: Index, splits: Mapping[str, Split], fingerprints: Mapping[str, str], *, fail_on_contamination: bool = False
) -> dict[str, int]:
    """Count held-out images, and their subjects, with the same pixels as an image of the training split.

    Such images only occur if the source itself defines the splits.

    Args:
        index: the images.
        splits: image key to split, for all images.
        fingerprints: image key to fingerprint; may be incomplete.
        fail_on_contamination: raise an error if there are any.

    Raises:
        UserError: `fail_on_contamination`, and there are such images.
    """
    train_fingerprints = {
        fingerprint for image, fingerprint in fingerprints.items() if fingerprint and splits[image] == "train"
    }
    duplicates = [
        r for r in index.records if splits[r.image] != "train" and fingerprints.get(r.image) in train_fingerprints
    ]
    n_subjects = len({record.subject for record in duplicates})
    if duplicates:
        sentence = (
            f"the source's own splits: {len(duplicates)} held-out images (of {n_subjects} subjects) have the same "
            "pixels as images of the training split"
        )
        if fail_on_contamination:
            raise UserError(
                f"{sentence}. --fail-on-contamination allows none. Correct the split column, or omit this option."
            )
        log.warning("%s: validation metrics will be optimistic", sentence)
    return {"images": len(duplicates), "subjects": n_subjects}


def write_splits(
    path: Path,
    index: Index,
    splits: Mapping[str, Split],
    train_records: Sequence[ImageRecord],
    *,
    seed: int,
    labelled_records: Sequence[ImageRecord] | None = None,
) -> None:
    """Write `split.csv`, one row per image; used as `--labels`, it gives the same splits.

    Args:
        path: path of the file.
        index: the images.
        splits: image key to split, for all images.
        train_records: usable images of the training split. For those that can be part of a label budget, the column
            `label_rank` is the rank at which their subject enters.
        seed: seed of the label budget.
        labelled_records: images that the run was trained on with labels.
    """
    groups = enumerate(_order_budget_groups(_filter_labelled(train_records), seed), start=1)
    ranks = {record.image: rank for rank, group in groups for record in group}
    labelled_images = {record.image for record in labelled_records or ()}
    rows = (
        (
            record.image,
            record.subject,
            splits[record.image],
            record.label,
            ranks.get(record.image),
            None if labelled_records is None else "yes" if record.image in labelled_images else "no",
        )
        for record in index.records
    )
    write_csv(path, SPLIT_COLUMNS, rows)


def read_splits(path: Path) -> dict[str, Split]:
    """Read the map from image key to split written by `write_splits`.

    Raises:
        UserError: the file is damaged.
    """
    content = read_csv(path)
    content.require_columns(path, ("image", "split"))
    splits = {row["image"]: row["split"] for row in content}
    unknown_splits = set(splits.values()) - set(get_args(Split))
    if unknown_splits:
        raise UserError(
            f"{path}: expected columns image and split (train, val or test), got other values. Copy it again."
        )
    return cast(dict[str, Split], splits)


def check_label_budget(labelled: int | None, fraction: float | None) -> None:
    """Check the range of a label budget, without the images.

    Args:
        labelled: number of images, or None.
        fraction: fraction of the labelled images, or None.

    Raises:
        UsageError: both values are given, or one is out of range.
    """
    if labelled is not None and fraction is not None:
        raise UsageError("--labelled and --label-fraction: expected one of them, got both.")
    if labelled is not None and labelled < 1:
        raise UsageError(f"--labelled: expected at least 1 image, got {labelled}.")
    if fraction is not None and not 0 < fraction <= 1:
        raise UsageError(f"--label-fraction: expected above 0 and up to 1, got {fraction}.")


def select_label_budget(
    records: Sequence[ImageRecord], *, labelled: int | None = None, fraction: float | None = None, seed: int = 0
) -> tuple[ImageRecord, ...]:
    """Select the labelled images of a run: whole subjects, with smaller budgets contained in larger ones of a seed.

    Images without label or mask are excluded first. One order of the subjects is drawn, beginning with one subject per
    class and continuing with the classes in proportion. It is arranged so that whole subjects sum to exactly 1, 2, 3
    and every multiple of five images if their sizes allow it. A budget is the longest prefix of that order with at
    most the requested number of images. It never exceeds this number, except that it contains at least one subject,
    and is smaller by less than the size of one subject.

    Args:
        records: images of the training split.
        labelled: number of images; if larger than the number available, all are selected.
        fraction: fraction of the labelled images, above 0 and up to 1. If neither is given, all are selected.
        seed: random seed of the order.

    Returns:
        The selected records, in the order of the index.

    Raises:
        UserError: no image has a label or mask.
        UsageError: both counts given, or out of range.
    """
    check_label_budget(labelled, fraction)
    usable = _filter_labelled(records)
    if not usable:
        raise UserError(
            f"training split: expected labelled images, got {len(records)} without label or mask. Give --labels."
        )
    target_count = len(usable)
    if labelled is not None:
        target_count = min(labelled, target_count)
    elif fraction is not None:
        target_count = max(1, math.floor(fraction * target_count + 0.5))
    subjects: set[str] = set()
    count = 0
    for group in _order_budget_groups(usable, seed):
        if count + len(group) > target_count and subjects:
            break
        subjects.add(group[0].subject)
        count += len(group)
    return tuple(r for r in usable if r.subject in subjects)


def warn_label_shortage(records: Sequence[ImageRecord], labelled: int | None) -> None:
    """Log that a label budget is larger than the number of labelled images.

    Args:
        records: images of the training split.
        labelled: label budget in images, or None.
    """
    n_available = len(_filter_labelled(records))
    if labelled is not None and labelled > n_available:
        log.warning(
            "--labelled %d: the training split has %d labelled images; all of them are used", labelled, n_available
        )


def _filter_labelled(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    return [record for record in records if record.label is not None or record.mask is not None]


def _order_budget_groups(records: Sequence[ImageRecord], seed: int) -> list[list[ImageRecord]]:
    """Order the subjects, each with its images, as they enter a label budget; see `select_label_budget`."""
    return _balance_prefixes(_order_subjects(records, seed))


def _order_subjects(records: Sequence[ImageRecord], seed: int, *, each_first: bool = True) -> list[list[ImageRecord]]:
    """Group records by subject, in a seeded order with the classes in proportion.

    Args:
        records: records with their subjects and labels.
        seed: random seed of the order.
        each_first: begin with one subject of each class, as in label budgets. Otherwise, the only subject of a class
            comes last, so that it is used for training.
    """
    subjects: dict[str, list[ImageRecord]] = {}
    for record in records:
        subjects.setdefault(record.subject, []).append(record)
    groups = list(subjects.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    strata: dict[tuple[str, ...], list[int]] = {}
    group_classes = stratification_labels([{r.label for r in group if r.label is not None} for group in groups])
    for position in order:
        strata.setdefault(group_classes[position], []).append(int(position))
    if 2 * len(strata) > len(groups):  # labels that rarely repeat are numbers, not classes
        return [groups[position] for position in order]
    keys = {
        position: (rank > 0 if each_first else len(members) == 1, (rank + 0.5) / len(members))
        for members in strata.values()
        for rank, position in enumerate(members)
    }
    return [groups[position] for position in sorted(keys, key=lambda position: keys[position])]


def _balance_prefixes(groups: Sequence[list[ImageRecord]]) -> list[list[ImageRecord]]:
    """Reorder groups minimally so that their cumulative size meets 1, 2, 3 and the multiples of five if possible."""
    pending, out, count = list(groups), [], 0
    total = sum(len(g) for g in groups)
    for target in [1, 2, 3, *range(5, total + 5, 5)]:
        remaining = []
        for position, group in enumerate(pending):
            if count == target:
                remaining.extend(pending[position:])
                break
            if count + len(group) <= target:
                out.append(group)
                count += len(group)
            else:
                remaining.append(group)
        pending = remaining
    return out + pending
