"""Groups of images from their headers or from a table of the user; only counts and metrics per group are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medim.data.index.decathlon import file_stem
from medim.data.index.records import ImageRecord
from medim.data.index.tables import SCRUBBED_PREFIX
from medim.evaluation.cases import summarise_cases
from medim.metrics.bootstrap import MIN_SUBJECTS, MetricEstimate
from medim.neutral_names import is_neutral_name
from medim.parsing import read_csv
from medim.privacy import format_path, hide_name, make_pseudonym, scrubbed_name
from medim.tasks.task import CaseRow
from medim.types import UserError

Groups = dict[str, dict[str, str]]  # value by image key, by column
MAX_NAMED_VALUES = 12  # largest number of values of a column that are written by name


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """Metrics of a model on one group of the evaluation split.

    Attributes:
        model: name of the model.
        column: variable that defines the groups.
        value: value of the group.
        images: number of images of the group in the evaluation split.
        subjects: number of subjects of these images.
        metrics: for each metric value, ci_low, ci_high and n; None for fewer than five subjects, where nothing is
            computed.
    """

    model: str
    column: str
    value: str
    images: int
    subjects: int
    metrics: dict[str, MetricEstimate] | None


def collect_header_groups(records: Sequence[ImageRecord]) -> Groups:
    """Collect the groups of the index: scanner, and field strength in tesla."""
    scanner = {record.image: record.scanner for record in records if record.scanner}
    tesla = {record.image: f"{record.field_strength:g} T" for record in records if record.field_strength is not None}
    return {name: values for name, values in (("scanner", scanner), ("field strength", tesla)) if values}


def read_groups(path: Path, records: Sequence[ImageRecord]) -> Groups:
    """Read groups from a table of the user.

    Args:
        path: CSV file with a column `image` (key, path, or file name of an image, with or without suffix) or `subject`
            (as in `--subjects`, or the pseudonym), and other columns; each of these defines groups. Empty cells are
            ignored.
        records: images of the index.

    Returns:
        The groups. If a value of a column is not neutral (`medim.neutral_names`), such as a physician, all values of
        the column are replaced by numbers.

    Raises:
        UserError: the table cannot be read, lacks the columns, matches no image, has two values for one image, or has a
            column that identifies subjects.
    """
    try:
        content = read_csv(path, complete=False, remedy="Check --groups.", place=format_path(path))
    except OSError as error:
        raise UserError(f"{format_path(path)}: cannot be read ({error.strerror}). Check --groups.") from error
    columns = content.columns
    key = next((name for name in ("image", "subject") if name in columns), None)
    group_columns = [name for name in columns if name and name not in ("image", "subject")]
    if key is None or not group_columns:
        raise UserError(
            f"{format_path(path)}: expected a column image or subject, and one or more columns to group by, got "
            f"{', '.join(map(hide_name, columns)) or 'none'}."
        )
    images_by_name = _index_images_by_name(records, key)
    groups: Groups = {name: {} for name in group_columns}
    for line, row in zip(content.lines, content, strict=True):
        cell = (row[key] or "").strip()
        name_of_cell = cell if key == "subject" else _hide_all_parts(cell)
        for image in images_by_name.get(name_of_cell) or images_by_name.get(make_pseudonym(cell)) or []:
            for name in group_columns:
                value = (row[name] or "").strip()
                if value and groups[name].setdefault(image, value) != value:
                    raise UserError(
                        f"{format_path(path)}, line {line}: expected one {name} per image, got a second value."
                    )
    if not any(groups.values()):
        raise UserError(
            f"{format_path(path)}: none of the {len(content.rows)} rows matches the {key} of an image in the index. "
            f"Write each {key} as in that column of the index, or as in --subjects."
        )
    subjects = {record.image: record.subject for record in records}
    for name, values in groups.items():
        _check_no_identity(path, name, values, subjects)
    return {
        name: values if all(map(is_neutral_name, values.values())) else _number(values)
        for name, values in groups.items()
    }


def number_values(groups: Groups) -> Groups:
    """Replace the values of columns with more than twelve values by numbers, because they may be dates or names."""
    return {
        column: values if len(set(values.values())) <= MAX_NAMED_VALUES else _number(values)
        for column, values in groups.items()
    }


def _number(values: dict[str, str]) -> dict[str, str]:
    """Replace values by `value 1`, `value 2`, ... in the order of their first rows, which is that of the table."""
    numbers = {value: f"value {number}" for number, value in enumerate(dict.fromkeys(values.values()), start=1)}
    return {image: numbers[value] for image, value in values.items()}


def compute_group_metrics(
    model: str, rows: Sequence[CaseRow], kind: str, classes: Sequence[str], groups: Groups, *, seed: int = 0
) -> list[GroupMetrics]:
    """Compute the metrics of the cases of a model by group; groups that are too small are listed without metrics.

    Args:
        model: name of the model.
        rows: rows of `medim.evaluation.cases`.
        kind: kind of the model.
        classes: classes of the model.
        groups: groups of the images, as far as known.
        seed: random seed of the bootstrap.
    """
    valid_rows = [row for row in rows if not row.get("rejected")]
    results = []
    for column, image_values in groups.items():
        for value in sorted({image_values[row["image"]] for row in valid_rows if row["image"] in image_values}):
            group_rows = [row for row in valid_rows if image_values.get(row["image"]) == value]
            images, subjects = len({row["image"] for row in group_rows}), len({row["subject"] for row in group_rows})
            is_small = subjects < MIN_SUBJECTS
            metrics = None if is_small else summarise_cases(group_rows, kind, classes, seed=seed)["metrics"]
            results.append(
                GroupMetrics(model=model, column=column, value=value, images=images, subjects=subjects, metrics=metrics)
            )
    return results


def usable_groups(
    values: Mapping[str, str], train: Sequence[ImageRecord], val: Sequence[ImageRecord]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the groups with five or more subjects in both splits, and the groups that are too small for a probe."""

    def count_subjects(records: Sequence[ImageRecord]) -> Counter[str]:
        return Counter(value for value, _ in {(values[r.image], r.subject) for r in records if r.image in values})

    split_counts = count_subjects(train), count_subjects(val)
    names = sorted(split_counts[0] | split_counts[1])
    usable = tuple(name for name in names if min(counts[name] for counts in split_counts) >= MIN_SUBJECTS)
    return usable, tuple(name for name in names if name not in usable)


