"""Audit a source of images without a model: look-alikes, and image properties that predict the label."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medim.data.index.index import ImageRecord, Index, Rejection
from medim.data.labels import finding_names
from medim.data.loading.splits import assign_splits
from medim.data.loading.store import build_rejection
from medim.data.lookalikes import LookAlikes, build_map, choose_map_spacing, find_lookalikes
from medim.data.parallel import map_in_processes
from medim.data.preprocessing.quality import measure_quality
from medim.files import write_csv, write_json
from medim.study.audit.shortcuts import (
    Shortcut,
    build_train_test_split,
    describe_class_shortage,
    measure_shortcut,
    raw_intensity,
    raw_size,
)
from medim.types import Array, Split, UserError, Volume

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
AUDIT_FILE = "audit.json"
PAIRS_FILE = "lookalikes.csv"
PAIR_COLUMNS = ("image", "other_image", "correlation", "deviation", "same_subject", "split", "other_split")
CORNER_FRACTION = 0.125  # side of a corner, as a fraction of the image


@dataclass(frozen=True, kw_only=True)
class LookAlikePair:
    """Two images that show the same body.

    Attributes:
        image: key of the first image.
        other_image: key of the second image.
        correlation: see `medim.data.lookalikes.LookAlike`.
        deviation: see `medim.data.lookalikes.LookAlike`; None if unknown.
        same_subject: whether both belong to one subject, as expected of a repeated scan.
        split: split of the first image.
        other_split: split of the second image.
    """

    image: str
    other_image: str
    correlation: float
    deviation: float | None
    same_subject: bool
    split: Split
    other_split: Split

    @property
    def is_leak(self) -> bool:
        """Whether the pair is in two splits."""
        return self.split != self.other_split


@dataclass(frozen=True, kw_only=True)
class SourceAudit:
    """Result of an audit of a source.

    Attributes:
        images: number of images that could be read.
        subjects: number of their subjects.
        splits: number of images by split.
        pairs: look-alikes, the most similar first.
        search: properties of the search for look-alikes, see `medim.data.lookalikes.LookAlikes`.
        shortcuts: image properties that predict the label.
        notes: checks that were not possible, with the reason.
        rejections: images that could not be read.
    """

    images: int
    subjects: int
    splits: dict[str, int]
    pairs: tuple[LookAlikePair, ...]
    search: LookAlikes
    shortcuts: tuple[Shortcut, ...]
    notes: tuple[str, ...]
    rejections: tuple[Rejection, ...] = field(repr=False)

    @property
    def leaks(self) -> tuple[LookAlikePair, ...]:
        """Look-alikes in two splits."""
        return tuple(pair for pair in self.pairs if pair.is_leak)

    @property
    def strangers(self) -> tuple[LookAlikePair, ...]:
        """Look-alikes of two subjects."""
        return tuple(pair for pair in self.pairs if not pair.same_subject)


@dataclass(frozen=True)
class _Measurement:
    """Properties of one image: its map, and numbers by property."""

    map: Array
    rows: dict[str, dict[str, float]]


def audit_source(
    index: Index,
    *,
    false_pairs: float,
    split_seed: int = 0,
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> SourceAudit:
    """Search a source for look-alikes, and for image properties that predict the class.

    Args:
        index: the images.
        false_pairs: expected number of pairs of different bodies that may be reported as look-alikes.
        split_seed: seed of the split by subject, for images without a split in the source.
        seed: random seed of folds, bootstrap and sampling.
        jobs: number of processes that read images.
        progress: called with the number of images read, and of all.

    Raises:
        UserError: no image can be read, or the splits of the source separate a subject.
    """
    splits = assign_splits(index, seed=split_seed)
    measurements, rejections = _measure_images(index, jobs, progress)
    records = [record for record in index.records if record.image in measurements]
    if not records:
        detail = f"; first reason: {rejections[0].detail}" if rejections else ""
        raise UserError(f"none of {len(index.records)} images could be read{detail}")
    search = find_lookalikes(
        [measurements[record.image].map for record in records],
        [record.subject for record in records],
        false_pairs=false_pairs,
        seed=seed,
    )
    notes: list[str] = []
    if search.false_pairs is None:
        notes.append(
            f"look-alikes: {len(records)} images are too few to estimate the number of false pairs; reported from a "
            f"correlation of {search.threshold:.2f}"
        )
    rows = {record.image: measurements[record.image].rows for record in records}
    return SourceAudit(
        images=len(records),
        subjects=len({record.subject for record in records}),
        splits={part: count for part in ("train", "val", "test") if (count := _count_images(records, splits, part))},
        pairs=tuple(_name_pairs(search, records, splits)),
        search=search,
        shortcuts=_measure_shortcuts(records, rows, splits, seed, notes),
        notes=tuple(notes),
        rejections=rejections,
    )


def write_source_audit(folder: Path, result: SourceAudit) -> None:
    """Write `lookalikes.csv` and `audit.json`."""
    rows = ([getattr(pair, name) for name in PAIR_COLUMNS] for pair in result.pairs)
    write_csv(folder / PAIRS_FILE, PAIR_COLUMNS, rows)
    content = asdict(result)
    content["rejected"] = len(content.pop("rejections"))
    del content["search"]["pairs"]
    write_json(folder / AUDIT_FILE, {"schema_version": SCHEMA_VERSION, "command": "audit", **content})


def measure_corners(volume: Volume) -> dict[str, float]:
    """Measure mean and standard deviation of each corner, from the 1st (0) to the 99th percentile (1) of the image.

    Corners have burnt-in text, blanked text, or collimation; a class of another origin has others.
    """
    image = volume.array[0]
    low, high = np.percentile(image, [1, 99])
    scaled = np.clip((image - low) / ((high - low) or 1.0), 0, 1)
    sizes = [max(1, round(CORNER_FRACTION * size)) for size in image.shape]
    features = {}
    for corner in np.ndindex(*[2] * image.ndim):
        window = tuple(slice(-size, None) if end else slice(size) for end, size in zip(corner, sizes, strict=True))
        name = "".join(map(str, corner))
        features[f"mean {name}"] = float(scaled[window].mean())
        features[f"std {name}"] = float(scaled[window].std())
    return features


def measure_file(path: Path, volume: Volume) -> dict[str, float]:
    """Measure the size of the file, or of the first file of a series, and its bytes per voxel (compression)."""
    size = path.stat().st_size
    return {"log2 bytes": float(np.log2(max(size, 1))), "bytes per voxel": size / volume.array.size}


def _measure_images(
    index: Index, jobs: int, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, _Measurement], tuple[Rejection, ...]]:
    spacing = choose_map_spacing([np.multiply(r.shape, r.spacing).tolist() for r in index.records])
    work = partial(_measure_batch, replace(index, records=(), rejected=()), spacing=spacing)
    outcomes = (
        map_in_processes(work, index.records, jobs)
        if jobs > 1
        else ((record, work([record])[0]) for record in index.records)
    )
    measurements, rejections = {}, []
    for count, (record, outcome) in enumerate(outcomes, start=1):
        if isinstance(outcome, _Measurement):
            measurements[record.image] = outcome
        else:
            crash = Rejection(record.path, "worker-died", "The process that read the file was killed or crashed.")
            rejections.append(outcome or crash)
        if progress is not None:
            progress(count, len(index.records))
    return measurements, tuple(sorted(rejections, key=lambda rejection: rejection.path))


def _measure_batch(index: Index, records: Sequence[ImageRecord], *, spacing: float) -> list[_Measurement | Rejection]:
    return [_measure_image(index, record, spacing) for record in records]


def _measure_image(index: Index, record: ImageRecord, spacing: float) -> _Measurement | Rejection:
    try:
        volume = index.open(record)
        rows = {
            "raw size": raw_size(record),
            "raw intensity": raw_intensity(measure_quality(volume)),
            "corners": measure_corners(volume),
            "file": measure_file(index.locate(record), volume),
        }
        return _Measurement(build_map(volume, spacing), rows)
    except Exception as error:  # decoders raise many exception types, and one file must not stop the others
        return build_rejection(record, error)


def _count_images(records: Sequence[ImageRecord], splits: Mapping[str, Split], part: str) -> int:
    return sum(splits[record.image] == part for record in records)


def _name_pairs(search: LookAlikes, records: Sequence[ImageRecord], splits: Mapping[str, Split]) -> Any:
    for pair in search.pairs:
        first, second = records[pair.first], records[pair.second]
        yield LookAlikePair(
            image=first.image,
            other_image=second.image,
            correlation=pair.correlation,
            deviation=None if np.isnan(pair.deviation) else pair.deviation,
            same_subject=first.subject == second.subject,
            split=splits[first.image],
            other_split=splits[second.image],
        )


def _measure_shortcuts(
    records: Sequence[ImageRecord],
    rows: Mapping[str, Mapping[str, Mapping[str, float]]],
    splits: Mapping[str, Split],
    seed: int,
    notes: list[str],
) -> tuple[Shortcut, ...]:
    """Predict the class from each property: learnt on the training subjects, measured on the validation subjects."""
    if finding_names(record.label for record in records):
        notes.append("shortcuts: computed only for one class per image, not for findings")
        return ()
    parts = [[r for r in records if splits[r.image] == part and r.label is not None] for part in ("train", "val")]
    labelled = parts[0] + parts[1]
    names = sorted({str(record.label) for record in labelled})
    split = build_train_test_split({r.image: str(r.label) for r in labelled}, names, labelled, len(parts[0]))
    shortage = describe_class_shortage(split, names) if labelled else "no image has a class label"
    if shortage:
        notes.append(f"shortcuts: not computed, {shortage}")
        return ()
    properties: Any = list(rows[labelled[0].image])
    return tuple(
        measure_shortcut(name, [rows[r.image][name] for r in labelled], split, seed=seed) for name in properties
    )
