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

from medim.data.index.decathlon import file_stem
from medim.data.labels import detect_finding_columns, format_findings, parse_finding
from medim.data.readers.inspection import ImageInfo
from medim.privacy import make_pseudonym, scrubbed_name
from medim.types import UserError

log = logging.getLogger(__name__)
SCRUBBED_PREFIX = re.compile(r"(?:^|/)p-[0-9a-f]{12}")

_BIDS_COLUMNS = {"participant_id": "subject"}


@dataclass(frozen=True)
class CsvTable:
    """A CSV file's rows.

    Attributes:
        path: the file.
        rows: line number and cells by column name (lower case).
        from_user: whether the user named it; a table that merely lies in the source is used as far as it fits.
    """

    path: Path
    rows: tuple[tuple[int, dict[str, str]], ...]
    from_user: bool

    def find_mask(self, cell: str, root: Path) -> Path | None:
        """The file a `mask` cell names, relative to the table or to the source."""
        for path in (self.path.parent / cell, root / cell):
            try:
                if path.is_file():
                    return path.parent.resolve() / path.name  # as `walk` has it: a link to a file is not followed
            except OSError:  # no name is so long
                continue
        return None


def read_table(path: Path, kind: str, *, from_user: bool) -> CsvTable | None:
    """Read a table of labels or subjects.

    Args:
        path: CSV with a header line; comma, semicolon or tab. A BIDS tree's `participants.tsv` with such a column is
            one, its `participant_id` being the subject.
        kind: "labels" (columns `image` or `subject`, and `label`, `mask` or `split`; where the user named it, in place
            of `label` also a column a finding, of 1, 0 and empty cells) or "subjects" (columns `image`, `subject`).
        from_user: whether the user named it.

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
        columns = [_BIDS_COLUMNS.get(name.strip().lower(), name.strip().lower()) for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        numbered_rows = (
            (reader.line_num, {name: _clean_cell(cell) for name, cell in row.items() if name}) for row in reader
        )
        rows = tuple(row for row in numbered_rows if any(row[1].values()))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: expected a row of a CSV file, got {error}.") from error
    may_have_findings = kind == "labels" and from_user and not {"label", "mask"} & set(columns)
    findings = detect_finding_columns([cells for _, cells in rows]) if may_have_findings else ()
    has_columns = {"image", "subject"} <= set(columns)
    expected_columns = "image,subject"
    if kind == "labels":
        has_columns = bool({"image", "subject"} & set(columns)) and bool(
            {"label", "mask", "split", *findings} & set(columns)
        )
        expected_columns = "image or subject, and label or mask"
    if not has_columns:
        if from_user:
            hint = " Findings take two or more columns of 1, 0 and empty cells." if kind == "labels" else ""
            raise UserError(
                f"{path}: expected the columns {expected_columns}; got {', '.join(columns) or 'none'}.{hint}"
            )
        log.warning("%s is not used: it has no columns %s", path.name, expected_columns)
        return None
    if findings:
        log.info("%s: labels of %d findings: %s", path.name, len(findings), ", ".join(findings))
        for _, cells in rows:
            cells["label"] = format_findings({name: parse_finding(cells[name]) for name in findings}) or ""
    return CsvTable(path, rows, from_user)


def _clean_cell(text: str | None) -> str:
    """A cell; BIDS writes `n/a` where there is no value."""
    value = (text or "").strip()
    return "" if value == "n/a" else value


def check_participants(path: Path, subject_names: Iterable[Iterable[str | None]]) -> None:
    """Say in the log where a `participants.tsv` and the images of its tree do not cover each other, by count.

    Args:
        path: the table; of its columns only `participant_id` is looked at.
        subject_names: names (pseudonyms) of the subject of each image.
    """
    rows = csv.DictReader(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), delimiter="\t")
    participants = {make_pseudonym(str(row.get("participant_id") or "").strip()) for row in rows}
    subjects = {frozenset(name for name in names if name) for names in subject_names}
    n_unlisted = sum(not names & participants for names in subjects)
    n_absent = len(participants - frozenset().union(*subjects))
    if n_absent or n_unlisted:
        log.warning(
            "%s: %d of its %d participants have no image here; %d subjects with images are not in it",
            *(path.name, n_absent, len(participants), n_unlisted),
        )


class ImageMatcher:
    """Which images a cell of a table means.

    An image is meant by any ending of its path, with or without suffix (`a/b/scan.nii.gz`, `scan`), by the folder of
    its series, by its SeriesInstanceUID, by its item (`archive.npz#train/12`, `train/12`), or by its key in an index,
    where pseudonyms stand for parts of the path that hold an identity. A file of several volumes means them all,
    `scan.nii.gz#3` means one.
    """

    def __init__(self, images: Iterable[tuple[int, ImageInfo]]) -> None:
        self._indices_by_name: dict[str, set[int]] = defaultdict(set)
        self._file_by_index: dict[int, Path] = {}
        for index, image in images:
            self._file_by_index[index] = image.files[0]
            for name in _list_image_names(image):
                self._indices_by_name[name].add(index)

    @cached_property
    def _part_by_scrubbed_name(self) -> dict[str, str]:
        """What a part of a path is called where it holds an identity, to what it is."""
        return {
            scrubbed_name(part): part for part in {part for name in self._indices_by_name for part in name.split("/")}
        }

    def find_images(self, cell: str) -> set[int]:
        """The places of the images a cell may mean."""
        name = PurePosixPath(cell.replace("\\", "/")).as_posix().lstrip("/")
        if name not in self._indices_by_name and SCRUBBED_PREFIX.search(name):
            name = "/".join(self._part_by_scrubbed_name.get(part, part) for part in name.split("/"))
        return self._indices_by_name.get(name) or self._indices_by_name.get(make_pseudonym(cell), set())

    @property
    def indices(self) -> set[int]:
        """Of all the images."""
        return set(self._file_by_index)

    def get_files(self, indices: Iterable[int]) -> set[Path]:
        """The files of images."""
        return {self._file_by_index[index] for index in indices}


def _list_image_names(image: ImageInfo) -> Iterator[str]:
    path = image.files[0]
    in_archive = image.item is not None and "/" in image.item
    suffixes = [f"#{image.item}", f"/{image.item}"] if image.item else []
    suffixes += [] if in_archive else [""]
    yield from image.names
    if image.item and in_archive:
        yield image.item
    paths = [path, path.with_name(file_stem(path.name))] + ([path.parent] if len(image.files) > 1 else [])
    for name in paths:
        parts = name.parts[1:]
        for count in range(1, len(parts) + 1):
            for suffix in suffixes:
                yield "/".join(parts[-count:]) + suffix


def match_rows(
    table: CsvTable, matcher: ImageMatcher, by_subject: dict[str, set[int]]
) -> Iterator[tuple[int, dict[str, str], set[int]]]:
    """Each row of a table with the places of the images it means.

    Rows that mean none (their image was refused, or is not here) are counted in the log by line, never by name.

    Raises:
        UserError: a name means several images, or the user named the table and no row means any.
    """
    unmatched_lines: list[int] = []
    for line, cells in table.rows:
        image, subject = cells.get("image", ""), cells.get("subject", "")
        subject_indices = by_subject.get(subject) or by_subject.get(make_pseudonym(subject), set())
        indices = matcher.find_images(image) if image else subject_indices & matcher.indices
        if image and len(matcher.get_files(indices)) > 1:
            raise UserError(
                f"{table.path}, line {line}: expected the name of one image, got a name that matches "
                f"{len(indices)} images. Write more of its path."
            )
        if not indices:
            unmatched_lines.append(line)
            continue
        yield line, cells, indices
    if unmatched_lines and len(unmatched_lines) == len(table.rows) and table.from_user:
        raise UserError(
            f"{table.path}: expected names of images in the source; none of the {len(unmatched_lines)} rows means one. "
            "Write the path relative to the source, or the file's name."
        )
    if unmatched_lines:
        line_list = ", ".join(map(str, unmatched_lines[:5])) + (", ..." if len(unmatched_lines) > 5 else "")
        log.warning(
            "%s: %d of %d rows mean no image (lines %s)",
            table.path.name,
            len(unmatched_lines),
            len(table.rows),
            line_list,
        )


def merge_tables(
    tables: Sequence[tuple[CsvTable, ImageMatcher]], by_subject: dict[str, set[int]], columns: Sequence[str]
) -> dict[int, dict[str, tuple[str, CsvTable]]]:
    """What tables say of each image: column to cell, and the table it stands in.

    Raises:
        UserError: two rows contradict each other.
    """
    cells_by_image: dict[int, dict[str, tuple[str, CsvTable]]] = defaultdict(dict)
    for table, matcher in tables:
        for line, cells, indices in match_rows(table, matcher, by_subject):
            for index in indices:
                for column in columns:
                    cell = cells.get(column, "")
                    if cell and cells_by_image[index].setdefault(column, (cell, table))[0] != cell:
                        raise UserError(
                            f"{table.path}, line {line}: expected one {column} an image, got another one than before. "
                            "Remove the row that is wrong."
                        )
    return cells_by_image
