"""From files to the images of each split and budget, and the proof that no subject stands on two sides."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from medim.reports.page import Banner, Section, Table, many, told
from medim.study.report.view import Opened

SIDES = {"train": "Training: the labels come from here", "val": "Evaluation: every number comes from here"}


def cohort(study: Opened) -> Section:
    """Cohort flow, splits, overlap, and the images and subjects of each budget."""
    counts, overlap = study.summary["counts"], study.summary["overlap"]
    both = on_both_sides(study.folder / "splits")
    flow = [
        ("Found", told(counts["images"] + counts["rejected"])),
        ("Not used: unreadable or refused", told(counts["rejected"])),
        ("Not used: without what the task learns from", told(counts["unlabelled"])),
        ("Used", told(sum(part["images"] for part in counts["splits"].values()))),
    ]
    splits = [
        (SIDES.get(part, "Test: not touched"), told(held["images"]), told(held["subjects"]))
        for part, held in counts["splits"].items()
    ]
    clean = both == 0 and not overlap["images"]
    proof = [
        ("Subjects on two sides", told(both)),
        ("Evaluation images whose pixels are in the training split", told(overlap["images"])),
        ("Subjects of these", told(overlap["subjects"])),
    ]
    note = "Subjects: counted in splits/*.csv. Images: by a fingerprint of their pixels, whatever their name or format."
    head = ("Budget, subset", "Images", "Subjects", "By class")
    labels = [
        (
            " subset ".join(name.rsplit("/", 1)),
            told(held["images"]),
            told(held["subjects"]),
            told(held["classes"]) if held["classes"] else "masks",
        )
        for name, held in counts["labels"].items()
    ]
    said = f"{many(counts['splits']['train']['subjects'], 'subject')} to learn from, "
    said += f"{many(counts['splits']['val']['subjects'], 'subject')} to measure on"
    nested = "Subsets are whole subjects; the smaller budgets of a subset are parts of its larger ones."
    return Section(
        "cohort",
        "Cohort and splits",
        Banner("good" if clean else "bad", said, "No subject and no image stands on both sides." if clean else note),
        facts=[("Classes", told(counts["classes"])), ("Index", str(study.summary["index_hash"])[:12])],
        tables=[
            Table("From files to images", ("", "Images"), flow),
            Table("Splits", ("", "Images", "Subjects"), splits),
            Table("Overlap of training and evaluation", ("", "Number"), proof, note),
            Table("Label budgets", head, labels, nested, wide=True),
        ],
    )


def on_both_sides(folder: Path) -> int | None:
    """Subjects that `splits/*.csv` has in more than one split; None where there is no such file."""
    files = sorted(folder.glob("*.csv"))
    found = 0
    for path in files:
        with path.open(newline="", encoding="utf-8") as file:
            pairs = {(row["subject"], row["split"]) for row in csv.DictReader(file)}
        found = max(found, sum(count > 1 for count in Counter(subject for subject, _ in pairs).values()))
    return found if files else None
