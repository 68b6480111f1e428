"""From an index or a package to a section of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medim.data.index import Index, Record
from medim.evaluation.report.page import Banner, Section, Table, counted, many, size, told
from medim.files import read_json

AXES = {2: ("down", "across"), 3: ("left to right", "back to front", "foot to head")}


def cohort(folder: Path, anchor: str) -> Section:
    """An index: what was found, what was not used and why, and what the images are like."""
    index = Index.read(folder)
    records = index.records
    subjects = len({record.subject for record in records})
    found = len(records) + len(index.rejected)
    flow = [
        ("Found", told(found), ""),
        ("Not used", told(len(index.rejected)), ""),
        ("Images", told(len(records)), told(subjects)),
        *(
            (name, told(len(chosen)), told(len({record.subject for record in chosen})))
            for name, chosen in (
                ("with a class label", [r for r in records if r.label is not None]),
                ("with a mask", [r for r in records if r.mask is not None]),
                *((f"split {part}", [r for r in records if r.split == part]) for part in ("train", "val", "test")),
            )
            if chosen
        ),
    ]
    tables = [Table("From files to images", ("", "Images", "Subjects"), flow), *_ranges(records)]
    reasons = Counter(rejection.reason for rejection in index.rejected)
    if reasons:
        tables.append(counted("Not used, by reason", "Reason", reasons))
    labels = Counter(r.label for r in records if r.label is not None)
    if 0 < len(labels) <= 20:
        tables.append(counted("Class labels", "Label", labels))
    scanners = Counter(r.scanner or "not reported" for r in records)
    if set(scanners) != {"not reported"}:
        tables.append(counted("Scanners", "Scanner", scanners))
    left_out = len(index.rejected)
    text = f"{left_out:,} of {found:,} files or series were not used." if left_out else "Every file was used."
    headline = f"{many(len(records), 'image')} of {many(subjects, 'subject')}"
    return Section(
        anchor=anchor,
        title=f"Images: {folder.name}",
        banner=Banner("care" if left_out else "good", headline, text),
        facts=[
            ("Modality", index.modality),
            ("Classes of the masks", told(list(index.classes))),
            ("Index", index.hash[:12]),
        ],
        tables=tables,
    )


def package(folder: Path, anchor: str) -> Section:
    """A package: what it is for, what it takes and gives, and the gates it passed at export."""
    contract = read_json(folder / "medim.json")
    report = folder / "parity" / "report.json"
    gates = read_json(report).get("gates", {}) if report.is_file() else {}
    rows = [
        (name.replace("_", " "), str(gate.get("verdict")), told(gate.get("measured")), told(gate.get("allowed")))
        for name, gate in gates.items()
        if isinstance(gate, dict)
    ]
    passed = bool(rows) and all(row[1] == "pass" for row in rows)
    headline = f"{contract.get('name')} {contract.get('version')}, {contract.get('kind')}"
    files = [path for path in folder.rglob("*") if path.is_file()]
    facts = [
        ("Name", f"{contract.get('name')} {contract.get('version')}"),
        ("Kind", told(contract.get("kind"))),
        ("Modality", told(contract.get("modality"))),
        ("Classes", told(contract.get("classes"))),
        ("Intended use", told(contract.get("intended_use"))),
        ("Size", size(sum(path.stat().st_size for path in files))),
    ]
    text = (
        f"{many(len(rows), 'gate')} passed at export."
        if passed
        else "No report of a passed export was found. Run medim verify."
    )
    return Section(
        anchor=anchor,
        title=f"Package: {folder.name}",
        banner=Banner("good" if passed else "care", headline, f"{text} {contract.get('not_for') or ''}".strip()),
        facts=facts,
        tables=[Table("Gates at export", ("Gate", "Verdict", "Measured", "Allowed"), rows, wide=True)] if rows else [],
        details=[("Preprocessing", "\n".join(told(step) for step in contract.get("preprocess", ())))],
    )


def _ranges(records: Sequence[Record]) -> list[Table]:
    """Smallest, middle and largest size and voxel along each axis; images of two and three dimensions apart."""
    tables = []
    for dims in sorted({len(record.shape) for record in records}):
        same = [record for record in records if len(record.shape) == dims]
        rows = []
        for name, field, unit in (("Size", "shape", "voxels"), ("Spacing", "spacing", "mm")):
            for axis in range(dims):
                values = [getattr(record, field)[axis] for record in same]
                numbers = (f"{v:.4g}" for v in (min(values), float(np.median(values)), max(values)))
                rows.append((f"{name} {AXES[dims][axis]}, {unit}", *numbers))
        tables.append(Table(f"Grids of the {dims}D images", ("", "Smallest", "Median", "Largest"), rows))
    return tables
