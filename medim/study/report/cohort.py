"""From files to the images of each split and budget, and the proof that no subject stands on two sides."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from medim.reports.page import Banner, ReportSection, ReportTable, format_value, pluralise
from medim.study.report.view import StudyView

SPLIT_LABELS = {"train": "Training: the labels come from here", "val": "Evaluation: every number comes from here"}


def build_splits_section(study: StudyView) -> ReportSection:
    """Cohort flow, splits, overlap, and the images and subjects of each budget."""
    counts, overlap = study.summary["counts"], study.summary["overlap"]
    n_shared = count_shared_subjects(study.folder / "splits")
    flow = [
        ("Found", format_value(counts["images"] + counts["rejected"])),
        ("Not used: unreadable or refused", format_value(counts["rejected"])),
        ("Not used: without what the task learns from", format_value(counts["unlabelled"])),
        ("Used", format_value(sum(part["images"] for part in counts["splits"].values()))),
    ]
    splits = [
        (
            SPLIT_LABELS.get(part, "Test: not touched"),
            format_value(part_counts["images"]),
            format_value(part_counts["subjects"]),
        )
        for part, part_counts in counts["splits"].items()
    ]
    clean = n_shared == 0 and not overlap["images"]
    proof = [
        ("Subjects on two sides", format_value(n_shared)),
        ("Evaluation images whose pixels are in the training split", format_value(overlap["images"])),
        ("Subjects of these", format_value(overlap["subjects"])),
    ]
    note = "Subjects: counted in splits/*.csv. Images: by a fingerprint of their pixels, whatever their name or format."
    head = ("Budget, subset", "Images", "Subjects", "By class")
    labels = [
        (
            " subset ".join(name.rsplit("/", 1)),
            format_value(part_counts["images"]),
            format_value(part_counts["subjects"]),
            format_value(part_counts["classes"]) if part_counts["classes"] else "masks",
        )
        for name, part_counts in counts["labels"].items()
    ]
    headline = f"{pluralise(counts['splits']['train']['subjects'], 'subject')} to learn from, "
    headline += f"{pluralise(counts['splits']['val']['subjects'], 'subject')} to measure on"
    nesting_note = "Subsets are whole subjects; the smaller budgets of a subset are parts of its larger ones."
    return ReportSection(
        "cohort",
        "Cohort and splits",
        Banner(
            "good" if clean else "bad", headline, "No subject and no image stands on both sides." if clean else note
        ),
        facts=[("Classes", format_value(counts["classes"])), ("Index", str(study.summary["index_hash"])[:12])],
        tables=[
            ReportTable("From files to images", ("", "Images"), flow),
            ReportTable("Splits", ("", "Images", "Subjects"), splits),
            ReportTable("Overlap of training and evaluation", ("", "Number"), proof, note),
            ReportTable("Label budgets", head, labels, nesting_note, wide=True),
        ],
    )


def count_shared_subjects(folder: Path) -> int | None:
    """Subjects that `splits/*.csv` has in more than one split; None where there is no such file."""
    files = sorted(folder.glob("*.csv"))
    n_shared = 0
    for path in files:
        with path.open(newline="", encoding="utf-8") as file:
            pairs = {(row["subject"], row["split"]) for row in csv.DictReader(file)}
        n_shared = max(n_shared, sum(count > 1 for count in Counter(subject for subject, _ in pairs).values()))
    return n_shared if files else None
