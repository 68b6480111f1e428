"""`quality.csv` of a store: the figures of every image, its flags, and the images that look like it."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from medim.data.index.records import Record
from medim.data.preprocessing.quality import FLAGS, Figures, flags
from medim.files import write_csv
from medim.types import Array, UserError

NAME = "quality.csv"
NEAR = int(FLAGS["near-duplicate"].threshold) - 1  # bits that a near-duplicate may differ in
_ROWS, _COLUMNS = 32, 4096  # hashes compared at once, within a processor's cache


@dataclass(frozen=True)
class Quality:
    """What is known of one image's quality.

    Attributes:
        image: its key in the index.
        figures: of the image as read.
        nearest: the most similar image of another subject, where one differs in at most `NEAR` bits.
        distance: bits in which the two differ.
        nearest_own: the most similar image of the same subject, likewise; expected of the two sides of one head.
        distance_own: bits in which the two differ.
        flags: codes of `medim.data.preprocessing.quality.FLAGS`.
    """

    image: str
    figures: Figures
    nearest: str | None
    distance: int | None
    nearest_own: str | None
    distance_own: int | None
    flags: tuple[str, ...]


_FIGURES = tuple(field.name for field in fields(Figures))
COLUMNS = ("image", *_FIGURES, "nearest", "distance", "nearest_own", "distance_own", "flags")


def near_duplicates(hashes: Array, distance: int) -> Iterator[tuple[Array, Array, Array]]:
    """Pairs of images whose hashes differ in at most some bits, a block at a time; each pair comes once.

    Every pair is compared, in blocks: 100,000 images take seconds and no memory to speak of.

    Args:
        hashes: (N,) uint64.
        distance: in bits.

    Yields:
        Places of the first images, of the second ones (always larger), and the bits in which they differ: (k,) each.
    """
    for top in range(0, len(hashes), _ROWS):
        for left in range(top, len(hashes), _COLUMNS):
            apart = np.bitwise_count(hashes[top : top + _ROWS, None] ^ hashes[None, left : left + _COLUMNS])
            rows, columns = np.nonzero(apart <= distance)
            later = columns + left > rows + top
            rows, columns = rows[later], columns[later]
            if rows.size:
                yield rows + top, columns + left, apart[rows, columns]


def assess(records: Sequence[Record], figures: Mapping[str, Figures]) -> tuple[Quality, ...]:
    """Compare images with each other, and flag them.

    Args:
        records: of the index.
        figures: image key to figures; records without are left out.

    Returns:
        A row an image, in the order of `records`.
    """
    records = [record for record in records if record.image in figures]
    hashed = [record for record in records if figures[record.image].hash is not None]
    other, own = _nearest(
        np.array([int(str(figures[record.image].hash), 16) for record in hashed], np.uint64),
        np.unique([record.subject for record in hashed], return_inverse=True)[1],
    )
    keys = [record.image for record in hashed]
    near = {key: (_named(other[place], keys), _named(own[place], keys)) for place, key in enumerate(keys)}
    rows = []
    for record in records:
        found = figures[record.image]
        (image, distance), (image_own, distance_own) = near.get(record.image, ((None, None), (None, None)))
        raised = flags({**asdict(found), "distance": distance})
        rows.append(Quality(record.image, found, image, distance, image_own, distance_own, raised))
    return tuple(rows)


def flagged(records: Sequence[Record], rows: Sequence[Quality]) -> tuple[Record, ...]:
    """The records with their flags in `quality`, behind what the reader said; flags of an earlier run go."""
    raised = {row.image: row.flags for row in rows}

    def codes(record: Record) -> str | None:
        said = [code for code in (record.quality or "").split() if code not in FLAGS]
        return " ".join([*said, *raised.get(record.image, ())]) or None

    return tuple(replace(record, quality=codes(record)) for record in records)


def counts(rows: Sequence[Quality]) -> dict[str, int]:
    """How many images carry each flag, in the order of `FLAGS`; flags that none carries are left out."""
    found = Counter(code for row in rows for code in row.flags)
    return {code: found[code] for code in FLAGS if found[code]}


def write_quality(folder: Path, rows: Sequence[Quality]) -> None:
    """Write `quality.csv`, whole or not at all."""
    cells = (
        (
            row.image,
            *asdict(row.figures).values(),
            *(row.nearest, row.distance, row.nearest_own, row.distance_own),
            " ".join(row.flags),
        )
        for row in rows
    )
    write_csv(folder / NAME, COLUMNS, cells)


def read_quality(folder: Path) -> tuple[Quality, ...]:
    """Read `quality.csv`; nothing where it is not there.

    Raises:
        UserError: it is not what `write_quality` writes.
    """
    path = folder / NAME
    if not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return tuple(_row(row) for row in rows)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: expected the columns {', '.join(COLUMNS)}, got a line that fits not ({error}). "
            "Run `medim preprocess` again."
        ) from error


def _row(row: Mapping[str, str]) -> Quality:
    def number(name: str) -> Any:
        return float(row[name]) if row[name] else None

    def bits(name: str) -> int | None:
        return int(row[name]) if row[name] else None

    words: dict[str, Any] = {"levels": int(row["levels"]), "hash": row["hash"] or None}
    figures = Figures(**{name: number(name) for name in _FIGURES if name not in words}, **words)
    near = row["nearest"] or None, bits("distance"), row["nearest_own"] or None, bits("distance_own")
    return Quality(row["image"], figures, *near, tuple(row["flags"].split()))


def _nearest(hashes: Array, subjects: Array) -> tuple[Array, Array]:
    """The nearest image of another subject and of the same one: (N,) each, distance << 32 | place; -1 where none is."""
    none = np.iinfo(np.int64).max
    other, own = np.full(len(hashes), none), np.full(len(hashes), none)
    for first, second, apart in near_duplicates(hashes, NEAR):
        same = subjects[first] == subjects[second]
        for one, two in ((first, second), (second, first)):
            found = apart.astype(np.int64) << 32 | two
            np.minimum.at(own, one[same], found[same])
            np.minimum.at(other, one[~same], found[~same])
    return np.where(other == none, -1, other), np.where(own == none, -1, own)


def _named(found: int, keys: Sequence[str]) -> tuple[str | None, int | None]:
    return (None, None) if found < 0 else (keys[int(found) & 0xFFFFFFFF], int(found) >> 32)
