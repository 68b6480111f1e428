"""CSV tables to join to images: labels, masks, splits and subjects."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import get_args

from medim.data.index.decathlon import file_stem
from medim.data.labels import detect_finding_columns, format_findings, is_missing, parse_finding
from medim.data.readers.inspection import ImageInfo
from medim.parsing import read_csv
from medim.privacy import format_path, hide_name, make_pseudonym, scrubbed_name
from medim.types import Split, UserError

log = logging.getLogger(__name__)
SCRUBBED_PREFIX = re.compile(r"(?:^|/)p-[0-9a-f]{12}")

SPLIT_NAMES: dict[str, Split] = {  # of folders and cells, in lower case
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
COLUMN_OPTIONS = {"image": "--image-column", "label": "--label-column", "subject": "--subject-column"}
_COLUMN_NAMES = {  # other names of columns in use, the first that a table has counts
    "image": ("image_index", "image_path", "image_name", "filename", "file_name", "file", "path", "filepath"),
    "subject": ("subject_id", "participant_id", "patient_id", "patientid", "participant", "patient"),
    "label": ("finding_labels", "class", "class_name", "category", "target"),
    "mask": ("mask_path", "segmentation"),
}


@dataclass(frozen=True)
class TableFile:
    """A CSV file of labels or subjects, with the names of its columns where they are unusual.

    Attributes:
        path: path of the file.
        columns: name in the file by the name of medim: `image`, `label`, `subject`, `mask` or `split`.

    Examples:
        >>> TableFile(Path("labels.csv"), {"label": "Diagnosis 2"}).columns["label"]
        'Diagnosis 2'
    """

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Path | TableFile) -> TableFile:
        """Return a table, or that of a path, with a resolved path."""
        file = table if isinstance(table, TableFile) else cls(table)
        return cls(file.path.resolve(), file.columns)


@dataclass(frozen=True)
class CsvTable:
    """Rows of a CSV file.

    Attributes:
        path: path of the file.
        rows: line number and cells by column name (lower case).
        from_user: whether the user gave the table. A table found in the source is used only as far as it matches.
    """

    path: Path
    rows: tuple[tuple[int, dict[str, str]], ...]
    from_user: bool

    def find_mask(self, cell: str, root: Path) -> Path | None:
        """Find the file of a `mask` cell, relative to the table or to the source."""
        for path in (self.path.parent / cell, root / cell):
            try:
                if path.is_file():
                    return path.parent.resolve() / path.name  # as in `walk`, a link to a file is not resolved
            except OSError:  # the cell is too long for a path
                continue
        return None


def read_table(file: TableFile, kind: str, *, from_user: bool) -> CsvTable | None:
    """Read a table of labels or subjects.

    Args:
        file: CSV with a header line, separated by comma, semicolon or tab. A BIDS `participants.tsv` with a suitable
            column is accepted too; its `participant_id` is the subject.
        kind: "labels" (columns `image` or `subject`, and `label`, `mask` or `split`; a table given by the user may
            have one column per finding with 1, 0 and empty cells in place of `label`) or "subjects" (columns `image`,
            `subject`).
        from_user: whether the user gave the table.

    Returns:
        The table, or None if a table found in the source has other columns.

    Raises:
        UserError: a table given by the user is missing or has other columns.
    """
    path = file.path
    try:
        content = read_csv(path, delimiters=",;\t", complete=False, remedy=f"Check --{kind}.", place=format_path(path))
    except FileNotFoundError:
        raise UserError(f"{format_path(path)}: no such file. Check --{kind}.") from None
    except OSError as error:
        raise UserError(f"{format_path(path)}: cannot be read ({error.strerror}). Check --{kind}.") from error
    columns = _name_columns(content.columns, file)
    numbered_rows = (
        (line, {name: _clean_cell(row[key], name) for key, name in zip(content.columns, columns, strict=True) if name})
        for line, row in zip(content.lines, content, strict=True)
    )
    rows = tuple(row for row in numbered_rows if any(row[1].values()))
    if "label" in columns:
        _report_missing_labels(path, [row[content.columns[columns.index("label")]] for row in content])
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
            hint = " Findings need two or more columns of 1, 0 and empty cells." if kind == "labels" else ""
            hint += f" Other columns are named with {', '.join(COLUMN_OPTIONS.values())}."
            raise UserError(
                f"{format_path(path)}: expected the columns {expected_columns}; got "
                f"{', '.join(map(hide_name, map(str.strip, content.columns))) or 'none'}.{hint}"
            )
        log.warning("%s is ignored: it does not have the columns %s", format_path(path.name), expected_columns)
        return None
    for line, cells in rows:
        if "split" in cells:
            cells["split"] = parse_split(cells["split"], f"{format_path(path)}, line {line}")
    if findings:
        log.info("%s: labels of %d findings: %s", format_path(path.name), len(findings), ", ".join(findings))
        for _, cells in rows:
            cells["label"] = format_findings({name: parse_finding(cells[name]) for name in findings}) or ""
    return CsvTable(path, rows, from_user)


def parse_split(cell: str, place: str) -> str:
    """Parse the name of a split in any usual spelling; empty for an empty cell.

    Raises:
        UserError: the name is unknown.

    Examples:
        >>> parse_split("Training", "labels.csv, line 2")
        'train'
    """
    split = SPLIT_NAMES.get(cell.lower(), "")
    if cell and not split:
        others = ", ".join(sorted(SPLIT_NAMES.keys() - get_args(Split)))
        raise UserError(
            f"{place}: expected split train, val or test (or {others}), "
            f"got {hide_name(cell)!r}. Correct the cell, or rename the column."
        )
    return split


def _name_columns(names: Sequence[str], file: TableFile) -> list[str]:
    """Translate the usual names of columns: `Patient ID` becomes `subject`, unless there is a column `subject`.

    Examples:
        >>> _name_columns(["Image Index", "Finding Labels", "Patient ID", "Age"], TableFile(Path("labels.csv")))
        ['image', 'label', 'subject', 'age']
    """
    columns = [name.strip().lower() for name in names]
    for column, name in file.columns.items():
        _check_column(name, columns, file, COLUMN_OPTIONS.get(column, column))
        columns = [f"other {column}" if other == column else other for other in columns]
        columns[[other.strip().lower() for other in names].index(name.strip().lower())] = column
    spellings = [re.sub(r"[\s_-]+", "_", name) for name in columns]
    for column, other_names in _COLUMN_NAMES.items():
        other_name = next((name for name in other_names if name in spellings), None)
        if column not in columns and other_name is not None:
            columns[spellings.index(other_name)] = column
    return columns


def _check_column(name: str, columns: Sequence[str], file: TableFile, option: str) -> None:
    """Check that a table has a column that an option names.

    Raises:
        UserError: it has not, or has it twice.
    """
    count = columns.count(name.strip().lower())
    if count != 1:
        close = get_close_matches(name.strip().lower(), columns, n=1)
        hint = f" Did you mean {hide_name(close[0])!r}?" if close else ""
        raise UserError(
            f"{option} {name}: expected one column of this name in {format_path(file.path)}, got {count}.{hint} "
            f"Columns: {', '.join(map(hide_name, columns))}."
        )


def _clean_cell(text: str | None, column: str) -> str:
    """Clean a cell; a missing value becomes an empty text. A file may be called `none`."""
    value = (text or "").strip()
    return "" if value == "n/a" or (column != "image" and is_missing(value)) else value


def _report_missing_labels(path: Path, cells: Iterable[str | None]) -> None:
    """Log how many labels are missing values that are written as a word."""
    counts = Counter(cell.strip() for cell in cells if cell and cell.strip() and is_missing(cell))
    if counts:
        log.warning(
            "%s: %d labels count as missing (%s). If this is a class, give it another name",
            *(format_path(path.name), counts.total(), ", ".join(f"{name} {n}" for name, n in counts.most_common())),
        )


def check_participants(path: Path, subject_names: Iterable[Iterable[str | None]]) -> None:
    """Log by how many subjects a `participants.tsv` and the images of its tree differ.

    Args:
        path: the table; only its column `participant_id` is read.
        subject_names: names (pseudonyms) of the subject of each image.
    """
    try:
        rows = read_csv(path, delimiters="\t", complete=False, place=format_path(path))
    except UserError as error:
        log.warning("participants are not compared with the images: %s", error)
        return
    participants = {make_pseudonym(row.get("participant_id", "").strip()) for row in rows}
    subjects = {frozenset(name for name in names if name) for names in subject_names}
    n_unlisted = sum(not names & participants for names in subjects)
    n_absent = len(participants - frozenset().union(*subjects))
    if n_absent or n_unlisted:
        log.warning(
            "%s: %d of its %d participants have no image; %d subjects with images are not listed in it",
            *(path.name, n_absent, len(participants), n_unlisted),
        )


class ImageMatcher:
    """Lookup of the images that a table cell refers to.

    A cell refers to an image by any ending of its path, with or without suffix (`a/b/scan.nii.gz`, `scan`), by the
    folder of its series, by its SeriesInstanceUID, by its item (`archive.npz#train/12`, `train/12`), or by its key in
    an index, in which identifying parts of the path are replaced by pseudonyms. The name of a file with several
    volumes refers to all of them, `scan.nii.gz#3` to one.
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
        """Map scrubbed path parts to the real ones."""
        return {
            scrubbed_name(part): part for part in {part for name in self._indices_by_name for part in name.split("/")}
        }

    def find_images(self, cell: str) -> set[int]:
        """Find the indices of the images that a cell may refer to."""
        name = PurePosixPath(cell.replace("\\", "/")).as_posix().lstrip("/")
        if name not in self._indices_by_name and SCRUBBED_PREFIX.search(name):
            name = "/".join(self._part_by_scrubbed_name.get(part, part) for part in name.split("/"))
        return self._indices_by_name.get(name) or self._indices_by_name.get(make_pseudonym(cell), set())

    @property
    def indices(self) -> set[int]:
        """Indices of all images."""
        return set(self._file_by_index)

    def get_files(self, indices: Iterable[int]) -> set[Path]:
        """Return the files of images."""
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
    """Yield each row of a table with the indices of the matching images.

    Rows without a match (the image was rejected or is not in the source) are logged by line number, never by name.

    Raises:
        UserError: a name matches several images, or no row of a table given by the user matches an image.
    """
    unmatched_lines: list[int] = []
    for line, cells in table.rows:
        image, subject = cells.get("image", ""), cells.get("subject", "")
        subject_indices = by_subject.get(subject) or by_subject.get(make_pseudonym(subject), set())
        indices = matcher.find_images(image) if image else subject_indices & matcher.indices
        if image and len(matcher.get_files(indices)) > 1:
            raise UserError(
                f"{format_path(table.path)}, line {line}: expected the name of one image, got a name that matches "
                f"{len(indices)} images. Give more of its path."
            )
        if not indices:
            unmatched_lines.append(line)
            continue
        yield line, cells, indices
    if unmatched_lines and len(unmatched_lines) == len(table.rows) and table.from_user:
        raise UserError(
            f"{format_path(table.path)}: expected names of images in the source; none of the "
            f"{len(unmatched_lines)} rows matches. Give the path relative to the source, or the file name."
        )
    if unmatched_lines:
        line_list = ", ".join(map(str, unmatched_lines[:5])) + (", ..." if len(unmatched_lines) > 5 else "")
        log.warning(
            "%s: %d of %d rows do not match any image (lines %s)",
            format_path(table.path.name),
            len(unmatched_lines),
            len(table.rows),
            line_list,
        )


def merge_tables(
    tables: Sequence[tuple[CsvTable, ImageMatcher]], by_subject: dict[str, set[int]], columns: Sequence[str]
) -> dict[int, dict[str, tuple[str, CsvTable]]]:
    """Merge the cells of all tables per image: column to cell, with the table it is from.

    Raises:
        UserError: two rows are contradictory.
    """
    cells_by_image: dict[int, dict[str, tuple[str, CsvTable]]] = defaultdict(dict)
    for table, matcher in tables:
        for line, cells, indices in match_rows(table, matcher, by_subject):
            for index in indices:
                for column in columns:
                    cell = cells.get(column, "")
                    if cell and cells_by_image[index].setdefault(column, (cell, table))[0] != cell:
                        raise UserError(
                            f"{format_path(table.path)}, line {line}: expected one {column} per image, but an "
                            "earlier row has another one. Remove the wrong row."
                        )
    return cells_by_image
