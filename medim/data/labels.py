"""Multi-label findings of an image, encoded in the single column `label` of an index.

`+edema|-effusion|?mass` means that edema is present, effusion is absent, and mass is unknown. A label of this form
contains two or more findings; any other label is a class.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from medim.types import UserError

log = logging.getLogger(__name__)
Findings = Mapping[str, bool | None]  # name to present, absent, or unknown (None)
_SIGNS = {True: "+", False: "-", None: "?"}
_PRESENCE_BY_SIGN = {sign: presence for presence, sign in _SIGNS.items()}
_LABEL_PATTERN = re.compile(r"[+?-][^|]+(\|[+?-][^|]+)+")
_KEY_COLUMNS = {"image", "subject", "split"}
_ABSENCES = {"no finding", "no findings", "normal"}  # cells without any of the findings of a table
_MISSING = {"", "n/a", "na", "#n/a", "<na>", "nan", "nat", "none", "null", "nil", "-", "--", "?", "."}
_UNCERTAIN = -1.0  # code of an uncertain finding in CheXpert and MIMIC-CXR


def format_findings(findings: Findings) -> str | None:
    """Encode the findings of an image as a label; None if all are unknown.

    Raises:
        UserError: a name is empty or contains '|'.
    """
    invalid_name = next((name for name in findings if not name or "|" in name), None)
    if invalid_name is not None:
        raise UserError(f"finding {invalid_name!r}: expected a name without '|'. Rename the column.")
    if all(presence is None for presence in findings.values()):
        return None
    return "|".join(f"{_SIGNS[presence]}{name}" for name, presence in findings.items())


@lru_cache(maxsize=4096)
def parse_findings(label: str | None) -> Findings | None:
    """Decode the findings of a label; None if it is a class or missing."""
    if label is None or not _LABEL_PATTERN.fullmatch(label):
        return None
    return {part[1:]: _PRESENCE_BY_SIGN[part[0]] for part in label.split("|")}


def finding_names(labels: Iterable[str | None]) -> tuple[str, ...]:
    """List the findings in labels, in order of the labels; an empty tuple if any label is a class."""
    findings_per_label = [parse_findings(label) for label in sorted({label for label in labels if label is not None})]
    return (
        tuple(dict.fromkeys(name for findings in findings_per_label for name in findings or ()))
        if all(findings_per_label)
        else ()
    )


def check_label_kind(labels: Iterable[str | None]) -> None:
    """Reject a mixture of class labels and findings, such as from two sources in one folder.

    Raises:
        UserError: both kinds occur.
    """
    all_labels = {label for label in labels if label is not None}
    finding_labels = {label for label in all_labels if parse_findings(label)}
    if finding_labels and finding_labels != all_labels:
        raise UserError(
            f"labels: expected classes or findings, got both: {min(all_labels - finding_labels)!r} and "
            f"{min(finding_labels)!r}. "
            "Use one kind of label (--labels CSV), or index the sources separately."
        )


def encode_findings(label: str | None, names: Iterable[str]) -> list[float]:
    """Encode the presence of each named finding: 1 present, 0 absent, NaN unknown or not in the label."""
    findings = parse_findings(label) or {}
    return [math.nan if (value := findings.get(name)) is None else float(value) for name in names]


def count_labels(labels: Iterable[str | None]) -> Counter[str]:
    """Count the images with each class, or with each positive finding."""
    return Counter(name for label in labels if label is not None for name in _list_positives(label))


def stratification_labels(labels: Sequence[Iterable[str]]) -> list[tuple[str, ...]]:
    """Choose the stratification labels of each subject: all its classes, or only its rarest finding."""
    present = [{name for label in subject_labels for name in _list_positives(label)} for subject_labels in labels]
    if not any(parse_findings(label) for subject_labels in labels for label in subject_labels):
        return [tuple(sorted(subject_labels)) for subject_labels in present]
    image_counts = Counter(name for subject_labels in present for name in subject_labels)
    return [
        tuple(sorted(subject_labels, key=lambda name: (image_counts[name], name))[:1]) for subject_labels in present
    ]


def is_missing(cell: str) -> bool:
    """Whether a table cell is a missing value, in one of the usual spellings.

    Examples:
        >>> [is_missing(cell) for cell in ("", "NaN", " null", "0", "nothing")]
        [True, True, True, False, False]
    """
    return cell.strip().lower() in _MISSING


def unify_labels(labels: Sequence[str | None]) -> list[str | None]:
    """Unify labels that differ only in case or blanks, and split lists of findings as in `edema|mass`.

    A list of findings contains those that are present, as in the tables of ChestX-ray14; all other findings of the
    labels are absent. `No Finding` and `normal` are then lists without any. The log reports what was changed.

    Returns:
        The labels in their order: classes, or findings in the form of `format_findings`.

    Raises:
        UserError: a list of findings contains another one and `No Finding`.

    Examples:
        >>> unify_labels(["edema|mass", "mass", "No Finding", None])
        ['+edema|+mass', '-edema|+mass', '-edema|-mass', None]
    """
    is_list = any(label is not None and "|" in label and not parse_findings(label) for label in labels)
    if is_list and any(parse_findings(label) for label in labels):
        return list(labels)  # `check_label_kind` reports the mixture
    cells = [None if label is None else _split_label(label, is_list=is_list) for label in labels]
    spellings = _unify_spellings(part for parts in cells if parts for part in parts)
    unified = [None if parts is None else [spellings[part] for part in parts] for parts in cells]
    if not is_list:
        return [None if parts is None else parts[0] for parts in unified]
    absences = {name for name in spellings.values() if name.lower() in _ABSENCES}
    names = sorted({name for parts in unified if parts for name in parts} - absences)
    for parts in unified:
        if parts and absences & set(parts) and len(set(parts)) > 1:
            raise UserError(f"labels: expected a list of findings, got {'|'.join(parts)!r}. Correct the label column.")
    log.info(
        "several findings in one label: split at '|' into %d findings (%s); findings that a label does not list are "
        "absent%s",
        len(names),
        ", ".join(names),
        f", and {' and '.join(map(repr, sorted(absences)))} lists none" if absences else "",
    )
    if len(names) < 2:
        raise UserError(f"labels: expected two or more findings in labels with '|', got {', '.join(names) or 'none'}.")
    return [None if parts is None else format_findings({name: name in parts for name in names}) for parts in unified]


def _split_label(label: str, *, is_list: bool) -> list[str]:
    """Split a label into findings, without empty ones; a class, and findings with signs, are one part."""
    parts = [part.strip() for part in label.split("|")] if is_list else [label]
    return list(dict.fromkeys(part for part in parts if part)) or [label]


def _unify_spellings(names: Iterable[str]) -> dict[str, str]:
    """Map each name to the most frequent spelling of those that differ only in case, blanks or decimals."""
    counts = Counter(names)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        groups[name if parse_findings(name) else _spelling_key(name)].append(name)
    for spellings in groups.values():
        if len(spellings) > 1:
            log.warning(
                "the labels %s differ only in case, blanks or decimals and count as one class, %r. Correct the labels "
                "if they are several",
                ", ".join(f"{name!r} ({counts[name]} images)" for name in spellings),
                spellings[0],
            )
    return {name: spellings[0] for spellings in groups.values() for name in spellings}


def _spelling_key(name: str) -> str:
    if re.fullmatch(r"\d+\.0*", name):  # a class number that a spreadsheet has written with decimals
        return str(int(float(name)))
    return re.sub(r"\s+", " ", name.strip()).casefold()


def parse_finding(cell: str) -> bool | None:
    """Parse a table cell: 1 present, 0 absent; a missing value (`is_missing`) or -1 (uncertain) unknown.

    Raises:
        ValueError: the cell has another value.
    """
    number = math.nan if is_missing(cell) else float(cell)
    if math.isnan(number) or number == _UNCERTAIN:
        return None
    if number not in (0.0, 1.0):
        raise ValueError(cell)
    return number == 1.0


def detect_finding_columns(rows: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Detect the columns of a label table that contain findings only; an empty tuple if fewer than two do."""

    def is_finding_column(column: str) -> bool:
        """Whether all cells are valid findings, and at least one is not unknown."""
        try:
            presences = [parse_finding(row[column]) for row in rows]
        except (ValueError, KeyError):
            return False
        return any(cell is not None for cell in presences)

    columns = tuple(
        column for column in (rows[0] if rows else ()) if column not in _KEY_COLUMNS and is_finding_column(column)
    )
    return columns if len(columns) > 1 else ()


def _list_positives(label: str) -> list[str]:
    findings = parse_findings(label)
    return [label] if findings is None else [name for name, is_positive in findings.items() if is_positive]
