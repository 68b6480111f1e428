"""Report section of an index, or of a store with its index: the cohort."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from medim.data.index.index import ImageRecord, Index
from medim.data.index.rejection_codes import REJECTION_REASONS
from medim.data.loading.quality_table import MAX_DUPLICATE_BITS, ImageQuality, read_quality
from medim.data.preprocessing.quality import FLAGS, QualityMetrics, list_flags
from medim.reports import figures
from medim.reports.contact_sheet import build_contact_sheet
from medim.reports.page import MODALITY_TEXTS, Banner, ReportSection, ReportTable, count_table, format_value, pluralise
from medim.reports.svg import Figure

AXIS_NAMES = {2: ("down", "across"), 3: ("left to right", "back to front", "foot to head")}
GRID_QUANTITIES: dict[str, tuple[str, Callable[[ImageRecord], Sequence[float]]]] = {
    "Size": ("voxels", lambda record: record.shape),
    "Spacing": ("mm", lambda record: record.spacing),
    "Field of view": ("mm", lambda record: tuple(np.multiply(record.shape, record.spacing))),
}
QUALITY_LABELS = {
    "minimum": "Minimum",
    "p1": "1st percentile",
    "median": "Median",
    "p99": "99th percentile",
    "maximum": "Maximum",
    "n_unique_values": "Distinct values (up to 256)",
    "noise": "Noise, standard deviation",
    "snr": "Signal-to-noise ratio",
    "background_fraction": "Background, % of voxels",
    "saturated": "Saturated (at the maximum), % of voxels",
}
PERCENT_METRICS = ("background_fraction", "saturated")  # shown in percent
HISTOGRAM_METRICS = ("snr", "background_fraction")
MAX_PAIRS = 10
PATIENT_NOTE = (
    "This page contains patient images: do not send it outside your site. Grey values range from the 1st to the 99th "
    "percentile of each image, proportions are true; captions are subject pseudonyms."
)


def build_cohort_section(folder: Path, anchor: str) -> ReportSection:
    """Build the section of an index: counts, rejected files with reasons, image properties, and 24 sample images."""
    index = Index.read(folder)
    records = index.records
    sheet, sheet_quality = build_contact_sheet(index, PATIENT_NOTE)
    rows = read_quality(folder)
    quality_by_image = {row.image: row.metrics for row in rows} or sheet_quality
    subjects = len({record.subject for record in records})
    n_files = len(records) + len(index.rejected)
    n_rejected = len(index.rejected)
    text = f"{n_rejected:,} of {n_files:,} files or series were rejected." if n_rejected else "All files were used."
    sessions = len({(record.subject, record.session) for record in records if record.session is not None})
    return ReportSection(
        anchor=anchor,
        title=f"Images: {folder.name}",
        banner=Banner(
            "care" if n_rejected else "good",
            f"{pluralise(len(records), 'image')} of {pluralise(subjects, 'subject')}",
            text,
        ),
        data=f"{MODALITY_TEXTS[index.modality]}: {pluralise(len(records), 'image')} of "
        f"{pluralise(subjects, 'subject')}; index {index.hash[:12]}",
        facts=[
            ("Modality", index.modality),
            ("Sessions", format_value(sessions or None)),
            ("Classes of the masks", format_value(list(index.classes) if any(r.mask for r in records) else None)),
            ("Condition (--where)", index.where or "none"),
            ("Index", index.hash[:12]),
        ],
        tables=[
            _build_flow_table(index, rows),
            *_build_rejection_tables(index),
            *_build_range_tables(records),
            *_build_origin_tables(records),
        ],
        figures=[*_plot_grids(records), *_plot_quality(quality_by_image)],
        sheet=sheet,
        after=[
            *_build_intensity_tables(quality_by_image, all_images=bool(rows)),
            _build_flag_table(rows, sheet_quality),
            *_build_lookalike_tables(records, rows),
        ],
    )


def _build_flow_table(index: Index, rows: Sequence[ImageQuality]) -> ReportTable:
    records = index.records
    parts = [
        ("with a class label", [r for r in records if r.label is not None]),
        ("with a mask", [r for r in records if r.mask is not None]),
        *((f"split {part}", [r for r in records if r.split == part]) for part in ("train", "val", "test")),
    ]
    if rows:
        image_keys = {row.image for row in rows}
        parts.append(("could not be preprocessed", [r for r in records if r.image not in image_keys]))
    table_rows = [
        ("Found", format_value(len(records) + len(index.rejected)), ""),
        ("Rejected", format_value(len(index.rejected)), ""),
        ("Images", format_value(len(records)), format_value(len({r.subject for r in records}))),
        *(
            (name, format_value(len(part_records)), format_value(len({r.subject for r in part_records})))
            for name, part_records in parts
            if part_records
        ),
    ]
    return ReportTable("From files to images", ("", "Images", "Subjects"), table_rows)


def _build_rejection_tables(index: Index) -> list[ReportTable]:
    """Table of rejected files: each reason, its meaning, and an example."""
    reasons = Counter(rejection.reason for rejection in index.rejected)
    first_rejection = {rejection.reason: rejection for rejection in reversed(index.rejected)}
    rows = [
        (
            code,
            format_value(count),
            REJECTION_REASONS.get(code, ""),
            first_rejection[code].detail,
            first_rejection[code].path,
        )
        for code, count in reasons.most_common()
    ]
    head = ("Reason", "Files", "Meaning", "Example: detail", "Example: path")
    note = "Paths as in rejected.csv: relative to the source, without patient names."
    return [ReportTable("Rejected files, by reason", head, rows, note, wide=True)] if rows else []


def _build_origin_tables(records: Sequence[ImageRecord]) -> list[ReportTable]:
    """Count images by label, scanner, field strength and sequence; a property without any value gets no table."""
    tables = []
    for caption, name, values in (
        ("Class labels", "Label", [r.label for r in records]),
        ("Scanners", "Scanner", [r.scanner for r in records]),
        ("Field strengths", "Tesla", [None if r.field_strength is None else f"{r.field_strength:g}" for r in records]),
        ("Sequences", "Sequence", [r.sequence for r in records]),
    ):
        counts = Counter(format_value(value) for value in values)
        if set(values) - {None} and len(counts) <= 20:
            tables.append(count_table(caption, name, counts))
    return tables


def _values_by_axis(
    records: Sequence[ImageRecord], dims: int, get_values: Callable[[ImageRecord], Sequence[float]]
) -> dict[str, list[float]]:
    values_by_record = [get_values(record) for record in records if len(record.shape) == dims]
    return {name: [float(values[axis]) for values in values_by_record] for axis, name in enumerate(AXIS_NAMES[dims])}


def _build_range_tables(records: Sequence[ImageRecord]) -> list[ReportTable]:
    """Minimum, median and maximum of size, spacing and field of view along each axis; separate tables for 2D and 3D."""
    tables = []
    for dims in sorted({len(record.shape) for record in records}):
        rows = [
            (f"{quantity} {axis}, {unit}", *_format_range(values))
            for quantity, (unit, get_values) in GRID_QUANTITIES.items()
            for axis, values in _values_by_axis(records, dims, get_values).items()
        ]
        tables.append(ReportTable(f"Grids of the {dims}D images", ("", "Smallest", "Median", "Largest"), rows))
    return tables


def _plot_grids(records: Sequence[ImageRecord]) -> list[Figure]:
    """Plot histograms of the grid properties that differ between images."""
    histograms = []
    for dims in sorted({len(record.shape) for record in records}):
        for quantity, (unit, get_values) in GRID_QUANTITIES.items():
            values = _values_by_axis(records, dims, get_values)
            if any(len(set(numbers)) > 1 for numbers in values.values()):
                caption = f"{quantity} of the {dims}D images"
                histograms.append(figures.plot_histogram(values, f"{quantity}, {unit}", caption))
    return histograms


def _plot_quality(quality_by_image: Mapping[str, QualityMetrics]) -> list[Figure]:
    columns = {name: _quality_column(quality_by_image, name) for name in HISTOGRAM_METRICS}
    return [
        figures.plot_histogram({name: v}, QUALITY_LABELS[name], QUALITY_LABELS[name])
        for name, v in columns.items()
        if len(set(v)) > 1
    ]


def _build_intensity_tables(quality_by_image: Mapping[str, QualityMetrics], *, all_images: bool) -> list[ReportTable]:
    columns = {name: _quality_column(quality_by_image, name) for name in QUALITY_LABELS}
    rows = [(QUALITY_LABELS[name], *_format_range(values)) for name, values in columns.items() if values]
    images_text = pluralise(len(quality_by_image), "image")
    note = (
        f"Measured on {images_text} as read, before preprocessing."
        if all_images
        else f"Measured on the {images_text} of the contact sheet only. Run medim preprocess to measure every image."
    )
    return [ReportTable("Intensities", ("", "Smallest", "Median", "Largest"), rows, note)] if rows else []


def _build_flag_table(rows: Sequence[ImageQuality], sheet_quality: Mapping[str, QualityMetrics]) -> ReportTable:
    codes_by_image = [row.flags for row in rows] or [list_flags(vars(quality)) for quality in sheet_quality.values()]
    counts = Counter(code for codes in codes_by_image for code in codes)
    flag_codes = [code for code in FLAGS if rows or code != "near-duplicate"]
    cells = [(code, format_value(counts[code]), FLAGS[code].meaning) for code in flag_codes]
    note = "Check flagged images visually; they are not excluded automatically."
    return ReportTable(
        f"Flags of {pluralise(len(codes_by_image), 'image')}",
        ("Flag", "Images", "Raised if"),
        cells,
        note,
        wide=True,
    )


def _build_lookalike_tables(records: Sequence[ImageRecord], rows: Sequence[ImageQuality]) -> list[ReportTable]:
    """Tables of near-duplicates: pairs of two subjects may leak between splits, pairs of one subject are expected."""
    split_by_image = {record.image: record.split for record in records}
    subject_pairs = {
        (min(row.image, other), max(row.image, other)): row.hamming_other_subject or 0
        for row in rows
        if (other := row.nearest_other_subject)
    }
    same_subject_rows = [row for row in rows if row.nearest_same_subject is not None]
    if not subject_pairs and not same_subject_rows:
        return []
    counts = [
        ("another subject", format_value(sum(row.nearest_other_subject is not None for row in rows))),
        ("the same subject", format_value(len(same_subject_rows))),
    ]
    tables = [
        ReportTable(
            "Images with a near-duplicate of",
            ("", "Images"),
            counts,
            f"At most {MAX_DUPLICATE_BITS} of 64 bits differ.",
        )
    ]
    pairs = sorted((distance, one, two) for (one, two), distance in subject_pairs.items())
    cells = [
        (
            one,
            two,
            format_value(distance),
            " and ".join(format_value(split_by_image.get(image)) for image in (one, two)),
        )
        for distance, one, two in pairs[:MAX_PAIRS]
    ]
    if cells:
        head = ("Image", "Near-duplicate", "Differing bits", "Splits")
        note = f"The {len(cells)} nearest of {pluralise(len(pairs), 'pair')}; each image with its nearest one."
        tables.append(ReportTable("Near-duplicate images of two subjects", head, cells, note, wide=True))
    return tables


def _quality_column(quality_by_image: Mapping[str, QualityMetrics], name: str) -> list[float]:
    values = (getattr(quality, name) for quality in quality_by_image.values())
    return [float(value) * (100 if name in PERCENT_METRICS else 1) for value in values if value is not None]


def _format_range(values: Sequence[float]) -> tuple[str, str, str]:
    low, median, high = (f"{v:.4g}" for v in (min(values), float(np.median(values)), max(values)))
    return low, median, high
