"""Join tables to images: subjects, labels, masks and splits."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medim.data.index.decathlon import file_stem
from medim.data.index.layouts import Layout
from medim.data.index.subject_names import infer_subjects
from medim.data.index.tables import CsvTable, ImageMatcher, check_participants, merge_tables, read_table
from medim.data.readers.inspection import ImageInfo, RejectedFile
from medim.privacy import format_path, make_pseudonym
from medim.types import UserError

log = logging.getLogger(__name__)
FolderTables = list[tuple[CsvTable, Path | None]]  # each with the folder it applies to; None: all images


@dataclass(kw_only=True)
class PendingRecord:
    """An image before it becomes a record; paths are real, not scrubbed."""

    image: ImageInfo
    subject: str | None
    label: str | None = None
    mask: Path | None = None
    split: str | None = None


def load_join_tables(layout: Layout, kind: str, user_path: Path | None) -> FolderTables:
    """Load the tables of a kind with the folders they apply to: the user's table, else those in the source."""
    if user_path is not None:
        table = read_table(user_path.resolve(), kind, from_user=True)
        return [(table, None)] if table else []
    tables = [
        (read_table(path, kind, from_user=False), path.parent) for path in layout.tables if path.name == f"{kind}.csv"
    ]
    return [(table, folder) for table, folder in tables if table]


def exclude_masks(layout: Layout, tables: FolderTables, root: Path) -> None:
    """Remove files that a table lists as masks from the images."""
    cells = ((table, line, cells["mask"]) for table, _ in tables for line, cells in table.rows if cells.get("mask"))
    masks: set[Path] = set()
    for table, line, cell in cells:
        path = table.find_mask(cell, root)
        if path is None:
            raise UserError(
                f"{format_path(table.path)}, line {line}: expected the path of a mask, relative to this "
                "table or to the source."
            )
        masks.add(path)
        layout.unmatched_masks.setdefault(
            path, RejectedFile(path=path, reason="label-without-image", detail="a label without a readable image")
        )
    layout.drop_masks(masks)


def check_participant_tables(pending_records: Sequence[PendingRecord], layout: Layout) -> None:
    """Compare each BIDS tree with its `participants.tsv`."""
    for path in layout.participants:
        tree_records = [pending for pending in pending_records if path.parent in pending.image.files[0].parents]
        check_participants(path, ((pending.subject, *pending.image.aliases) for pending in tree_records))


def join_subjects(
    pending_records: Sequence[PendingRecord],
    tables: FolderTables,
    label_tables: FolderTables,
    layout: Layout,
    root: Path,
) -> None:
    """Set the subject of each pending record: of a table of subjects, the file, a table of labels, or the path."""
    cells_by_image = merge_tables(_add_matchers(tables, pending_records), {}, ("subject", "split"))
    for index, cells in cells_by_image.items():
        if "subject" in cells:
            pending_records[index].subject = make_pseudonym(cells["subject"][0])
    _join_subjects_of_labels(pending_records, label_tables)
    without_subject = [pending for pending in pending_records if pending.subject is None]
    names = _infer_subjects_from_paths(
        [pending for pending in without_subject if layout.find_folder(pending.image.files[0]) is None], root
    )
    for pending in without_subject:
        path = pending.image.files[0]
        pending.subject = make_pseudonym(names.get(path, layout.case_name(path)))
    for index, cells in cells_by_image.items():
        if "split" in cells:
            pending_records[index].split = cells["split"][0]


def _join_subjects_of_labels(pending_records: Sequence[PendingRecord], tables: FolderTables) -> None:
    """Set missing subjects from the rows of label tables that have an image and a subject."""
    subjects: dict[int, str] = {}
    for table, matcher in _add_matchers(tables, pending_records):
        for _, cells in table.rows:
            if cells.get("image") and cells.get("subject"):
                indices = matcher.find_images(cells["image"])
                subjects |= {index: cells["subject"] for index in indices if pending_records[index].subject is None}
    for index, subject in subjects.items():
        pending_records[index].subject = make_pseudonym(subject)
    if subjects:
        log.info("%d images have the subject of the table of labels", len(subjects))


def _infer_subjects_from_paths(pending_records: Sequence[PendingRecord], root: Path) -> dict[Path, str]:
    """Infer subjects from paths alone. In folders sorted by class or split, each image is a subject."""
    parts = {d.image.files[0]: _split_path(d.image.files[0], root) for d in pending_records}
    labelled_paths = {d.image.files[0] for d in pending_records if d.label is not None or d.split is not None}
    subject_names = infer_subjects(path_parts for path, path_parts in parts.items() if path not in labelled_paths)
    repeats = Counter(parts[path][-1] for path in labelled_paths)
    names = {path: subject_names[path_parts] for path, path_parts in parts.items() if path not in labelled_paths}
    names |= {
        path: "/".join(parts[path]) if repeats[parts[path][-1]] > 1 else parts[path][-1] for path in labelled_paths
    }
    if (n_subjects := len(set(names.values()))) < len(names):
        log.warning(
            "%d images have no subject in their metadata: from their file and folder names, %d subjects were inferred. "
            "Use --subjects to provide the subjects",
            len(names),
            n_subjects,
        )
    return names


def _split_path(path: Path, root: Path) -> tuple[str, ...]:
    return (*Path(os.path.relpath(path.parent, root)).parts, file_stem(path.name))


def join_labels(pending_records: Sequence[PendingRecord], tables: FolderTables, root: Path) -> None:
    """Set the label, mask and split of pending records from tables, by image or by subject."""
    by_subject: dict[str, set[int]] = defaultdict(set)
    for index, pending in enumerate(pending_records):
        for name in (pending.subject, *pending.image.aliases):
            by_subject[name or ""].add(index)
    for index, cells in merge_tables(
        _add_matchers(tables, pending_records), by_subject, ("label", "mask", "split")
    ).items():
        pending = pending_records[index]
        pending.label = cells["label"][0] if "label" in cells else pending.label
        pending.split = cells["split"][0] if "split" in cells else pending.split
        if "mask" in cells:
            cell, table = cells["mask"]
            pending.mask = table.find_mask(cell, root)


def _add_matchers(
    tables: FolderTables, pending_records: Sequence[PendingRecord]
) -> list[tuple[CsvTable, ImageMatcher]]:
    """Combine each table with the images it applies to: all, or those under the table's folder."""
    return [
        (
            table,
            ImageMatcher(
                (index, pending.image)
                for index, pending in enumerate(pending_records)
                if folder is None or folder in pending.image.files[0].parents
            ),
        )
        for table, folder in tables
    ]
