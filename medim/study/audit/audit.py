"""Is the result what it seems? What leaked across the split, and what should not matter and yet tells.

`audit` looks at the images of a study or a run after preprocessing, and at what models answered on the evaluation
split. Everything it finds goes to `audit.json` (`docs/reference/files.md`); how to read it stands in
`docs/concepts/shortcuts.md`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medim.data.index.index import Record
from medim.data.loading.cohort import Cohort
from medim.data.loading.splits import budget
from medim.evaluation.cases import Row, summarise
from medim.evaluation.probing.baselines import principal_components
from medim.files import write_json
from medim.inference.network import Kind
from medim.metrics.bootstrap import MIN_SUBJECTS, Metric
from medim.metrics.representation import extract, stacked
from medim.models.serialization import load_encoder
from medim.study.audit.duplicates import Duplicates, duplicates
from medim.study.audit.groups import GroupMetrics, Groups, groups_of_headers, numbered, per_group, told_apart
from medim.study.audit.shortcuts import (
    Shortcut,
    Sides,
    Told,
    intensity_as_read,
    intensity_as_seen,
    padding,
    shortcut,
    size_as_read,
    size_as_seen,
    told,
)
from medim.types import Array, Volume

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
AUDIT = "audit.json"
PIXELS = "pixels"
MOST = 1000  # training images that are learnt from; a few numbers of each need no more


@dataclass(frozen=True)
class GroupProbe:
    """How well frozen features tell groups apart that should not matter.

    Attributes:
        column: what the groups are by.
        features: an encoder's name, or `pixels` (principal components).
        values: the groups told apart.
        left_out: groups with fewer than five subjects on a side.
        told: of the groups.
    """

    column: str
    features: str
    values: tuple[str, ...]
    left_out: tuple[str, ...]
    told: Told


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        images: of each split that were looked at, and their subjects.
        duplicates: on both sides of the split.
        shortcuts: what should not matter and tells of the label; classification only.
        models: metrics of the models on the same evaluation split, to hold beside.
        probes: what features tell of groups.
        groups: metrics of the models, group by group.
        notes: what could not be looked at, and why.
    """

    images: dict[str, dict[str, int]]
    duplicates: Duplicates
    shortcuts: tuple[Shortcut, ...]
    models: dict[str, dict[str, Metric]]
    probes: tuple[GroupProbe, ...]
    groups: tuple[GroupMetrics, ...]
    notes: tuple[str, ...]


def audit(
    cohort: Cohort,
    *,
    kind: Kind,
    classes: Sequence[str],
    encoders: Mapping[str, Path] | None = None,
    cases: Mapping[str, Sequence[Row]] | None = None,
    window: Sequence[int] | None = None,
    groups: Groups | None = None,
    seed: int = 0,
) -> Audit:
    """Look for leaks and shortcuts; what is learnt is learnt from at most `MOST` images, of whole subjects.

    Args:
        cohort: the images of a run or study, preprocessed and split; the evaluation split is its `val`.
        kind: what the models do.
        classes: the models' classes.
        encoders: pretraining runs or packages whose features are probed, by name.
        cases: what models answered on the evaluation split (`medim.evaluation.cases.read_cases`), by name.
        window: shape that training cuts or pads images to (`views.shape`); None: each image is seen as it is.
        groups: of a table of the user (`medim.study.audit.groups.read_groups`), beside those that headers tell.
        seed: of folds, bootstrap, and the draw where there are more images.
    """
    whole, val = cohort.records("train"), cohort.records("val")
    train = budget(whole, labelled=MOST, seed=seed) if len(whole) > MOST else whole
    known = numbered(groups_of_headers(cohort.index.records) | (groups or {}))
    notes = [] if train == whole else [f"learnt from {len(train)} of {len(whole)} training images (seed {seed})"]
    shortcuts: tuple[Shortcut, ...] = ()
    if kind == "classifier":
        shortcuts = _shortcuts(cohort, train, val, window, seed, notes)
    else:
        notes.append("shortcuts: looked for only where an image has one class")
    answered = dict(cases or {})
    return Audit(
        images={part: _size(cohort.records(part)) for part in ("train", "val", "test")},
        duplicates=duplicates(cohort.splits, cohort.prints, cohort.figures()),
        shortcuts=shortcuts,
        models={name: summarise(rows, kind, classes, seed=seed)["metrics"] for name, rows in answered.items()},
        probes=tuple(_probes(cohort, train, val, known, encoders or {}, window, seed, notes)),
        groups=tuple(g for name, rows in answered.items() for g in per_group(name, rows, kind, classes, known)),
        notes=tuple(notes),
    )


