"""Audit a study or run for leakage between the splits and for shortcuts.

`audit` examines the preprocessed images and the predictions of models on the evaluation split. The results are written
to `audit.json` (`docs/reference/files.md`); `docs/concepts/shortcuts.md` explains how to interpret them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medim.data.index.index import ImageRecord
from medim.data.loading.cohort import Cohort
from medim.data.loading.splits import select_label_budget
from medim.evaluation.cases import summarise_cases
from medim.evaluation.probing.baselines import principal_components
from medim.files import write_json
from medim.metrics.bootstrap import MIN_SUBJECTS, MetricEstimate
from medim.models.feature_extraction import batch_images, check_finite_features, extract_features
from medim.models.serialization import load_encoder
from medim.study.audit.duplicates import Duplicates, find_duplicates
from medim.study.audit.groups import (
    GroupMetrics,
    Groups,
    collect_header_groups,
    compute_group_metrics,
    number_values,
    usable_groups,
)
from medim.study.audit.shortcuts import (
    PredictionResult,
    Shortcut,
    build_train_test_split,
    describe_class_shortage,
    input_intensity,
    input_size,
    measure_padding,
    measure_shortcut,
    predict_label,
    raw_intensity,
    raw_size,
)
from medim.tasks import find_task_of_kind
from medim.tasks.task import CaseRow
from medim.types import Array, Volume

log = logging.getLogger(__name__)
SCHEMA_VERSION = 2
AUDIT = "audit.json"
PIXELS = "pixels"
MAX_TRAINING_IMAGES = 1000  # training images of the classifiers, which have few features per image


@dataclass(frozen=True, kw_only=True)
class GroupProbe:
    """Accuracy with which frozen features predict groups that should not affect the result.

    Attributes:
        column: variable that defines the groups.
        features: name of an encoder, or `pixels` (principal components).
        values: groups that are predicted.
        excluded: groups with fewer than five subjects in a split.
        prediction: prediction result.
    """

    column: str
    features: str
    values: tuple[str, ...]
    excluded: tuple[str, ...]
    prediction: PredictionResult


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Results of an audit.

    Attributes:
        images: numbers of images and subjects of each split.
        duplicates: duplicates across the splits.
        shortcuts: image properties that predict the label; classification only.
        models: metrics of the models on the same evaluation split, for comparison.
        probes: prediction of groups from features.
        groups: metrics of the models by group.
        notes: checks that were not possible, with the reason.
    """

    images: dict[str, dict[str, int]]
    duplicates: Duplicates
    shortcuts: tuple[Shortcut, ...]
    models: dict[str, dict[str, MetricEstimate]]
    probes: tuple[GroupProbe, ...]
    groups: tuple[GroupMetrics, ...]
    notes: tuple[str, ...]


def audit(
    cohort: Cohort,
    *,
    kind: str,
    classes: Sequence[str],
    encoders: Mapping[str, Path] | None = None,
    cases: Mapping[str, Sequence[CaseRow]] | None = None,
    window: Sequence[int] | None = None,
    groups: Groups | None = None,
    seed: int = 0,
) -> Audit:
    """Search for leakage and shortcuts, with at most `MAX_TRAINING_IMAGES` training images of whole subjects.

    Args:
        cohort: images of a run or study, preprocessed and split; the evaluation split is its `val`.
        kind: kind of the models.
        classes: classes of the models.
        encoders: pretraining runs or packages for the probes, by name.
        cases: predictions of models on the evaluation split (`medim.evaluation.cases.read_cases`), by name.
        window: shape to which training crops or pads images (`views.shape`); None if the network uses whole images.
        groups: groups from a table of the user (`medim.study.audit.groups.read_groups`), added to those of the headers.
        seed: random seed of folds, bootstrap and selection of training images.
    """
    all_train, val = cohort.records("train"), cohort.records("val")
    train = (
        select_label_budget(all_train, labelled=MAX_TRAINING_IMAGES, seed=seed)
        if len(all_train) > MAX_TRAINING_IMAGES
        else all_train
    )
    all_groups = number_values(collect_header_groups(cohort.index.records) | (groups or {}))
    notes = [] if train == all_train else [f"trained on {len(train)} of {len(all_train)} training images (seed {seed})"]
    shortcuts: tuple[Shortcut, ...] = ()
    if find_task_of_kind(kind).has_class_labels:
        shortcuts = _measure_shortcuts(cohort, train, val, window, seed, notes)
    else:
        notes.append("shortcuts: computed only for classification with one class per image")
    model_cases = dict(cases or {})
    return Audit(
        images={part: _count_images_and_subjects(cohort.records(part)) for part in ("train", "val", "test")},
        duplicates=find_duplicates(cohort.splits, cohort.fingerprints, cohort.quality_metrics()),
        shortcuts=shortcuts,
        models={name: summarise_cases(rows, kind, classes, seed=seed)["metrics"] for name, rows in model_cases.items()},
        probes=tuple(_probe_groups(cohort, train, val, all_groups, encoders or {}, window, seed, notes)),
        groups=tuple(
            g
            for name, rows in model_cases.items()
            for g in compute_group_metrics(name, rows, kind, classes, all_groups)
        ),
        notes=tuple(notes),
    )


