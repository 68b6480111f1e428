"""Open the images of a probe: the training split, and the labelled images of the validation split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from medim.data.index.index import ImageRecord, Index
from medim.data.labels import check_label_kind
from medim.data.loading.cohort import Cohort, open_cohort
from medim.data.loading.splits import assign_splits
from medim.model_spec import ModelSpec
from medim.tasks.task import Task
from medim.types import Split, UserError


def open_probe_cohort(
    index: Index,
    task: Task,
    spec: ModelSpec,
    *,
    split_seed: int,
    store: Path | None = None,
    fail_on_contamination: bool = False,
) -> Cohort:
    """Preprocess the images that are not in the store: the training split, and the labelled validation images.

    Args:
        index: the images.
        task: task of the probe.
        spec: specification of the encoder (see `medim.models.serialization`).
        split_seed: random seed of the split by subject.
        store: folder of preprocessed images; None is the user's cache.
        fail_on_contamination: raise an error if the splits of the source share images with the same pixels.

    Raises:
        UserError: a split has no labels, the labels are not those of the task, there is a single class or number, a
            class occurs in the validation split only, the encoder does not accept the images, or the splits share
            images and `fail_on_contamination` is set.
    """
    train, val = _split_records(index, assign_splits(index, seed=split_seed))
    _check_labels(index, task, train, val)  # check before and after the long preprocessing
    cohort = open_cohort(
        index,
        [*train, *val],
        spec.preprocessing,
        split_seed=split_seed,
        store=store,
        fail_on_contamination=fail_on_contamination,
    )
    _check_labels(index, task, cohort.records("train"), cohort.labelled_records("val"))
    for key in cohort.keys.values():
        entry = cohort.store.get_entry(key)
        if (len(entry.shape), entry.channels) != (spec.spatial_dims, spec.in_channels):
            raise UserError(
                f"{index.source_name}: expected {spec.spatial_dims}D images of {spec.in_channels} channel(s), as the "
                f"encoder takes, got {len(entry.shape)}D of {entry.channels}. Give images like those it was trained on."
            )
    return cohort


def _split_records(
    index: Index, splits: Mapping[str, Split]
) -> tuple[tuple[ImageRecord, ...], tuple[ImageRecord, ...]]:
    """Select the training split, and the labelled images of the validation split."""
    train = tuple(record for record in index.records if splits[record.image] == "train")
    return train, tuple(r for r in index.records if splits[r.image] == "val" and r.label is not None)


def _present_classes(index: Index, records: Sequence[ImageRecord]) -> tuple[str, ...]:
    record_labels = {record.label for record in records}
    return tuple(name for name in index.labels if name in record_labels)


def _check_labels(index: Index, task: Task, train: Sequence[ImageRecord], val: Sequence[ImageRecord]) -> None:
    check_label_kind(record.label for record in index.records)
    if not task.has_class_labels:
        _check_numbers(index, task, train, val)
        return
    if index.findings:
        raise UserError(
            f"{index.source_name}: expected one class per image, got findings. A probe predicts one class: give "
            "--labels CSV with columns image,label, or fine-tune (`medim finetune --task classification`)."
        )
    train_classes, val_classes = _present_classes(index, train), _present_classes(index, val)
    for part, part_classes in (("training", train_classes), ("validation", val_classes)):
        if not part_classes:
            raise UserError(
                f"{index.source_name}: there are no images with a class label in the {part} split. A probe "
                "classifies whole images: give --labels CSV with columns image,label."
            )
    if len(train_classes) < 2:
        raise UserError(f"{index.source_name}: expected labels of 2 or more classes, got only {train_classes[0]!r}.")
    unknown_labels = [name for name in val_classes if name not in train_classes]
    if unknown_labels:
        raise UserError(
            f"{index.source_name}: expected every label of the validation split in the training split too, got "
            f"{', '.join(unknown_labels)} in validation only. Choose another --split-seed, or exclude these images."
        )


def _check_numbers(index: Index, task: Task, train: Sequence[ImageRecord], val: Sequence[ImageRecord]) -> None:
    if not task.accepts_labels(index):
        raise UserError(task.label_form_error(index))
    for part, records in (("training", train), ("validation", val)):
        if not any(record.label is not None for record in records):
            raise UserError(
                f"{index.source_name}: there are no images with a number as label in the {part} split. Give "
                "--labels CSV with columns image,label."
            )
    if len({float(str(record.label)) for record in train if record.label is not None}) < 2:
        raise UserError(
            f"{index.source_name}: expected labels that differ in the training split. Check the label column."
        )
