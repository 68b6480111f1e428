"""Which group an image belongs to, as its header or a table of the user says; kept in memory, reported as counts."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medim.data.index.decathlon import stem
from medim.data.index.records import Record
from medim.evaluation.cases import Row, summarise
from medim.inference.network import Kind
from medim.metrics.bootstrap import MIN_SUBJECTS, Metric
from medim.privacy import pseudonym
from medim.types import UserError

Groups = dict[str, dict[str, str]]  # column: image key: value
MOST_NAMED = 12  # values of a column that are written as they are


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


def groups_of_headers(records: Sequence[Record]) -> Groups:
    """What the index knows: scanner, and field strength in tesla."""
    scanner = {record.image: record.scanner for record in records if record.scanner}
    tesla = {record.image: f"{record.field_strength:g} T" for record in records if record.field_strength is not None}
    return {name: values for name, values in (("scanner", scanner), ("field strength", tesla)) if values}


def read_groups(path: Path, records: Sequence[Record]) -> Groups:
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
    wanted = [name for name in columns if name and name not in ("image", "subject")]
    if key is None or not wanted:
        raise UserError(
            f"{path}: expected a column image or subject, and one or more columns to group by, got "
            f"{', '.join(columns) or 'none'}."
        )
    places = _places(records, key)
    found: Groups = {name: {} for name in wanted}
    for line, row in enumerate(rows, start=2):
        cell = (row[key] or "").strip()
        for image in places.get(cell) or places.get(pseudonym(cell)) or []:
            for name in wanted:
                value = (row[name] or "").strip()
                if value and found[name].setdefault(image, value) != value:
                    raise UserError(f"{path}, line {line}: expected one {name} an image, got another than before.")
    if not any(found.values()):
        raise UserError(
            f"{path}: expected names of {key}s in the source; none of the {len(rows)} rows means one. Write them as "
            "in the column of the index, or as in --subjects."
        )
    subjects = {record.image: record.subject for record in records}
    for name, values in found.items():
        _check_no_identity(path, name, values, subjects)
    return found


def numbered(groups: Groups) -> Groups:
    """The same, where a column of more than twelve values has numbers for them: those may be dates or names."""
    found: Groups = {}
    for column, values in groups.items():
        names = sorted(set(values.values()))
        called = {name: name if len(names) <= MOST_NAMED else f"value {n}" for n, name in enumerate(names, start=1)}
        found[column] = {image: called[value] for image, value in values.items()}
    return found


def per_group(
    model: str, rows: Sequence[Row], kind: Kind, classes: Sequence[str], groups: Groups, *, seed: int = 0
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
    used = [row for row in rows if not row.get("rejected")]
    found = []
    for column, of in groups.items():
        for value in sorted({of[row["image"]] for row in used if row["image"] in of}):
            own = [row for row in used if of.get(row["image"]) == value]
            images, subjects = len({row["image"] for row in own}), len({row["subject"] for row in own})
            few = subjects < MIN_SUBJECTS
            metrics = None if few else summarise(own, kind, classes, seed=seed)["metrics"]
            found.append(GroupMetrics(model, column, value, images, subjects, metrics))
    return found


def told_apart(
    values: Mapping[str, str], train: Sequence[Record], val: Sequence[Record]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The groups that a probe can tell apart: five subjects or more on both sides; and those that are too small."""

    def subjects(records: Sequence[Record]) -> Counter[str]:
        return Counter(value for value, _ in {(values[r.image], r.subject) for r in records if r.image in values})

    sides = subjects(train), subjects(val)
    names = sorted(sides[0] | sides[1])
    kept = tuple(name for name in names if min(side[name] for side in sides) >= MIN_SUBJECTS)
    return kept, tuple(name for name in names if name not in kept)


def _check_no_identity(path: Path, column: str, values: Mapping[str, str], subjects: Mapping[str, str]) -> None:
    """Refuse a column whose values each mean one subject; of more than twelve, where most do.

    Raises:
        UserError: it is one.
    """
    whose: dict[str, set[str]] = {}
    for image, value in values.items():
        whose.setdefault(value, set()).add(subjects[image])
    single = sum(len(of) == 1 for of in whose.values())
    if single > 1 and (single == len(whose) or (len(whose) > MOST_NAMED and 2 * single > len(whose))):
        raise UserError(
            f"{path}: expected groups of several subjects in column {column}, but {single} of its {len(whose)} values "
            "stand for one subject each, as a name, number or date would. Leave the column out, or join its values."
        )


def _places(records: Sequence[Record], key: str) -> dict[str, list[str]]:
    """What a cell may hold, to the image keys it means."""
    places: dict[str, list[str]] = {}
    for record in records:
        path = PurePosixPath(record.path)
        names = {record.subject} if key == "subject" else {record.image, record.path, path.name, stem(path.name)}
        for name in names:
            places.setdefault(name, []).append(record.image)
    return places
