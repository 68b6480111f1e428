from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medim.data.index.index import build_index
from medim.data.index.records import ImageRecord
from medim.data.loading.quality_table import (
    MAX_DUPLICATE_BITS,
    ImageQuality,
    add_record_flags,
    count_flags,
    find_near_duplicates,
    flag_images,
    read_quality,
    write_quality,
)
from medim.data.preprocessing.quality import QualityMetrics, measure_quality
from medim.types import UserError
from tests.data.loading.test_store import record

FIGURES = QualityMetrics(
    minimum=0.0,
    p1=0.1,
    median=1 / 3,
    p99=0.9,
    maximum=1.0,
    n_unique_values=256,
    noise=0.01,
    snr=None,
    background_fraction=0.2,
    saturated=1e-6,
    hash="00000000000000ff",
)


def people(*subjects: str) -> list[ImageRecord]:
    return [replace(record(f"i{n}", (8, 9)), subject=subject) for n, subject in enumerate(subjects)]


def hashed(*hashes: int | None) -> dict[str, QualityMetrics]:
    return {f"i{n}": replace(FIGURES, hash=None if h is None else f"{h:016x}") for n, h in enumerate(hashes)}


def test_every_pair_within_the_distance_is_found_once() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 9000).astype(np.uint64)
    hashes[8999] = hashes[3] ^ np.uint64(0b1011)
    hashes[40] = hashes[39]
    found = [np.stack(block) for block in find_near_duplicates(hashes, 3)]
    assert sorted(map(tuple, np.concatenate(found, axis=1).T.tolist())) == [(3, 8999, 3), (39, 40, 0)]
    assert list(find_near_duplicates(hashes[:0], 3)) == []


def test_all_pairs_agree_with_the_obvious_way() -> None:
    hashes = [int(h) for h in np.random.default_rng(1).integers(0, 1 << 12, 100)]
    slow = {(a, b) for a in range(100) for b in range(a + 1, 100) if (hashes[a] ^ hashes[b]).bit_count() <= 2}
    blocks = find_near_duplicates(np.array(hashes, np.uint64), 2)
    assert {(int(a), int(b)) for first, second, _ in blocks for a, b in zip(first, second, strict=True)} == slow


def test_alike_images_of_two_subjects_are_flagged_and_those_of_one_are_told() -> None:
    rows = flag_images(people("p", "p", "q", "r", "r"), hashed(0b0, 0b11, 0b1111, 0xFF << 40, None))
    assert [(row.nearest_other_subject, row.hamming_other_subject) for row in rows] == [
        ("i2", 4),
        ("i2", 2),
        ("i1", 2),
        (None, None),
        (None, None),
    ]
    assert [(row.nearest_same_subject, row.hamming_same_subject) for row in rows[:2]] == [("i1", 2), ("i0", 2)]
    assert [row.flags for row in rows] == [("near-duplicate",)] * 3 + [()] * 2
    assert count_flags(rows) == {"near-duplicate": 3}


def test_flags_stand_behind_what_the_reader_said_and_replace_earlier_ones() -> None:
    records = [
        replace(one, quality=said)
        for one, said in zip(people("p", "q", "r"), (None, "derived", "derived clipped"), strict=True)
    ]
    rows = flag_images(records, hashed(0b0, 0b11, 0xFF << 40))
    assert [r.quality for r in add_record_flags(records, rows)] == [
        "near-duplicate",
        "derived near-duplicate",
        "derived",
    ]


def test_images_without_a_hash_and_without_figures_are_no_ones_neighbour() -> None:
    rows = flag_images(people("p", "q", "r"), hashed(None, None))
    assert [row.image for row in rows] == ["i0", "i1"]
    assert not any(row.nearest_other_subject or row.nearest_same_subject for row in rows)
    assert flag_images([], {}) == ()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = (
        ImageQuality(
            image="a",
            metrics=FIGURES,
            nearest_other_subject="b",
            hamming_other_subject=0,
            nearest_same_subject=None,
            hamming_same_subject=None,
            flags=("clipped", "near-duplicate"),
        ),
        ImageQuality(
            image="b",
            metrics=replace(FIGURES, noise=None, hash=None),
            nearest_other_subject=None,
            hamming_other_subject=None,
            nearest_same_subject="c",
            hamming_same_subject=3,
            flags=(),
        ),
    )
    write_quality(tmp_path, rows)
    assert read_quality(tmp_path) == rows
    assert read_quality(tmp_path / "elsewhere") == ()


@pytest.mark.parametrize("change", [("256", "many"), ("n_unique_values", "shades"), ("0.0,0.1", "0.0")])
def test_a_damaged_table_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    write_quality(
        tmp_path,
        [
            ImageQuality(
                image="a",
                metrics=FIGURES,
                nearest_other_subject="b",
                hamming_other_subject=0,
                nearest_same_subject=None,
                hamming_same_subject=None,
                flags=("clipped",),
            )
        ],
    )
    path = tmp_path / "quality.csv"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError, match=r"quality\.csv.*(expected the columns image, minimum|expected \d+ cells)"):
        read_quality(tmp_path)


def test_copies_among_real_crops_are_found_and_no_two_crops_are_copies(shared_data: Path) -> None:
    index = build_index(shared_data / "mri-hippocampus", "mri")
    volumes = {r.image: index.open(r) for r in index.records}
    figures = {image: measure_quality(volume) for image, volume in volumes.items()}
    assert not [row for row in flag_images(index.records, figures) if row.flags]
    rng = np.random.default_rng(0)
    copied = index.records[::10]
    copies = [replace(r, image=f"copy of {r.image}", subject="another") for r in copied]
    for original, copy in zip(copied, copies, strict=True):
        array = volumes[original.image].array
        noisy = 0.3 * array + 5 + rng.normal(0, 0.3 * 0.02 * np.percentile(array, 99), array.shape)
        figures[copy.image] = measure_quality(volumes[original.image].with_array(noisy.astype(np.float32)))
    rows = {row.image: row for row in flag_images([*index.records, *copies], figures)}
    assert [rows[c.image].nearest_other_subject for c in copies] == [c.image.removeprefix("copy of ") for c in copies]
    assert sum("near-duplicate" in row.flags for row in rows.values()) == 2 * len(copies)


@pytest.mark.slow
def test_a_hundred_thousand_images_are_compared_in_a_minute() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 100_000).astype(np.uint64)
    began = time.perf_counter()
    assert sum(len(first) for first, _, _ in find_near_duplicates(hashes, MAX_DUPLICATE_BITS)) == 0
    assert time.perf_counter() - began < 60
