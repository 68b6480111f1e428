"""Joining tables to images: whose they are, and their labels, masks and splits."""

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
from medim.privacy import make_pseudonym
from medim.types import UserError

log = logging.getLogger(__name__)
FolderTables = list[tuple[CsvTable, Path | None]]  # each with the folder it speaks of; None: of all images


@dataclass
class PendingRecord:
    """An image on its way to a record; its paths are the real ones."""

    image: ImageInfo
    subject: str | None
    label: str | None = None
    mask: Path | None = None
    split: str | None = None


def load_join_tables(layout: Layout, kind: str, user_path: Path | None) -> FolderTables:
    """The tables of a kind with the folder they speak of: the one the user named, else those in the source."""
    if user_path is not None:
        table = read_table(user_path.resolve(), kind, from_user=True)
        return [(table, None)] if table else []
    tables = [
        (read_table(path, kind, from_user=False), path.parent) for path in layout.tables if path.name == f"{kind}.csv"
    ]
    return [(table, folder) for table, folder in tables if table]


def exclude_masks(layout: Layout, tables: FolderTables, root: Path) -> None:
    """Files that a table names as masks are no images."""
    cells = ((table, line, cells["mask"]) for table, _ in tables for line, cells in table.rows if cells.get("mask"))
    masks: set[Path] = set()
    for table, line, cell in cells:
        path = table.find_mask(cell, root)
        if path is None:
            raise UserError(
                f"{table.path}, line {line}: expected the path of a mask, relative to this table or to the source."
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


def join_subjects(pending_records: Sequence[PendingRecord], tables: FolderTables, layout: Layout, root: Path) -> None:
    """Give each draft its subject: a table's, else the file's own, else what its path says."""
    cells_by_image = merge_tables(_add_matchers(tables, pending_records), {}, ("subject", "split"))
    for index, cells in cells_by_image.items():
        if "subject" in cells:
            pending_records[index].subject = make_pseudonym(cells["subject"][0])
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


def _infer_subjects_from_paths(pending_records: Sequence[PendingRecord], root: Path) -> dict[Path, str]:
    """The subject of each file that only its path tells; what folders sort by class or split is an image a subject."""
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
            "%d images do not say whose they are: by the names of their files and folders they are of %d subjects; "
            "--subjects can say it better",
            len(names),
            n_subjects,
        )
    return names


def _split_path(path: Path, root: Path) -> tuple[str, ...]:
    return (*Path(os.path.relpath(path.parent, root)).parts, file_stem(path.name))


def join_labels(pending_records: Sequence[PendingRecord], tables: FolderTables, root: Path) -> None:
    """Give drafts the label, mask and split that a table gives them, by image or by subject."""
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
    """Tables with the images they speak of: all, or those under the folder they lie in."""
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
