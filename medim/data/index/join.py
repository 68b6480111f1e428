"""Join tables to images: subjects, labels, masks and splits."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medim.data.index.decathlon import file_stem
from medim.data.index.layouts import Layout
from medim.data.index.subject_names import infer_subjects, infer_subjects_from_stems
from medim.data.index.tables import CsvTable, ImageMatcher, TableFile, check_participants, merge_tables, read_table
from medim.data.labels import unify_labels
from medim.data.readers.inspection import ImageInfo, RejectedFile
from medim.privacy import format_path, make_pseudonym
from medim.types import UserError

log = logging.getLogger(__name__)
_PSEUDONYM = re.compile(r"s-[0-9a-f]{12}")  # of a subject
FolderTables = list[tuple[CsvTable, Path | None]]  # each with the folder it applies to; None: all images


@dataclass(kw_only=True)
class PendingRecord:
    """An image before it becomes a record; paths are real, not scrubbed.

    Attributes:
        is_subject_guessed: whether no table and no metadata contains the subject.
    """

    image: ImageInfo
    subject: str | None
    label: str | None = None
    mask: Path | None = None
    split: str | None = None
    is_subject_guessed: bool = False


def load_join_tables(layout: Layout, kind: str, user_table: Path | TableFile | None) -> FolderTables:
    """Load the tables of a kind with the folders they apply to: the user's table, else those in the source."""
    if user_table is not None:
        table = read_table(TableFile.of(user_table), kind, from_user=True)
        return [(table, None)] if table else []
    tables = [
        (read_table(TableFile(path), kind, from_user=False), path.parent)
        for path in layout.tables
        if path.name == f"{kind}.csv"
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
    """Set the subject of each pending record: of a table of subjects, a table of labels, the file, or the path.

    Raises:
        UserError: rows of a table are contradictory, or a table of subjects contradicts one of labels.
    """
    _unite_issuers(pending_records)
    cells_by_image = merge_tables(_add_matchers(tables, pending_records), {}, ("subject", "split"))
    names = {index: cells["subject"][0] for index, cells in cells_by_image.items() if "subject" in cells}
    label_names = _read_label_subjects(pending_records, label_tables, names)
    _set_subjects(pending_records, label_names | names)
    without_subject = [pending for pending in pending_records if pending.subject is None]
    inferred_names = _infer_subjects_from_paths(without_subject, layout, root)
    for pending in without_subject:
        pending.subject = make_pseudonym(inferred_names[pending.image.files[0]])
        pending.is_subject_guessed = True
    for index, cells in cells_by_image.items():
        if "split" in cells:
            pending_records[index].split = cells["split"][0]
    for pending in pending_records:
        pending.is_subject_guessed |= "/" in (pending.image.item or "") and pending.subject == pending.image.subject


def _read_label_subjects(
    pending_records: Sequence[PendingRecord], tables: FolderTables, names: Mapping[int, str]
) -> dict[int, str]:
    """Read the subjects of images in the rows of label tables that have an image and a subject.

    Args:
        pending_records: the images.
        tables: tables of labels.
        names: subjects of images in a table of subjects.

    Raises:
        UserError: two rows have one image and different subjects, or `names` unites subjects of a table of labels or
            divides one.
    """
    label_names: dict[int, str] = {}
    partners: dict[tuple[str, str], str] = {}  # a subject of one table to that of the other
    for table, matcher in _add_matchers(tables, pending_records):
        for line, cells in table.rows:
            image, subject = cells.get("image"), cells.get("subject")
            for index in matcher.find_images(image) if image and subject else ():
                if label_names.setdefault(index, str(subject)) != subject:
                    raise UserError(
                        f"{format_path(table.path)}, line {line}: expected one subject per image, but an earlier row "
                        "has another one. Remove the wrong row."
                    )
                pair = str(subject), names.get(index)
                if pair[1] is not None and (
                    partners.setdefault(("labels", pair[0]), pair[1]) != pair[1]
                    or partners.setdefault(("subjects", pair[1]), pair[0]) != pair[0]
                ):
                    raise UserError(
                        f"{format_path(table.path)}, line {line}: the table of subjects groups this image with other "
                        "images than the subject column here. Correct one of the tables, or remove the column."
                    )
    return label_names


def _unite_issuers(pending_records: Sequence[PendingRecord]) -> None:
    """Make images of one PatientID one subject if some of them name no IssuerOfPatientID.

    They may be of one patient, who must not stand in two splits. If all name an issuer, the issuers separate them.
    """
    without_issuer = {pending.image.subject for pending in pending_records if not pending.image.aliases}
    for pending in pending_records:
        for alias in without_issuer.intersection(pending.image.aliases):
            pending.subject = alias


def _set_subjects(pending_records: Sequence[PendingRecord], names: Mapping[int, str]) -> None:
    """Set the subjects of tables, and of images without a row whose files name a subject that a table renames."""
    subjects: dict[int, str] = {}
    new_subjects: dict[str, set[str]] = defaultdict(set)  # by the subject in the file
    for index, name in names.items():
        image = pending_records[index].image
        is_same = image.subject is not None and make_pseudonym(name) in (image.subject, *image.aliases)
        subjects[index] = str(image.subject) if is_same else _make_subject_pseudonym(name)
        if image.subject is not None:
            new_subjects[image.subject].add(subjects[index])
    for index, pending in enumerate(pending_records):
        renamed = new_subjects.get(pending.image.subject or "", set())
        if index in subjects:
            pending.subject = subjects[index]
        elif len(renamed) == 1:
            pending.subject = next(iter(renamed))


def _make_subject_pseudonym(name: str) -> str:
    """Return the pseudonym of a subject; one of an output of medim, such as `split.csv`, is kept."""
    return name if _PSEUDONYM.fullmatch(name) else make_pseudonym(name)


def _infer_subjects_from_paths(pending_records: Sequence[PendingRecord], layout: Layout, root: Path) -> dict[Path, str]:
    """Infer the subject of each file from its path alone.

    In folders sorted by class or split, each image is a subject, unless file names begin alike.
    """
    case_names: dict[Path, str] = {}
    parts: dict[Path, tuple[str, ...]] = {}
    for pending in pending_records:
        path = pending.image.files[0]
        if layout.find_folder(path) is None:
            parts[path] = _split_path(path, root)
        else:
            case_names[path] = layout.case_name(path)
    labelled_paths = {d.image.files[0] for d in pending_records if d.label is not None or d.split is not None}
    labelled_paths &= parts.keys()
    subject_names = infer_subjects(path_parts for path, path_parts in parts.items() if path not in labelled_paths)
    repeats = Counter(parts[path][-1] for path in labelled_paths)
    names = {path: subject_names[path_parts] for path, path_parts in parts.items() if path not in labelled_paths}
    names |= {
        path: "/".join(parts[path]) if repeats[parts[path][-1]] > 1 else parts[path][-1] for path in labelled_paths
    }
    if len(set(names.values())) == len(names):
        starts = infer_subjects_from_stems({path_parts[-1] for path_parts in parts.values()})
        split_by_path = {d.image.files[0]: d.split for d in pending_records}
        n_splits = len(set(split_by_path.values()))  # the splits of the source divide subjects that are only guessed
        names = {
            path: f"{split_by_path[path] or ''}/{starts[parts[path][-1]]}" if n_splits > 1 else starts[parts[path][-1]]
            for path in (names if starts else ())
        } or names
    return names | case_names


def _split_path(path: Path, root: Path) -> tuple[str, ...]:
    return (*Path(os.path.relpath(path.parent, root)).parts, file_stem(path.name))


def join_labels(pending_records: Sequence[PendingRecord], tables: FolderTables, root: Path) -> None:
    """Set the label, mask and split of pending records from tables, by image or by subject.

    Raises:
        UserError: rows are contradictory, or labels are invalid lists of findings.
    """
    by_subject: dict[str, set[int]] = defaultdict(set)
    for index, pending in enumerate(pending_records):
        for name in {pending.subject, pending.image.subject, *pending.image.aliases}:
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
    for pending, label in zip(pending_records, unify_labels([p.label for p in pending_records]), strict=True):
        pending.label = label


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
