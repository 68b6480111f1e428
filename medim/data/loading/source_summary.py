"""Describe a source at the start of a command: files, images, subjects by split, classes, and files left out."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medim.data.index.index import Index
from medim.data.index.records import ImageRecord
from medim.data.labels import count_labels
from medim.data.loading.splits import assign_splits
from medim.privacy import format_result_path
from medim.types import UserError

log = logging.getLogger(__name__)
_MIXED_FACTOR = 3  # of fields of view or voxel sizes, from which images are of several kinds
_MAX_LISTED_CLASSES = 12  # listed; the others are counted
_SPLITS = ("train", "val", "test")
_NOTABLE_QUALITY = {  # codes of images that may not be what they seem
    "coloured", "damaged-neighbour", "drawing-like", "fewer-slices-than-numbered", "frames-left-out",
    "odd-slices-left-out", "several-labels",
}  # fmt: skip


def describe_source(
    index: Index, *, split_seed: int | None = None, rejections_file: Path | None = None
) -> dict[str, str]:
    """Describe the images of an index, what they are labelled with, and why other files were left out.

    Args:
        index: the images.
        split_seed: seed of the split by subject; None describes only the splits that the source defines.
        rejections_file: where the command writes the reason of each file that was left out.

    Returns:
        Lines by their name.

    Examples:
        >>> describe_source(Index(root=Path("scans"), modality="mri", records=()))
        {'data': '0 images of 0 subjects'}
    """
    records = index.records
    rows = {"data": _describe_counts(index)}
    splits = _find_splits(index, split_seed)
    if splits:
        rows["split"] = ", ".join(_describe_split(part, records, splits) for part in _SPLITS if part in splits.values())
    if class_counts := count_labels(record.label for record in records):
        n_unlabelled = sum(record.label is None for record in records)
        rows["classes"] = _list_counts(class_counts, _MAX_LISTED_CLASSES) + (
            f"; {n_unlabelled} without label" if n_unlabelled else ""
        )
    sequences = Counter(record.sequence for record in records if record.sequence)
    if len(sequences) > 1:
        rows["sequences"] = _list_counts(sequences, _MAX_LISTED_CLASSES)
    if n_masks := sum(record.mask is not None for record in records):
        rows["masks"] = f"{n_masks} of {_count_nouns(len(records), 'image')}; classes: {', '.join(index.classes)}"
    if index.rejected:
        reasons: Counter[str] = Counter()
        for rejection in index.rejected:
            reasons[rejection.reason] += rejection.n_files
        place = f" -> {format_result_path(rejections_file)}" if rejections_file else ""
        rows["left out"] = _list_counts(reasons) + place
    quality = Counter(code for record in records for code in (record.quality or "").split() if code in _NOTABLE_QUALITY)
    if quality:
        rows["to check"] = _list_counts(quality)
    return rows


def warn_mixed_sizes(index: Index) -> None:
    """Log a warning if fields of view or voxel sizes of the images differ by a factor, as of heads and crops."""
    records = [record for record in index.records if "no-spacing" not in (record.quality or "").split()]
    fields_of_view = [max(s * n for s, n in zip(r.spacing, r.shape, strict=True)) for r in records]
    _warn_mixed_lengths("fields of view", "fov_x", fields_of_view)
    _warn_mixed_lengths("voxel sizes", "spacing_z", [max(record.spacing) for record in records])


def _warn_mixed_lengths(name: str, column: str, lengths: Sequence[float]) -> None:
    """Log a warning if lengths in mm differ by more than a factor; `column` is an example for `--where`."""
    low, high = min(lengths, default=1.0), max(lengths, default=1.0)
    if high > _MIXED_FACTOR * low:
        log.warning(
            "The %s of the images differ by a factor of %.1f (%.3g to %.3g mm): are these images of one kind? If not, "
            'choose some with --where, such as --where "%s<%.3g"',
            *(name, high / low, low, high, column, (low + high) / 2),
        )


def _describe_counts(index: Index) -> str:
    n_subjects = len({record.subject for record in index.records})
    text = f"{_count_nouns(len(index.records), 'image')} of {_count_nouns(n_subjects, 'subject')}"
    n_rejected = sum(rejection.n_files for rejection in index.rejected)
    return (
        (f"{_count_nouns(index.n_files, 'file')}: " if index.n_files else "")
        + text
        + (f", {n_rejected} left out" if n_rejected else "")
    )


def _find_splits(index: Index, split_seed: int | None) -> Mapping[str, str]:
    """Assign the images to splits; pixels are not compared, so subjects that share an image may change sides later."""
    if split_seed is None:
        return {record.image: record.split for record in index.records if record.split}
    try:
        return assign_splits(index, seed=split_seed)
    except UserError:  # reported by the command itself
        return {}


def _describe_split(part: str, records: Iterable[ImageRecord], splits: Mapping[str, str]) -> str:
    images_by_subject: dict[str, int] = defaultdict(int)
    for record in records:
        if splits.get(record.image) == part:
            images_by_subject[record.subject] += 1
    subjects = _count_nouns(len(images_by_subject), "subject")
    return f"{part} {subjects} ({_count_nouns(sum(images_by_subject.values()), 'image')})"


def _list_counts(counts: Mapping[str, int], limit: int | None = None) -> str:
    """List names with their counts, the most frequent first."""
    pairs = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = f" and {len(pairs) - limit} more" if limit and len(pairs) > limit else ""
    return ", ".join(f"{name} {count}" for name, count in pairs[:limit]) + rest


def _count_nouns(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
