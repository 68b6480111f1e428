"""From an index, or a store with its index, to a section of the report: the cohort on a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from medim.data.index.index import Index, Record
from medim.data.index.rejection_codes import REASONS
from medim.data.loading.quality_table import NEAR, Quality, read_quality
from medim.data.preprocessing.quality import FLAGS, Figures, flags
from medim.reports import figures
from medim.reports.contact_sheet import contact_sheet
from medim.reports.page import Banner, Section, Table, counted, many, told
from medim.reports.svg import Figure

AXES = {2: ("down", "across"), 3: ("left to right", "back to front", "foot to head")}
GRID: dict[str, tuple[str, Callable[[Record], Sequence[float]]]] = {
    "Size": ("voxels", lambda record: record.shape),
    "Spacing": ("mm", lambda record: record.spacing),
    "Field of view": ("mm", lambda record: tuple(np.multiply(record.shape, record.spacing))),
}
FIGURES = {
    "minimum": "Minimum",
    "p1": "1st percentile",
    "median": "Median",
    "p99": "99th percentile",
    "maximum": "Maximum",
    "levels": "Different values, counted to 256",
    "noise": "Noise, standard deviation",
    "snr": "Signal over noise",
    "empty": "Background, % of voxels",
    "saturated": "At the maximum, % of voxels",
}
SHARES = ("empty", "saturated")  # told in percent
DRAWN = ("snr", "empty")
MOST_PAIRS = 10
STAYS = (
    "This page holds images of patients: it stays on site. Each is shown between its 1st and 99th percentile, in its "
    "true proportions; the caption is the pseudonym of the subject."
)


def cohort(folder: Path, anchor: str) -> Section:
    """An index: what was found, what was not used and why, what the images are like, and 24 of them."""
    index = Index.read(folder)
    records = index.records
    sheet, seen = contact_sheet(index, STAYS)
    rows = read_quality(folder)
    measured = {row.image: row.figures for row in rows} or seen
    subjects = len({record.subject for record in records})
    found = len(records) + len(index.rejected)
    left_out = len(index.rejected)
    text = f"{left_out:,} of {found:,} files or series were not used." if left_out else "Every file was used."
    sessions = len({(record.subject, record.session) for record in records if record.session is not None})
    return Section(
        anchor=anchor,
        title=f"Images: {folder.name}",
        banner=Banner(
            "care" if left_out else "good", f"{many(len(records), 'image')} of {many(subjects, 'subject')}", text
        ),
        facts=[
            ("Modality", index.modality),
            ("Sessions", told(sessions or None)),
            ("Classes of the masks", told(list(index.classes) if any(r.mask for r in records) else None)),
            ("Index", index.hash[:12]),
        ],
        tables=[_flow(index, rows), *_refused(index), *_ranges(records), *_origins(records)],
        figures=[*_grids(records), *_drawn(measured)],
        sheet=sheet,
        after=[*_intensities(measured, whole=bool(rows)), _flagged(rows, seen), *_alike(records, rows)],
    )


def _flow(index: Index, rows: Sequence[Quality]) -> Table:
    records = index.records
    parts = [
        ("with a class label", [r for r in records if r.label is not None]),
        ("with a mask", [r for r in records if r.mask is not None]),
        *((f"split {part}", [r for r in records if r.split == part]) for part in ("train", "val", "test")),
    ]
    if rows:
        stored = {row.image for row in rows}
        parts.append(("that could not be preprocessed", [r for r in records if r.image not in stored]))
    flow = [
        ("Found", told(len(records) + len(index.rejected)), ""),
        ("Not used", told(len(index.rejected)), ""),
        ("Images", told(len(records)), told(len({r.subject for r in records}))),
        *((name, told(len(of)), told(len({r.subject for r in of}))) for name, of in parts if of),
    ]
    return Table("From files to images", ("", "Images", "Subjects"), flow)


def _refused(index: Index) -> list[Table]:
    """Why files were not used: each reason, what it means, and the first of its files."""
    reasons = Counter(rejection.reason for rejection in index.rejected)
    first = {rejection.reason: rejection for rejection in reversed(index.rejected)}
    rows = [
        (code, told(count), REASONS.get(code, ""), first[code].detail, first[code].path)
        for code, count in reasons.most_common()
    ]
    head = ("Reason", "Files", "What it means", "The first: what was wrong", "The first")
    note = "Paths stand here as in rejected.csv: relative to the source, and without names of patients."
    return [Table("Not used, by reason", head, rows, note, wide=True)] if rows else []


def _origins(records: Sequence[Record]) -> list[Table]:
    """How many images have which label, scanner, field strength and sequence; nothing where nobody says."""
    tables = []
    for caption, name, values in (
        ("Class labels", "Label", [r.label for r in records]),
        ("Scanners", "Scanner", [r.scanner for r in records]),
        ("Field strengths", "Tesla", [None if r.field_strength is None else f"{r.field_strength:g}" for r in records]),
        ("Sequences", "Sequence", [r.sequence for r in records]),
    ):
        counts = Counter(told(value) for value in values)
        if set(values) - {None} and len(counts) <= 20:
            tables.append(counted(caption, name, counts))
    return tables


def _by_axis(records: Sequence[Record], dims: int, of: Callable[[Record], Sequence[float]]) -> dict[str, list[float]]:
    same = [of(record) for record in records if len(record.shape) == dims]
    return {name: [float(values[axis]) for values in same] for axis, name in enumerate(AXES[dims])}


def _ranges(records: Sequence[Record]) -> list[Table]:
    """Smallest, middle and largest size and voxel along each axis; images of two and three dimensions apart."""
    tables = []
    for dims in sorted({len(record.shape) for record in records}):
        rows = [
            (f"{quantity} {axis}, {unit}", *_spread(values))
            for quantity, (unit, of) in GRID.items()
            for axis, values in _by_axis(records, dims, of).items()
        ]
        tables.append(Table(f"Grids of the {dims}D images", ("", "Smallest", "Median", "Largest"), rows))
    return tables


def _grids(records: Sequence[Record]) -> list[Figure]:
    """Histograms of what differs from image to image."""
    drawn = []
    for dims in sorted({len(record.shape) for record in records}):
        for quantity, (unit, of) in GRID.items():
            values = _by_axis(records, dims, of)
            if any(len(set(numbers)) > 1 for numbers in values.values()):
                caption = f"{quantity} of the {dims}D images"
                drawn.append(figures.histogram(values, f"{quantity}, {unit}", caption))
    return drawn


def _drawn(measured: Mapping[str, Figures]) -> list[Figure]:
    columns = {name: _column(measured, name) for name in DRAWN}
    return [
        figures.histogram({name: v}, FIGURES[name], FIGURES[name]) for name, v in columns.items() if len(set(v)) > 1
    ]


def _intensities(measured: Mapping[str, Figures], *, whole: bool) -> list[Table]:
    columns = {name: _column(measured, name) for name in FIGURES}
    rows = [(FIGURES[name], *_spread(values)) for name, values in columns.items() if values]
    of = many(len(measured), "image")
    note = (
        f"Measured on {of} as read, before preprocessing."
        if whole
        else f"Measured on the {of} of the contact sheet alone. medim preprocess measures every image."
    )
    return [Table("Intensities", ("", "Smallest", "Median", "Largest"), rows, note)] if rows else []


def _flagged(rows: Sequence[Quality], seen: Mapping[str, Figures]) -> Table:
    raised = [row.flags for row in rows] or [flags(vars(found)) for found in seen.values()]
    counts = Counter(code for codes in raised for code in codes)
    known = [code for code in FLAGS if rows or code != "near-duplicate"]
    cells = [(code, told(counts[code]), FLAGS[code].meaning) for code in known]
    note = "A flag asks for a look; no image is left out for one."
    return Table(f"Flags of {many(len(raised), 'image')}", ("Flag", "Images", "Raised where"), cells, note, wide=True)


def _alike(records: Sequence[Record], rows: Sequence[Quality]) -> list[Table]:
    """Images that look alike: those of two subjects matter to a split, those of one are expected."""
    of = {record.image: record for record in records}
    across = {
        (min(row.image, row.nearest), max(row.image, row.nearest)): row.distance or 0 for row in rows if row.nearest
    }
    within = [row for row in rows if row.nearest_own is not None]
    if not across and not within:
        return []
    counts = [
        ("another subject", told(sum(row.nearest is not None for row in rows))),
        ("the same subject", told(len(within))),
    ]
    tables = [Table("Images that look like one of", ("", "Images"), counts, f"At most {NEAR} of 64 bits differ.")]
    pairs = sorted((distance, one, two) for (one, two), distance in across.items())
    cells = [
        (one, two, told(distance), " and ".join(told(of[image].split) for image in (one, two)))
        for distance, one, two in pairs[:MOST_PAIRS]
    ]
    if cells:
        head = ("Image", "Looks like", "Bits apart", "Splits")
        note = f"The nearest {len(cells)} of {many(len(pairs), 'pair')}: of each image the one most like it."
        tables.append(Table("Images of two subjects that look alike", head, cells, note, wide=True))
    return tables


def _column(measured: Mapping[str, Figures], name: str) -> list[float]:
    values = (getattr(found, name) for found in measured.values())
    return [float(value) * (100 if name in SHARES else 1) for value in values if value is not None]


def _spread(values: Sequence[float]) -> tuple[str, str, str]:
    low, half, high = (f"{v:.4g}" for v in (min(values), float(np.median(values)), max(values)))
    return low, half, high
