"""`quality.csv` of a store: quality metrics, flags and near-duplicates of every image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from medim.data.index.records import ImageRecord
from medim.data.preprocessing.quality import FLAGS, QualityMetrics, list_flags
from medim.files import write_csv
from medim.migrations import read_migrated_csv
from medim.types import Array, UserError

QUALITY_FILE = "quality.csv"
MAX_DUPLICATE_BITS = int(FLAGS["near-duplicate"].threshold) - 1  # largest hash distance of near-duplicates, in bits
_ROW_BLOCK, _COLUMN_BLOCK = 32, 4096  # hashes compared at once; fits into the cache of a processor


@dataclass(frozen=True, kw_only=True)
class ImageQuality:
    """Quality of one image.

    Attributes:
        image: key of the image in the index.
        metrics: metrics of the image as read.
        nearest_other_subject: most similar image of another subject, or None; the hashes differ in at most
            `MAX_DUPLICATE_BITS`.
        hamming_other_subject: Hamming distance of the hashes, in bits.
        nearest_same_subject: the same for images of the same subject; expected, for example, for the two sides of one
            head.
        hamming_same_subject: Hamming distance of the hashes, in bits.
        flags: codes of `medim.data.preprocessing.quality.FLAGS`.
    """

    image: str
    metrics: QualityMetrics
    nearest_other_subject: str | None
    hamming_other_subject: int | None
    nearest_same_subject: str | None
    hamming_same_subject: int | None
    flags: tuple[str, ...]


_METRIC_NAMES = tuple(field.name for field in fields(QualityMetrics))
NEIGHBOUR_COLUMNS = ("nearest_other_subject", "hamming_other_subject", "nearest_same_subject", "hamming_same_subject")
QUALITY_COLUMNS = ("image", *_METRIC_NAMES, *NEIGHBOUR_COLUMNS, "flags")


def find_near_duplicates(hashes: Array, max_distance: int) -> Iterator[tuple[Array, Array, Array]]:
    """Find pairs of images with a small hash distance; each pair is returned once.

    All pairs are compared, in blocks: 100,000 images take seconds and little memory.

    Args:
        hashes: (N,) uint64.
        max_distance: largest distance in bits.

    Yields:
        Per block: indices of the first images, of the second images (always larger), and the distances: (k,) each.
    """
    for row_start in range(0, len(hashes), _ROW_BLOCK):
        for column_start in range(row_start, len(hashes), _COLUMN_BLOCK):
            distances = np.bitwise_count(
                hashes[row_start : row_start + _ROW_BLOCK, None]
                ^ hashes[None, column_start : column_start + _COLUMN_BLOCK]
            )
            rows, columns = np.nonzero(distances <= max_distance)
            is_later = columns + column_start > rows + row_start
            rows, columns = rows[is_later], columns[is_later]
            if rows.size:
                yield rows + row_start, columns + column_start, distances[rows, columns]


def flag_images(
    records: Sequence[ImageRecord], metrics_by_image: Mapping[str, QualityMetrics]
) -> tuple[ImageQuality, ...]:
    """Compare images with each other, and list their flags.

    Args:
        records: records of the index.
        metrics_by_image: image key to metrics; records without metrics are skipped.

    Returns:
        One row per image, in the order of `records`.
    """
    records = [record for record in records if record.image in metrics_by_image]
    hash_records = [record for record in records if metrics_by_image[record.image].hash is not None]
    other_codes, own_codes = _find_nearest(
        np.array([int(str(metrics_by_image[record.image].hash), 16) for record in hash_records], np.uint64),
        np.unique([record.subject for record in hash_records], return_inverse=True)[1],
    )
    keys = [record.image for record in hash_records]
    matches = {
        key: (_decode_nearest(other_codes[position], keys), _decode_nearest(own_codes[position], keys))
        for position, key in enumerate(keys)
    }
    rows = []
    for record in records:
        metrics = metrics_by_image[record.image]
        (image, distance), (image_own, distance_own) = matches.get(record.image, ((None, None), (None, None)))
        flag_codes = list_flags({**asdict(metrics), "hamming_other_subject": distance})
        rows.append(
            ImageQuality(
                image=record.image,
                metrics=metrics,
                nearest_other_subject=image,
                hamming_other_subject=distance,
                nearest_same_subject=image_own,
                hamming_same_subject=distance_own,
                flags=flag_codes,
            )
        )
    return tuple(rows)


def add_record_flags(records: Sequence[ImageRecord], rows: Sequence[ImageQuality]) -> tuple[ImageRecord, ...]:
    """Add the flags to the `quality` of records, after the codes of the reader; replaces flags of an earlier run."""
    flags_by_image = {row.image: row.flags for row in rows}

    def merge_codes(record: ImageRecord) -> str | None:
        reader_codes = [code for code in (record.quality or "").split() if code not in FLAGS]
        return " ".join([*reader_codes, *flags_by_image.get(record.image, ())]) or None

    return tuple(replace(record, quality=merge_codes(record)) for record in records)


def count_flags(rows: Sequence[ImageQuality]) -> dict[str, int]:
    """Count the images with each flag, in the order of `FLAGS`; flags without images are omitted."""
    code_counts = Counter(code for row in rows for code in row.flags)
    return {code: code_counts[code] for code in FLAGS if code_counts[code]}


def write_quality(folder: Path, rows: Sequence[ImageQuality]) -> None:
    """Write `quality.csv` atomically."""
    cells = (
        (
            row.image,
            *asdict(row.metrics).values(),
            *(getattr(row, name) for name in NEIGHBOUR_COLUMNS),
            " ".join(row.flags),
        )
        for row in rows
    )
    write_csv(folder / QUALITY_FILE, QUALITY_COLUMNS, cells)


def read_quality(folder: Path) -> tuple[ImageQuality, ...]:
    """Read `quality.csv`; an empty tuple if there is none.

    Raises:
        UserError: the file was not written by `write_quality`.
    """
    path = folder / QUALITY_FILE
    if not path.is_file():
        return ()
    rows = read_migrated_csv(path, "quality", remedy="Run `medim preprocess` again.")
    try:
        return tuple(_parse_quality_row(row) for row in rows)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: expected the columns {', '.join(QUALITY_COLUMNS)}, found an invalid row ({error}). "
            "Run `medim preprocess` again."
        ) from error


def _parse_quality_row(row: Mapping[str, str]) -> ImageQuality:
    def parse_number(name: str) -> Any:
        return float(row[name]) if row[name] else None

    def parse_bits(name: str) -> int | None:
        return int(row[name]) if row[name] else None

    exact_fields: dict[str, Any] = {"n_unique_values": int(row["n_unique_values"]), "hash": row["hash"] or None}
    metrics = QualityMetrics(
        **{name: parse_number(name) for name in _METRIC_NAMES if name not in exact_fields}, **exact_fields
    )
    return ImageQuality(
        image=row["image"],
        metrics=metrics,
        nearest_other_subject=row["nearest_other_subject"] or None,
        hamming_other_subject=parse_bits("hamming_other_subject"),
        nearest_same_subject=row["nearest_same_subject"] or None,
        hamming_same_subject=parse_bits("hamming_same_subject"),
        flags=tuple(row["flags"].split()),
    )


def _find_nearest(hashes: Array, subjects: Array) -> tuple[Array, Array]:
    """Find the nearest image of another and of the same subject: (N,) each, distance << 32 | index; -1 if none."""
    no_match = np.iinfo(np.int64).max
    other_nearest, own_nearest = np.full(len(hashes), no_match), np.full(len(hashes), no_match)
    for first, second, distances in find_near_duplicates(hashes, MAX_DUPLICATE_BITS):
        same_subject = subjects[first] == subjects[second]
        for source, target in ((first, second), (second, first)):
            candidates = distances.astype(np.int64) << 32 | target
            np.minimum.at(own_nearest, source[same_subject], candidates[same_subject])
            np.minimum.at(other_nearest, source[~same_subject], candidates[~same_subject])
    return np.where(other_nearest == no_match, -1, other_nearest), np.where(own_nearest == no_match, -1, own_nearest)


def _decode_nearest(code: int, keys: Sequence[str]) -> tuple[str | None, int | None]:
    return (None, None) if code < 0 else (keys[int(code) & 0xFFFFFFFF], int(code) >> 32)
