"""The tables a user joins to images: labels, masks, splits and subjects, as CSV."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from medim.data.index.decathlon import stem
from medim.data.labels import finding_columns, label_of, told_by
from medim.data.readers.inspection import Found
from medim.privacy import hidden, pseudonym
from medim.types import UserError

log = logging.getLogger(__name__)
HIDDEN = re.compile(r"(?:^|/)p-[0-9a-f]{12}")

_BIDS = {"participant_id": "subject"}


@dataclass(frozen=True)
class Table:
    """A CSV file's rows.

    Attributes:
        path: the file.
        rows: line number and cells by column name (lower case).
        given: whether the user named it; a table that merely lies in the source is used as far as it fits.
    """

    path: Path
    rows: tuple[tuple[int, dict[str, str]], ...]
    given: bool

    def mask(self, cell: str, root: Path) -> Path | None:
        """The file a `mask` cell names, relative to the table or to the source."""
        for path in (self.path.parent / cell, root / cell):
            try:
                if path.is_file():
                    return path.parent.resolve() / path.name  # as `walk` has it: a link to a file is not followed
            except OSError:  # no name is so long
                continue
        return None


def read_table(path: Path, kind: str, *, given: bool) -> Table | None:
    """Read a table of labels or subjects.

    Args:
        path: CSV with a header line; comma, semicolon or tab. A BIDS tree's `participants.tsv` with such a column is
            one, its `participant_id` being the subject.
        kind: "labels" (columns `image` or `subject`, and `label`, `mask` or `split`; where the user named it, in place
            of `label` also a column a finding, of 1, 0 and empty cells) or "subjects" (columns `image`, `subject`).
        given: whether the user named it.

    Returns:
        the table, or None where a table that lies in the source has other columns.

    Raises:
        UserError: a table that the user named is missing or has other columns.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a CSV file (UTF-8) with the columns of --{kind}, got {error}.") from error
    delimiter = max(",;\t", key=next(iter(text.splitlines()), "").count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [_BIDS.get(name.strip().lower(), name.strip().lower()) for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        found = ((reader.line_num, {name: _cell(cell) for name, cell in row.items() if name}) for row in reader)
        rows = tuple(row for row in found if any(row[1].values()))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: expected a row of a CSV file, got {error}.") from error
    bare = kind == "labels" and given and not {"label", "mask"} & set(columns)
    findings = finding_columns([cells for _, cells in rows]) if bare else ()
    fits = {"image", "subject"} <= set(columns)
    wanted = "image,subject"
    if kind == "labels":
        fits = bool({"image", "subject"} & set(columns)) and bool({"label", "mask", "split", *findings} & set(columns))
        wanted = "image or subject, and label or mask"
    if not fits:
        if given:
            hint = " Findings take two or more columns of 1, 0 and empty cells." if kind == "labels" else ""
            raise UserError(f"{path}: expected the columns {wanted}; got {', '.join(columns) or 'none'}.{hint}")
        log.warning("%s is not used: it has no columns %s", path.name, wanted)
        return None
    if findings:
        log.info("%s: labels of %d findings: %s", path.name, len(findings), ", ".join(findings))
        for _, cells in rows:
            cells["label"] = label_of({name: told_by(cells[name]) for name in findings}) or ""
    return Table(path, rows, given)


def _cell(text: str | None) -> str:
    """A cell; BIDS writes `n/a` where there is no value."""
    value = (text or "").strip()
    return "" if value == "n/a" else value


def check_participants(path: Path, known: Iterable[Iterable[str | None]]) -> None:
    """Say in the log where a `participants.tsv` and the images of its tree do not cover each other, by count.

    Args:
        path: the table; of its columns only `participant_id` is looked at.
        known: names (pseudonyms) of the subject of each image.
    """
    rows = csv.DictReader(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), delimiter="\t")
    listed = {pseudonym(str(row.get("participant_id") or "").strip()) for row in rows}
    found = {frozenset(name for name in names if name) for names in known}
    unlisted = sum(not names & listed for names in found)
    absent = len(listed - frozenset().union(*found))
    if absent or unlisted:
        log.warning(
            "%s: %d of its %d participants have no image here; %d subjects with images are not in it",
            *(path.name, absent, len(listed), unlisted),
        )


class Names:
    """Which images a cell of a table means.

    An image is meant by any ending of its path, with or without suffix (`a/b/scan.nii.gz`, `scan`), by the folder of
    its series, by its SeriesInstanceUID, by its item (`archive.npz#train/12`, `train/12`), or by its key in an index,
    where pseudonyms stand for parts of the path that hold an identity. A file of several volumes means them all,
    `scan.nii.gz#3` means one.
    """

    def __init__(self, images: Iterable[tuple[int, Found]]) -> None:
        self._images: dict[str, set[int]] = defaultdict(set)
        self._files: dict[int, Path] = {}
        for place, found in images:
            self._files[place] = found.files[0]
            for name in _names(found):
                self._images[name].add(place)

    @cached_property
    def _parts(self) -> dict[str, str]:
        """What a part of a path is called where it holds an identity, to what it is."""
        return {hidden(part): part for part in {part for name in self._images for part in name.split("/")}}

    def image(self, cell: str) -> set[int]:
        """The places of the images a cell may mean."""
        name = PurePosixPath(cell.replace("\\", "/")).as_posix().lstrip("/")
        if name not in self._images and HIDDEN.search(name):
            name = "/".join(self._parts.get(part, part) for part in name.split("/"))
        return self._images.get(name) or self._images.get(pseudonym(cell), set())

    @property
    def places(self) -> set[int]:
        """Of all the images."""
        return set(self._files)

    def files(self, places: Iterable[int]) -> set[Path]:
        """The files of images."""
        return {self._files[place] for place in places}


def _names(found: Found) -> Iterator[str]:
    path = found.files[0]
    in_archive = found.item is not None and "/" in found.item
    ends = [f"#{found.item}", f"/{found.item}"] if found.item else []
    ends += [] if in_archive else [""]
    yield from found.names
    if found.item and in_archive:
        yield found.item
    named = [path, path.with_name(stem(path.name))] + ([path.parent] if len(found.files) > 1 else [])
    for name in named:
        parts = name.parts[1:]
        for count in range(1, len(parts) + 1):
            for end in ends:
                yield "/".join(parts[-count:]) + end


def rows_of(
    table: Table, names: Names, by_subject: dict[str, set[int]]
) -> Iterator[tuple[int, dict[str, str], set[int]]]:
    """Each row of a table with the places of the images it means.

    Rows that mean none (their image was refused, or is not here) are counted in the log by line, never by name.

    Raises:
        UserError: a name means several images, or the user named the table and no row means any.
    """
    lost: list[int] = []
    for line, cells in table.rows:
        image, subject = cells.get("image", ""), cells.get("subject", "")
        of_subject = by_subject.get(subject) or by_subject.get(pseudonym(subject), set())
        places = names.image(image) if image else of_subject & names.places
        if image and len(names.files(places)) > 1:
            raise UserError(
                f"{table.path}, line {line}: expected the name of one image, got one that {len(places)} images end in. "
                "Write more of its path."
            )
        if not places:
            lost.append(line)
            continue
        yield line, cells, places
    if lost and len(lost) == len(table.rows) and table.given:
        raise UserError(
            f"{table.path}: expected names of images in the source; none of the {len(lost)} rows means one. "
            "Write the path relative to the source, or the file's name."
        )
    if lost:
        shown = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
        log.warning("%s: %d of %d rows mean no image (lines %s)", table.path.name, len(lost), len(table.rows), shown)


def joined(
    tables: Sequence[tuple[Table, Names]], by_subject: dict[str, set[int]], columns: Sequence[str]
) -> dict[int, dict[str, tuple[str, Table]]]:
    """What tables say of each image: column to cell, and the table it stands in.

    Raises:
        UserError: two rows contradict each other.
    """
    said: dict[int, dict[str, tuple[str, Table]]] = defaultdict(dict)
    for table, names in tables:
        for line, cells, places in rows_of(table, names, by_subject):
            for place in places:
                for column in columns:
                    cell = cells.get(column, "")
                    if cell and said[place].setdefault(column, (cell, table))[0] != cell:
                        raise UserError(
                            f"{table.path}, line {line}: expected one {column} an image, got another one than before. "
                            "Remove the row that is wrong."
                        )
    return said
