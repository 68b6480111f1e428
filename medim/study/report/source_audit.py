"""Page of `medim audit`: look-alikes with pictures, and image properties that predict the label."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from medim.data.index.index import Index
from medim.files import write_text
from medim.reports.cohort import PATIENT_NOTE
from medim.reports.contact_sheet import encode_picture
from medim.reports.figures import IntervalRow, interval_plot
from medim.reports.page import (
    Banner,
    ContactSheet,
    PageHead,
    ReportSection,
    ReportTable,
    Tile,
    format_metric,
    format_value,
    interval_cell,
    pluralise,
)
from medim.reports.report import render_page
from medim.reports.svg import Figure
from medim.study.audit.source import PAIRS_FILE, LookAlikePair, SourceAudit
from medim.version import __version__

AUDIT_PAGE = "audit.html"
MAX_SHOWN_PAIRS = 12  # pairs with pictures
PROPERTY_NOTE = (
    "A classifier is given only these few numbers per image, learns the class from the training subjects, and is "
    "measured on the validation subjects. A model that is no better than one of them may have learnt only this."
)
PAIR_NOTE = (
    "Pairs of two subjects first, then pairs in two splits, then by correlation. Compare the pictures: a pair of two "
    "subjects is one person under two names, a copy, or an expected false pair."
)


def write_audit_page(folder: Path, index: Index, result: SourceAudit) -> Path:
    """Write `audit.html` for an audit of a source, and return its path."""
    pairs = sorted(result.pairs, key=lambda pair: (pair.same_subject, not pair.is_leak, -pair.correlation))
    section = ReportSection(
        anchor="audit",
        title="Audit of the images",
        banner=_build_banner(result),
        facts=_list_facts(result),
        tables=[table for table in (_build_pair_table(pairs), _build_shortcut_table(result)) if table is not None],
        figures=_plot_aurocs(result),
        sheet=_build_pair_sheet(index, pairs[:MAX_SHOWN_PAIRS]) if pairs else None,
        details=[("Checks that were skipped, and notes", "\n".join(result.notes))] if result.notes else [],
    )
    path = folder / AUDIT_PAGE
    head = PageHead(
        title="Audit",
        date=datetime.now(UTC).date().isoformat(),
        version=__version__,
        data=f"{pluralise(result.images, 'image')} of {pluralise(result.subjects, 'subject')}, {index.modality}",
    )
    write_text(path, render_page(head, [section]))
    return path


def _build_banner(result: SourceAudit) -> Banner:
    strangers, leaks = result.strangers, result.leaks
    predictors = [shortcut.name for shortcut in result.shortcuts if shortcut.prediction.above_chance]
    text = f"The class is predicted above chance by {', '.join(predictors)}." if predictors else ""
    if leaks:
        headline = f"{pluralise(len(leaks), 'pair')} of look-alikes in two splits"
        return Banner("bad", headline, f"Metrics on the held-out images are too good. {text}")
    if strangers:
        headline = f"{pluralise(len(strangers), 'pair')} of look-alikes of two subjects"
        return Banner("care", headline, f"Another split may separate them. {text}")
    if predictors:
        return Banner("care", "Properties of the files predict the class", text)
    return Banner("good", "Nothing found by these checks", "No look-alikes of two subjects or in two splits.")


def _list_facts(result: SourceAudit) -> list[tuple[str, str]]:
    search = result.search
    false_pairs = "unknown: too few images" if search.false_pairs is None else f"{search.false_pairs:g}"
    return [
        ("Images", format_value(result.images)),
        ("Subjects", format_value(result.subjects)),
        ("Split", ", ".join(f"{part} {count:,}" for part, count in result.splits.items())),
        ("Pairs compared", format_value(search.n_compared)),
        ("Correlation of look-alikes", f"{search.threshold:.3f} or more"),
        ("Expected false pairs", false_pairs),
        ("Images that could not be read", format_value(len(result.rejections))),
    ]


def _build_pair_table(pairs: list[LookAlikePair]) -> ReportTable | None:
    rows = [
        (
            pair.image,
            pair.other_image,
            f"{pair.correlation:.3f}",
            "one" if pair.same_subject else "two",
            f"{pair.split}, {pair.other_split}",
        )
        for pair in pairs[:MAX_SHOWN_PAIRS]
    ]
    rest = f" {PAIRS_FILE} has all {len(pairs):,} pairs." if len(pairs) > MAX_SHOWN_PAIRS else ""
    head = ("Image", "Look-alike", "Correlation", "Subjects", "Splits")
    return ReportTable("Look-alikes", head, rows, PAIR_NOTE + rest, wide=True) if rows else None


def _build_pair_sheet(index: Index, pairs: list[LookAlikePair]) -> ContactSheet:
    records = {record.image: record for record in index.records}
    tiles = []
    for number, pair in enumerate(pairs, start=1):
        for image in (pair.image, pair.other_image):
            caption = f"pair {number}, {pair.correlation:.3f}"
            try:
                source = encode_picture(index.open(records[image]))
            except Exception:  # a decoder may raise any exception; a file that changed must not stop the page
                tiles.append(Tile(caption, f"{caption}: cannot be read"))
                continue
            tiles.append(Tile(caption, f"{caption}: middle slices of {image}", source))
    return ContactSheet("Pictures of the pairs", PATIENT_NOTE, tiles, large=True)


def _build_shortcut_table(result: SourceAudit) -> ReportTable | None:
    rows = [
        (
            shortcut.name,
            interval_cell(format_metric(shortcut.prediction.auroc)),
            interval_cell(format_metric(shortcut.prediction.balanced_accuracy)),
            ("yes" if shortcut.prediction.above_chance else "no") if shortcut.varies else "the same for all images",
        )
        for shortcut in result.shortcuts
    ]
    head = ("Predictor", "AUROC", "Balanced accuracy", "Above chance")
    return ReportTable("Prediction of the class without the content", head, rows, PROPERTY_NOTE) if rows else None


def _plot_aurocs(result: SourceAudit) -> list[Figure]:
    rows = [
        IntervalRow(name=shortcut.name, value=auroc["value"], low=auroc["ci_low"], high=auroc["ci_high"], second=True)
        for shortcut in result.shortcuts
        if (auroc := shortcut.prediction.auroc)["value"] is not None
    ]
    return [interval_plot(rows, "AUROC of image properties")] if rows else []