def write_audit(folder: Path, result: Audit) -> None:
    """Write `audit.json`."""
    write_json(folder / AUDIT, {"schema_version": SCHEMA_VERSION, **asdict(result)})


def _measure_shortcuts(
    cohort: Cohort,
    train: Sequence[ImageRecord],
    val: Sequence[ImageRecord],
    window: Sequence[int] | None,
    seed: int,
    notes: list[str],
) -> tuple[Shortcut, ...]:
    records = [record for record in (*train, *val) if record.label is not None]
    train_count = sum(record.label is not None for record in train)
    split = build_train_test_split({r.image: str(r.label) for r in records}, cohort.index.labels, records, train_count)
    shortage = describe_class_shortage(split, cohort.index.labels)
    if shortage:
        notes.append(f"shortcuts: not computed, {shortage}")
        return ()
    entries = [cohort.store.get_entry(cohort.keys[record.image]) for record in records]
    shortcuts = [
        measure_shortcut("raw size", [raw_size(record) for record in records], split, seed=seed),
        measure_shortcut("input size", [input_size(entry) for entry in entries], split, seed=seed),
        measure_shortcut("padding", [measure_padding(entry, window) for entry in entries], split, seed=seed),
    ]
    figures = [entry.metrics for entry in entries]
    if None in figures:
        notes.append("raw intensity: not computed, because some images of the store have no quality metrics")
    else:
        rows = [raw_intensity(figure) for figure in figures if figure is not None]
        shortcuts.append(measure_shortcut("raw intensity", rows, split, seed=seed))
    intensities = [input_intensity(volume) for volume in _load_volumes(cohort, records)]
    return (*shortcuts, measure_shortcut("input intensity", intensities, split, seed=seed))


def _probe_groups(
    cohort: Cohort,
    train: Sequence[ImageRecord],
    val: Sequence[ImageRecord],
    groups: Groups,
    encoders: Mapping[str, Path],
    window: Sequence[int] | None,
    seed: int,
    notes: list[str],
) -> Iterator[GroupProbe]:
    eligible = {}
    for column, values in groups.items():
        usable, too_small = usable_groups(values, train, val)
        if len(usable) < 2:
            notes.append(
                f"{column}: not probed, because only {len(usable)} of {len(usable) + len(too_small)} values have "
                f"{MIN_SUBJECTS} subjects in both splits"
            )
        else:
            eligible[column] = values, usable, too_small
    if not eligible:
        return
    records = [*train, *val]
    for name, features in _iter_features(cohort, train, records, encoders, window):
        for column, (values, usable, too_small) in eligible.items():
            mask = np.array([values.get(record.image) in usable for record in records])
            group_records = [record for record, in_group in zip(records, mask, strict=True) if in_group]
            split = build_train_test_split(values, usable, group_records, int(mask[: len(train)].sum()))
            yield GroupProbe(
                column=column,
                features=name,
                values=usable,
                excluded=too_small,
                prediction=predict_label(features[mask], split, seed=seed),
            )


def _iter_features(
    cohort: Cohort,
    train: Sequence[ImageRecord],
    records: Sequence[ImageRecord],
    encoders: Mapping[str, Path],
    window: Sequence[int] | None,
) -> Iterator[tuple[str, Array]]:
    """Yield name and features (N, d) of the images for each encoder, and for the pixels."""
    for name, run in encoders.items():
        network: Any = load_encoder(run).to("cuda" if torch.cuda.is_available() else "cpu")
        batches = batch_images(volume.array for volume in _load_volumes(cohort, records))
        features = extract_features(network, batches, maps=range(len(network.channels)))
        yield name, check_finite_features(features, f"encoder {name}")
    shape = tuple(window or cohort.store.get_entry(cohort.keys[records[0].image]).shape)
    yield PIXELS, principal_components(_load_volumes(cohort, train), _load_volumes(cohort, records), shape=shape)


def _load_volumes(cohort: Cohort, records: Sequence[ImageRecord]) -> Iterator[Volume]:
    return (cohort.store.load_volume(cohort.keys[record.image]) for record in records)


def _count_images_and_subjects(records: Sequence[ImageRecord]) -> dict[str, int]:
    return {"images": len(records), "subjects": len({record.subject for record in records})}