def _check_no_identity(path: Path, column: str, values: Mapping[str, str], subjects: Mapping[str, str]) -> None:
    """Reject a column in which each value belongs to one subject, or most values if there are more than twelve.

    Raises:
        UserError: the column identifies subjects.
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
            f"{format_path(path)}: column {column} may identify subjects: {single_count} of its "
            f"{len(subjects_by_value)} values belong to one subject each, like names, numbers or dates. "
            "Remove the column, or merge its values."
        )


def _index_images_by_name(records: Sequence[ImageRecord], key: str) -> dict[str, list[str]]:
    """Map each text that may name an image or subject in a cell to the image keys."""
    images_by_name: dict[str, list[str]] = {}
    for record in records:
        path = PurePosixPath(record.path)
        names = {record.subject} if key == "subject" else {record.image, record.path, path.name, file_stem(path.name)}
        for name in names if key == "subject" else set(map(_hide_all_parts, names)):
            images_by_name.setdefault(name, []).append(record.image)
    return images_by_name


def _hide_all_parts(path: str) -> str:
    """Replace all parts of a path by pseudonyms, so that a real path equals that of an index."""
    parts = path.replace("\\", "/").split("/")
    return "/".join(part if SCRUBBED_PREFIX.match(part) else scrubbed_name(part) for part in parts)
