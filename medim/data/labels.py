"""Several findings an image, in the one column `label` of an index.

`+edema|-effusion|?mass` says that there is edema, that there is no effusion, and that nothing is known of a mass. Two
findings or more make a label of this form; any other label is a class.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from medim.types import UserError

Findings = Mapping[str, bool | None]  # name to present, absent, or unknown (None)
_SIGNS = {True: "+", False: "-", None: "?"}
_TOLD = {sign: told for told, sign in _SIGNS.items()}
_FORM = re.compile(r"[+?-][^|]+(\|[+?-][^|]+)+")
_KEYS = {"image", "subject", "split"}
_UNSURE = -1.0  # how CheXpert and MIMIC-CXR write that the report is uncertain


def label_of(findings: Findings) -> str | None:
    """The label of an image; None where nothing is known of it.

    Raises:
        UserError: a name is empty or holds a bar.
    """
    wrong = next((name for name in findings if not name or "|" in name), None)
    if wrong is not None:
        raise UserError(f"finding {wrong!r}: expected a name without '|'. Rename the column.")
    if all(told is None for told in findings.values()):
        return None
    return "|".join(f"{_SIGNS[told]}{name}" for name, told in findings.items())


@lru_cache(maxsize=4096)
def findings_of(label: str | None) -> Findings | None:
    """What a label says of each finding; None where it is a class, or missing."""
    if label is None or not _FORM.fullmatch(label):
        return None
    return {part[1:]: _TOLD[part[0]] for part in label.split("|")}


def names_of(labels: Iterable[str | None]) -> tuple[str, ...]:
    """The findings that labels speak of, in order of the labels; none where any label is a class."""
    told = [findings_of(label) for label in sorted({label for label in labels if label is not None})]
    return tuple(dict.fromkeys(name for findings in told for name in findings or ())) if all(told) else ()


def check_one_kind(labels: Iterable[str | None]) -> None:
    """Refuse labels of which some are classes and some findings, as of two sources in one folder.

    Raises:
        UserError: in that case.
    """
    given = {label for label in labels if label is not None}
    told = {label for label in given if findings_of(label)}
    if told and told != given:
        raise UserError(
            f"labels: expected classes or findings, got both: {min(given - told)!r} and {min(told)!r}. "
            "Give one kind of label (--labels CSV), or the sources one by one."
        )


def values_of(label: str | None, names: Iterable[str]) -> list[float]:
    """What a label says of each of these findings: 1 present, 0 absent, NaN unknown or not spoken of."""
    told = findings_of(label) or {}
    return [math.nan if (value := told.get(name)) is None else float(value) for name in names]


def counted(labels: Iterable[str | None]) -> Counter[str]:
    """How many images have each class, or each finding."""
    return Counter(name for label in labels if label is not None for name in _present(label))


def strata(labels: Sequence[Iterable[str]]) -> list[tuple[str, ...]]:
    """What each subject counts as where classes are to stay in proportion: all its classes, or its rarest finding."""
    present = [{name for label in own for name in _present(label)} for own in labels]
    if not any(findings_of(label) for own in labels for label in own):
        return [tuple(sorted(own)) for own in present]
    images = Counter(name for own in present for name in own)
    return [tuple(sorted(own, key=lambda name: (images[name], name))[:1]) for own in present]


def told_by(cell: str) -> bool | None:
    """A cell of a table: 1 present, 0 absent; empty, `nan` or -1 (uncertain) unknown.

    Raises:
        ValueError: it is something else.
    """
    number = float(cell) if cell else math.nan
    if math.isnan(number) or number == _UNSURE:
        return None
    if number not in (0.0, 1.0):
        raise ValueError(cell)
    return number == 1.0


def finding_columns(rows: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """The columns of a table of labels whose every cell tells of a finding; none where fewer than two do."""

    def tells(column: str) -> bool:
        """Whether each cell can be a finding's, and at least one is known."""
        try:
            told = [told_by(row[column]) for row in rows]
        except (ValueError, KeyError):
            return False
        return any(cell is not None for cell in told)

    found = tuple(column for column in (rows[0] if rows else ()) if column not in _KEYS and tells(column))
    return found if len(found) > 1 else ()


def _present(label: str) -> list[str]:
    findings = findings_of(label)
    return [label] if findings is None else [name for name, told in findings.items() if told]
