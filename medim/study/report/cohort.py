"""Section of the study page with images of each split and budget, and the check that splits share no subject."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from medim.parsing import read_csv
from medim.reports.page import MODALITY_TEXTS, Banner, ReportSection, ReportTable, format_value, pluralise
from medim.study.report.view import StudyView

SPLIT_LABELS = {"train": "Training: source of the labelled subsets", "val": "Evaluation: source of all metrics"}


def build_splits_section(study: StudyView) -> ReportSection:
    """Build the section: cohort flow, splits, overlap, and the images and subjects of each budget."""
    counts, duplicates = study.summary["counts"], study.summary["train_val_duplicates"]
    n_shared = count_shared_subjects(study.folder / "splits")
    flow = [
        ("Found", format_value(counts["images"] + counts["rejected"])),
        ("Rejected: unreadable or unsupported", format_value(counts["rejected"])),
        ("Excluded: no label or mask for the task", format_value(counts["unlabelled"])),
        ("Used", format_value(sum(part["images"] for part in counts["splits"].values()))),
    ]
    splits = [
        (
            SPLIT_LABELS.get(part, "Test: not used"),
            format_value(part_counts["images"]),
            format_value(part_counts["subjects"]),
        )
        for part, part_counts in counts["splits"].items()
    ]
    clean = n_shared == 0 and not duplicates["images"]
    overlap_rows = [
        ("Subjects in two splits", format_value(n_shared)),
        ("Evaluation images with the same pixels as a training image", format_value(duplicates["images"])),
        ("Subjects of these images", format_value(duplicates["subjects"])),
    ]
    note = "Subjects: counted in splits/*.csv. Images: compared by pixel values, not by file name or format."
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
    headline = f"{pluralise(counts['splits']['train']['subjects'], 'subject')} for training, "
    headline += f"{pluralise(counts['splits']['val']['subjects'], 'subject')} for evaluation"
    nesting_note = "Subsets consist of whole subjects. Each budget of a subset contains its smaller budgets."
    return ReportSection(
        "cohort",
        "Cohort and splits",
        Banner(
            "good" if clean else "bad",
            headline,
            "Training and evaluation share no subject and no image." if clean else note,
        ),
        facts=[
            ("Classes", format_value(counts["classes"])),
            ("Condition (--where)", study.summary.get("where") or "none"),
            ("Index", str(study.summary["index_hash"])[:12]),
        ],
        tables=[
            ReportTable("From files to images", ("", "Images"), flow),
            ReportTable("Splits", ("", "Images", "Subjects"), splits),
            ReportTable("Overlap of training and evaluation", ("", "Number"), overlap_rows, note),
            ReportTable("Label budgets", head, labels, nesting_note, wide=True, folded=True),
        ],
    )


def describe_data(study: StudyView) -> str:
    """Describe the images of a study: modality, counts and classes."""
    counts, config = study.summary["counts"], study.config
    images = sum(part["images"] for part in counts["splits"].values())
    subjects = sum(part["subjects"] for part in counts["splits"].values())
    modality = f"{MODALITY_TEXTS[config['modality']]}: " if config.get("modality") in MODALITY_TEXTS else ""
    return (
        f"{modality}{pluralise(images, 'image')} of {pluralise(subjects, 'subject')}; {study.summary['task']} of "
        f"{', '.join(counts['classes'])}; index {study.summary['index_hash'][:12]}"
    )


def count_shared_subjects(folder: Path) -> int | None:
    """Count the subjects that occur in more than one split of `splits/*.csv`; None if there is no such file."""
    files = sorted(folder.glob("*.csv"))
    n_shared = 0
    for path in files:
        content = read_csv(path)
        content.require_columns(path, ("subject", "split"))
        pairs = {(row["subject"], row["split"]) for row in content}
        n_shared = max(n_shared, sum(count > 1 for count in Counter(subject for subject, _ in pairs).values()))
    return n_shared if files else None