def write_audit(folder: Path, found: Audit) -> None:
    """Write `audit.json`."""
    write_json(folder / AUDIT, {"schema_version": SCHEMA_VERSION, **asdict(found)})


def _shortcuts(
    cohort: Cohort,
    train: Sequence[Record],
    val: Sequence[Record],
    window: Sequence[int] | None,
    seed: int,
    notes: list[str],
) -> tuple[Shortcut, ...]:
    records = [record for record in (*train, *val) if record.label is not None]
    trained = sum(record.label is not None for record in train)
    sides = _sides({r.image: str(r.label) for r in records}, cohort.index.labels, records, trained)
    few = _too_few(sides, cohort.index.labels)
    if few:
        notes.append(f"shortcuts: not computed, {few}")
        return ()
    entries = [cohort.store.entry(cohort.keys[record.image]) for record in records]
    found = [
        shortcut("size as read", [size_as_read(record) for record in records], sides, seed=seed),
        shortcut("size as seen", [size_as_seen(entry) for entry in entries], sides, seed=seed),
        shortcut("padding", [padding(entry, window) for entry in entries], sides, seed=seed),
    ]
    figures = [entry.figures for entry in entries]
    if None in figures:
        notes.append("intensity as read: not computed, the store holds no figures of some images")
    else:
        rows = [intensity_as_read(figure) for figure in figures if figure is not None]
        found.append(shortcut("intensity as read", rows, sides, seed=seed))
    seen = [intensity_as_seen(volume) for volume in _volumes(cohort, records)]
    return (*found, shortcut("intensity as seen", seen, sides, seed=seed))


def _probes(
    cohort: Cohort,
    train: Sequence[Record],
    val: Sequence[Record],
    groups: Groups,
    encoders: Mapping[str, Path],
    window: Sequence[int] | None,
    seed: int,
    notes: list[str],
) -> Iterator[GroupProbe]:
    possible = {}
    for column, values in groups.items():
        kept, small = told_apart(values, train, val)
        if len(kept) < 2:
            notes.append(
                f"{column}: nothing to tell apart: {len(kept)} of {len(kept) + len(small)} values have "
                f"{MIN_SUBJECTS} subjects in both splits"
            )
        else:
            possible[column] = values, kept, small
    if not possible:
        return
    records = [*train, *val]
    for name, features in _features(cohort, train, records, encoders, window):
        for column, (values, kept, small) in possible.items():
            chosen = np.array([values.get(record.image) in kept for record in records])
            own = [record for record, take in zip(records, chosen, strict=True) if take]
            sides = _sides(values, kept, own, int(chosen[: len(train)].sum()))
            yield GroupProbe(column, name, kept, small, told(features[chosen], sides, seed=seed))


def _features(
    cohort: Cohort,
    train: Sequence[Record],
    records: Sequence[Record],
    encoders: Mapping[str, Path],
    window: Sequence[int] | None,
) -> Iterator[tuple[str, Array]]:
    """Name and features (N, d) of the images: of each encoder, and of the pixels."""
    for name, run in encoders.items():
        network: Any = load_encoder(run).to("cuda" if torch.cuda.is_available() else "cpu")
        batches = stacked(volume.array for volume in _volumes(cohort, records))
        yield name, extract(network, batches, maps=range(len(network.channels)))
    shape = tuple(window or cohort.store.entry(cohort.keys[records[0].image]).shape)
    yield PIXELS, principal_components(_volumes(cohort, train), _volumes(cohort, records), shape=shape)


def _volumes(cohort: Cohort, records: Sequence[Record]) -> Iterator[Volume]:
    return (cohort.store.volume(cohort.keys[record.image]) for record in records)


def _sides(values: Mapping[str, str], names: Sequence[str], records: Sequence[Record], trained: int) -> Sides:
    labels = np.array([list(names).index(values[record.image]) for record in records], dtype=np.intp)
    return Sides(labels, np.arange(len(records)) < trained, [record.subject for record in records])


def _too_few(sides: Sides, names: Sequence[str]) -> str:
    """Why nothing can be learnt or measured; empty where it can."""
    for part, chosen in (("training", sides.train), ("evaluation", ~sides.train)):
        pairs = {(label, s) for label, s, take in zip(sides.labels, sides.subjects, chosen, strict=True) if take}
        held = Counter(names[label] for label, _ in pairs)
        few = [f"{held[name]} with {name}" for name in names if held[name] < MIN_SUBJECTS]
        if few or len(names) < 2:
            return f"the {part} split has {', '.join(few) or 'one class'}; {MIN_SUBJECTS} subjects a class are needed"
    return ""


def _size(records: Sequence[Record]) -> dict[str, int]:
    return {"images": len(records), "subjects": len({record.subject for record in records})}
