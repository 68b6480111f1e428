"""Joining tables to images: whose they are, and their labels, masks and splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medim.data.identity import pseudonym
from medim.data.layouts import Layout
from medim.data.readers.sights import Found, Refused
from medim.data.tables import Names, Table, check_participants, joined, read_table
from medim.types import UserError

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


def join_subjects(drafts: Sequence[Draft], tables: Tables, layout: Layout) -> None:
    """Give each draft its subject: a table's, else the file's own, else its stem."""
    said = joined(_with_names(tables, drafts), {}, ("subject", "split"))
    folders: dict[str, set[Path]] = defaultdict(set)
    for draft in drafts:
        folders[layout.case(draft.found.files[0])].add(draft.found.files[0].parent)
    for place, draft in enumerate(drafts):
        path = draft.found.files[0]
        name = layout.case(path)
        if len(folders[name]) > 1 and layout.folder(path) is None:
            name = str(path.parent)
        cells = said.get(place, {})
        draft.subject = pseudonym(cells["subject"][0]) if "subject" in cells else draft.subject or pseudonym(name)
        draft.split = cells["split"][0] if "split" in cells else draft.split


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
