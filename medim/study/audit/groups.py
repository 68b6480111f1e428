"""Which group an image belongs to, as its header or a table of the user says; kept in memory, reported as counts."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medim.data.index.decathlon import file_stem
from medim.data.index.records import ImageRecord
from medim.evaluation.cases import CaseRow, summarise_cases
from medim.inference.network import ModelKind
from medim.metrics.bootstrap import MIN_SUBJECTS, Metric
from medim.privacy import make_pseudonym
from medim.types import UserError

Groups = dict[str, dict[str, str]]  # column: image key: value
MAX_NAMED_VALUES = 12  # values of a column that are written as they are


@dataclass(frozen=True)
class GroupMetrics:
    """A model's metrics on one group of the evaluation split.

    Attributes:
        model: whose.
        column: what the groups are by.
        value: the group.
        images: of it that were measured.
        subjects: of these.
        metrics: each value, ci_low, ci_high, n; None with fewer than five subjects, for which nothing is computed.
    """

    model: str
    column: str
    value: str
    images: int
    subjects: int
    metrics: dict[str, Metric] | None


def collect_header_groups(records: Sequence[ImageRecord]) -> Groups:
    """What the index knows: scanner, and field strength in tesla."""
    scanner = {record.image: record.scanner for record in records if record.scanner}
    tesla = {record.image: f"{record.field_strength:g} T" for record in records if record.field_strength is not None}
    return {name: values for name, values in (("scanner", scanner), ("field strength", tesla)) if values}


def read_groups(path: Path, records: Sequence[ImageRecord]) -> Groups:
    """Read groups from a table of the user.

    Args:
        path: CSV with a column `image` (an image's key, path, or file name with or without its suffix) or `subject`
            (as in `--subjects`, or the pseudonym), and any other columns: each is a way to group. Empty cells say
            nothing.
        records: the images.

    Raises:
        UserError: the table cannot be read, has no such columns, means no image, says two things of one, or a column
            tells subjects apart.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file (UTF-8) of groups, got {error}.") from error
    key = next((name for name in ("image", "subject") if name in columns), None)
    group_columns = [name for name in columns if name and name not in ("image", "subject")]
    if key is None or not group_columns:
        raise UserError(
            f"{path}: expected a column image or subject, and one or more columns to group by, got "
            f"{', '.join(columns) or 'none'}."
        )
    images_by_name = _index_images_by_name(records, key)
    groups: Groups = {name: {} for name in group_columns}
    for line, row in enumerate(rows, start=2):
        cell = (row[key] or "").strip()
        for image in images_by_name.get(cell) or images_by_name.get(make_pseudonym(cell)) or []:
            for name in group_columns:
                value = (row[name] or "").strip()
                if value and groups[name].setdefault(image, value) != value:
                    raise UserError(f"{path}, line {line}: expected one {name} an image, got another than before.")
    if not any(groups.values()):
        raise UserError(
            f"{path}: expected names of {key}s in the source; none of the {len(rows)} rows means one. Write them as "
            "in the column of the index, or as in --subjects."
        )
    subjects = {record.image: record.subject for record in records}
    for name, values in groups.items():
        _check_no_identity(path, name, values, subjects)
    return groups


def number_values(groups: Groups) -> Groups:
    """The same, where a column of more than twelve values has numbers for them: those may be dates or names."""
    result: Groups = {}
    for column, values in groups.items():
        names = sorted(set(values.values()))
        value_names = {
            name: name if len(names) <= MAX_NAMED_VALUES else f"value {n}" for n, name in enumerate(names, start=1)
        }
        result[column] = {image: value_names[value] for image, value in values.items()}
    return result


def compute_group_metrics(
    model: str, rows: Sequence[CaseRow], kind: ModelKind, classes: Sequence[str], groups: Groups, *, seed: int = 0
) -> list[GroupMetrics]:
    """The metrics of a model's cases, group by group; small groups are named, not computed.

    Args:
        model: its name.
        rows: of `medim.evaluation.cases`.
        kind: the model's.
        classes: the model's.
        groups: of the images, as far as they are known.
        seed: of the bootstrap.
    """
    valid_rows = [row for row in rows if not row.get("rejected")]
    results = []
    for column, image_values in groups.items():
        for value in sorted({image_values[row["image"]] for row in valid_rows if row["image"] in image_values}):
            group_rows = [row for row in valid_rows if image_values.get(row["image"]) == value]
            images, subjects = len({row["image"] for row in group_rows}), len({row["subject"] for row in group_rows})
            is_small = subjects < MIN_SUBJECTS
            metrics = None if is_small else summarise_cases(group_rows, kind, classes, seed=seed)["metrics"]
            results.append(GroupMetrics(model, column, value, images, subjects, metrics))
    return results


def usable_groups(
    values: Mapping[str, str], train: Sequence[ImageRecord], val: Sequence[ImageRecord]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The groups that a probe can tell apart: five subjects or more on both sides; and those that are too small."""

    def count_subjects(records: Sequence[ImageRecord]) -> Counter[str]:
        return Counter(value for value, _ in {(values[r.image], r.subject) for r in records if r.image in values})

    split_counts = count_subjects(train), count_subjects(val)
    names = sorted(split_counts[0] | split_counts[1])
    usable = tuple(name for name in names if min(counts[name] for counts in split_counts) >= MIN_SUBJECTS)
    return usable, tuple(name for name in names if name not in usable)


def _check_no_identity(path: Path, column: str, values: Mapping[str, str], subjects: Mapping[str, str]) -> None:
    """Refuse a column whose values each mean one subject; of more than twelve, where most do.

    Raises:
        UserError: it is one.
    """
    subjects_by_value: dict[str, set[str]] = {}
    for image, value in values.items():
        subjects_by_value.setdefault(value, set()).add(subjects[image])
    single_count = sum(len(members) == 1 for members in subjects_by_value.values())
    if single_count > 1 and (
        single_count == len(subjects_by_value)
        or (len(subjects_by_value) > MAX_NAMED_VALUES and 2 * single_count > len(subjects_by_value))
    ):
        raise UserError(
            f"{path}: expected groups of several subjects in column {column}, but {single_count} of its "
            f"{len(subjects_by_value)} values "
            "stand for one subject each, as a name, number or date would. Leave the column out, or join its values."
        )


def _index_images_by_name(records: Sequence[ImageRecord], key: str) -> dict[str, list[str]]:
    """What a cell may hold, to the image keys it means."""
    images_by_name: dict[str, list[str]] = {}
    for record in records:
        path = PurePosixPath(record.path)
        names = {record.subject} if key == "subject" else {record.image, record.path, path.name, file_stem(path.name)}
        for name in names:
            images_by_name.setdefault(name, []).append(record.image)
    return images_by_name
