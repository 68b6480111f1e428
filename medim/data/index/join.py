"""Joining tables to images: whose they are, and their labels, masks and splits."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medim.data.index.decathlon import stem
from medim.data.index.layouts import Layout
from medim.data.index.subject_names import subjects_by_names
from medim.data.index.tables import Names, Table, check_participants, joined, read_table
from medim.data.readers.inspection import Found, Refused
from medim.privacy import pseudonym
from medim.types import UserError

log = logging.getLogger(__name__)
Tables = list[tuple[Table, Path | None]]  # each with the folder it speaks of; None: of all images


@dataclass
class Draft:
    """An image on its way to a record; its paths are the real ones."""

    found: Found
    subject: str | None
    label: str | None = None
    mask: Path | None = None
    split: str | None = None


def tables_of(layout: Layout, kind: str, given: Path | None) -> Tables:
    """The tables of a kind with the folder they speak of: the one the user named, else those in the source."""
    if given is not None:
        table = read_table(given.resolve(), kind, given=True)
        return [(table, None)] if table else []
    tables = [
        (read_table(path, kind, given=False), path.parent) for path in layout.tables if path.name == f"{kind}.csv"
    ]
    return [(table, folder) for table, folder in tables if table]


def take_masks(layout: Layout, tables: Tables, root: Path) -> None:
    """Files that a table names as masks are no images."""
    cells = ((table, line, cells["mask"]) for table, _ in tables for line, cells in table.rows if cells.get("mask"))
    masks: set[Path] = set()
    for table, line, cell in cells:
        path = table.mask(cell, root)
        if path is None:
            raise UserError(
                f"{table.path}, line {line}: expected the path of a mask, relative to this table or to the source."
            )
        masks.add(path)
        layout.spare.setdefault(
            path, Refused(path=path, reason="label-without-image", detail="a label without a readable image")
        )
    layout.take(masks)


def check_listed(drafts: Sequence[Draft], layout: Layout) -> None:
    """Compare each BIDS tree with its `participants.tsv`."""
    for path in layout.participants:
        inside = [draft for draft in drafts if path.parent in draft.found.files[0].parents]
        check_participants(path, ((draft.subject, *draft.found.aliases) for draft in inside))


def join_subjects(drafts: Sequence[Draft], tables: Tables, layout: Layout, root: Path) -> None:
    """Give each draft its subject: a table's, else the file's own, else what its path says."""
    said = joined(_with_names(tables, drafts), {}, ("subject", "split"))
    for place, cells in said.items():
        if "subject" in cells:
            drafts[place].subject = pseudonym(cells["subject"][0])
    unsaid = [draft for draft in drafts if draft.subject is None]
    names = _by_path([draft for draft in unsaid if layout.folder(draft.found.files[0]) is None], root)
    for draft in unsaid:
        path = draft.found.files[0]
        draft.subject = pseudonym(names.get(path, layout.case(path)))
    for place, cells in said.items():
        if "split" in cells:
            drafts[place].split = cells["split"][0]


def _by_path(drafts: Sequence[Draft], root: Path) -> dict[Path, str]:
    """The subject of each file that only its path tells; what folders sort by class or split is an image a subject."""
    parts = {d.found.files[0]: _parts(d.found.files[0], root) for d in drafts}
    sorted_in = {d.found.files[0] for d in drafts if d.label is not None or d.split is not None}
    guessed = subjects_by_names(place for path, place in parts.items() if path not in sorted_in)
    repeats = Counter(parts[path][-1] for path in sorted_in)
    names = {path: guessed[place] for path, place in parts.items() if path not in sorted_in}
    names |= {path: "/".join(parts[path]) if repeats[parts[path][-1]] > 1 else parts[path][-1] for path in sorted_in}
    if (count := len(set(names.values()))) < len(names):
        log.warning(
            "%d images do not say whose they are: by the names of their files and folders they are of %d subjects; "
            "--subjects can say it better",
            len(names),
            count,
        )
    return names


def _parts(path: Path, root: Path) -> tuple[str, ...]:
    return (*Path(os.path.relpath(path.parent, root)).parts, stem(path.name))


def join_labels(drafts: Sequence[Draft], tables: Tables, root: Path) -> None:
    """Give drafts the label, mask and split that a table gives them, by image or by subject."""
    by_subject: dict[str, set[int]] = defaultdict(set)
    for place, draft in enumerate(drafts):
        for name in (draft.subject, *draft.found.aliases):
            by_subject[name or ""].add(place)
    for place, cells in joined(_with_names(tables, drafts), by_subject, ("label", "mask", "split")).items():
        draft = drafts[place]
        draft.label = cells["label"][0] if "label" in cells else draft.label
        draft.split = cells["split"][0] if "split" in cells else draft.split
        if "mask" in cells:
            cell, table = cells["mask"]
            draft.mask = table.mask(cell, root)


def _with_names(tables: Tables, drafts: Sequence[Draft]) -> list[tuple[Table, Names]]:
    """Tables with the images they speak of: all, or those under the folder they lie in."""
    return [
        (
            table,
            Names(
                (place, draft.found)
                for place, draft in enumerate(drafts)
                if folder is None or folder in draft.found.files[0].parents
            ),
        )
        for table, folder in tables
    ]
