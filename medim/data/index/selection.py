"""Select images of an index by a condition on its columns, such as `sequence=T1w and spacing_z<3`."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches

from medim.data.index.records import ImageRecord
from medim.privacy import make_pseudonym
from medim.types import UsageError

Condition = Callable[[ImageRecord], bool]
Value = float | str | None

_CONDITION_TOKEN = re.compile(
    r"\s*(?:(?P<symbol>[(),])|(?P<comparison><=|>=|!=|==|=|<|>)|\"(?P<double>[^\"]*)\"|'(?P<single>[^']*)'"
    r"|(?P<word>[^\s(),<>=!\"']+))"
)
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge,
}  # fmt: skip
_AXIS_LETTERS = "xyz"
_SIZES: dict[str, Callable[[ImageRecord, int], float]] = {  # columns of each axis, such as spacing_z
    "spacing": lambda record, axis: record.spacing[axis],
    "shape": lambda record, axis: record.shape[axis],
    "fov": lambda record, axis: record.spacing[axis] * record.shape[axis],
}
_TEXT_COLUMNS = tuple(
    field.name for field in fields(ImageRecord) if field.name not in {"shape", "spacing", "affine", "field_strength"}
)
_NAMING_COLUMNS = ("image", "path", "subject", "session", "series", "mask")  # values identify images or subjects
_NUMBER_COLUMNS = ("field_strength", *(f"{name}_{axis}" for name in _SIZES for axis in _AXIS_LETTERS))
WHERE_COLUMNS = (*_TEXT_COLUMNS, *_NUMBER_COLUMNS)
_MAX_COLUMN_VALUES = 8  # of a column in a message
_MAX_CONDITION_LENGTH, _MAX_NESTING = 2000, 20  # of a condition, and of its parentheses


@dataclass(frozen=True)
class _Token:
    """Part of a condition: a symbol, a comparison, a word or a quoted text, with its place in the condition."""

    kind: str
    text: str
    start: int
    end: int


def parse_condition(text: str) -> Condition:
    """Parse a condition: comparisons of columns with `and`, `or`, `not` and parentheses.

    Text is compared without case, and `*` matches any text. A value that is missing equals `none` alone.

    Args:
        text: such as `sequence in (T1w, T2w) and not fov_z<100`.

    Raises:
        UsageError: the condition is invalid, or names an unknown column.

    Examples:
        >>> record = ImageRecord(
        ...     image="a", path="a.nii", subject="s-1", session=None, series=None, modality="mri", sequence="T1w",
        ...     shape=(64, 64, 20), spacing=(1.0, 1.0, 5.0), affine=(), scanner=None, field_strength=1.5, label=None,
        ...     mask=None, split=None, quality=None,
        ... )
        >>> parse_condition("sequence=t1* and spacing_z>=3")(record)
        True
        >>> parse_condition("label=none and fov_z>200")(record)
        False
    """
    return _ConditionParser(text).parse()


class _ConditionParser:
    """Recursive-descent parser of a condition; nothing is evaluated as code."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split(text)
        self._position = self._depth = 0
        self.texts: list[tuple[str, _Token]] = []  # values of text columns, with their columns

    def parse(self) -> Condition:
        """Parse the whole text."""
        condition = self._parse_or()
        if self._position < len(self._tokens):
            raise self._error(f"expected 'and' or 'or', got {self._tokens[self._position].text!r}")
        return condition

    def _split(self, text: str) -> list[_Token]:
        if len(text) > _MAX_CONDITION_LENGTH:
            raise UsageError(f"--where: expected at most {_MAX_CONDITION_LENGTH} characters, got {len(text)}.")
        tokens, position = [], 0
        while position < len(text.rstrip()):
            match = _CONDITION_TOKEN.match(text, position)
            if match is None:
                raise self._error(f"expected words, numbers and quoted texts, got {text[position:].strip()[:20]!r}")
            kind = str(match.lastgroup)
            tokens.append(_Token("text" if kind in {"double", "single"} else kind, match[kind], position, match.end()))
            position = match.end()
        return tokens

    def _parse_or(self) -> Condition:
        conditions = [self._parse_and()]
        while self._skip_word("or"):
            conditions.append(self._parse_and())
        return lambda record: any(condition(record) for condition in conditions)

    def _parse_and(self) -> Condition:
        conditions = [self._parse_not()]
        while self._skip_word("and"):
            conditions.append(self._parse_not())
        return lambda record: all(condition(record) for condition in conditions)

    def _parse_not(self) -> Condition:
        if self._skip_word("not"):
            condition = self._parse_nested(self._parse_not)
            return lambda record: not condition(record)
        if self._skip("symbol", "("):
            condition = self._parse_nested(self._parse_or)
            self._expect("symbol", ")")
            return condition
        return self._parse_comparison()

    def _parse_nested(self, parse: Callable[[], Condition]) -> Condition:
        self._depth += 1
        if self._depth > _MAX_NESTING:
            raise self._error(f"expected at most {_MAX_NESTING} nested parentheses")
        condition = parse()
        self._depth -= 1
        return condition

    def _parse_comparison(self) -> Condition:
        column = self._parse_column()
        if self._skip_word("in"):
            self._expect("symbol", "(")
            values = [self._parse_value(column)]
            while self._skip("symbol", ","):
                values.append(self._parse_value(column))
            self._expect("symbol", ")")
            tests = [_compare(column, "=", value) for value in values]
            return lambda record: any(test(record) for test in tests)
        comparison = self._take()
        if comparison.kind != "comparison":
            raise self._error(f"expected =, !=, <, <=, >, >= or in after {column!r}, got {comparison.text!r}")
        value = self._parse_value(column)
        if column in _TEXT_COLUMNS and comparison.text not in {"=", "==", "!="}:
            raise self._error(f"expected = or != for the text column {column!r}, got {comparison.text!r}")
        if value is None and comparison.text not in {"=", "==", "!="}:
            raise self._error(f"expected = or != before none, got {comparison.text!r}")
        return _compare(column, comparison.text, value)

    def _parse_column(self) -> str:
        token = self._take()
        if token.kind == "word" and token.text.lower() in WHERE_COLUMNS:
            return token.text.lower()
        close = get_close_matches(token.text.lower(), WHERE_COLUMNS, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise self._error(f"expected a column, got {token.text!r}.{hint} Columns: {', '.join(WHERE_COLUMNS)}")

    def _parse_value(self, column: str) -> Value:
        token = self._take()
        if token.kind not in {"word", "text"}:
            raise self._error(f"expected a value for {column!r}, got {token.text!r}")
        if token.kind == "word" and token.text.lower() == "none":
            return None
        if column in _TEXT_COLUMNS:
            self.texts.append((column, token))
            return token.text.lower()
        try:
            number = float(token.text)
        except ValueError:
            raise self._error(f"expected a number for {column!r}, got {token.text!r}") from None
        if not -1e15 < number < 1e15:
            raise self._error(f"expected a finite number for {column!r}, got {token.text!r}")
        return number

    def _take(self) -> _Token:
        if self._position >= len(self._tokens):
            raise self._error("the condition ends early")
        self._position += 1
        return self._tokens[self._position - 1]

    def _skip(self, kind: str, text: str) -> bool:
        if self._position < len(self._tokens):
            token = self._tokens[self._position]
            if token.kind == kind and token.text.lower() == text:
                self._position += 1
                return True
        return False

    def _skip_word(self, word: str) -> bool:
        return self._skip("word", word)

    def _expect(self, kind: str, text: str) -> None:
        if not self._skip(kind, text):
            rest = self._tokens[self._position].text if self._position < len(self._tokens) else "the end"
            raise self._error(f"expected {text!r}, got {rest!r}")

    def _error(self, problem: str) -> UsageError:
        return UsageError(f"--where {self._text[:200]!r}: {problem}.")


def _compare(column: str, comparison: str, value: Value) -> Condition:
    """Build the comparison of a column with a value."""
    if column in _TEXT_COLUMNS:
        is_negated = comparison == "!="
        return lambda record: _matches(column, getattr(record, column), value) != is_negated

    def compare_number(record: ImageRecord) -> bool:
        number = _read_number(record, column)
        if value is None or number is None:
            return (number is value) != (comparison == "!=")
        return _COMPARISONS[comparison](number, float(value))

    return compare_number


def _matches(column: str, text: str | None, value: Value) -> bool:
    """Whether a text equals a value, or one of its quality codes does."""
    if value is None or not text:
        return value is None and not text
    texts = text.lower().split() if column == "quality" else [text.lower()]
    return any(fnmatch.fnmatchcase(word, str(value).replace("[", "[[]")) for word in texts)


def _read_number(record: ImageRecord, column: str) -> float | None:
    """Read a number of a record; None if it is missing or the image has no such axis."""
    if column == "field_strength":
        return record.field_strength
    name, _, axis = column.partition("_")
    number = _AXIS_LETTERS.index(axis)
    return _SIZES[name](record, number) if number < len(record.shape) else None


def scrub_condition(text: str, records: Sequence[ImageRecord]) -> str:
    """Replace texts that no image has by pseudonyms, because they may be names of people that an index hides.

    Raises:
        UsageError: the condition is invalid.
    """

    def scrub(column: str, token: _Token) -> str | None:
        """Return the pseudonym of a text that no image has; None for other texts."""
        if any(_matches(column, getattr(record, column), token.text.lower()) for record in records):
            return None
        return make_pseudonym(token.text)

    return _replace_texts(text, scrub)


def hide_names(text: str) -> str:
    """Replace the values of columns that identify images or subjects, for files that leave the site.

    Raises:
        UsageError: the condition is invalid.

    Examples:
        >>> hide_names("sequence=T1w and subject!=s-0123")
        'sequence=T1w and subject!=hidden'
    """
    return _replace_texts(text, lambda column, _: "hidden" if column in _NAMING_COLUMNS else None)


def _replace_texts(text: str, replace: Callable[[str, _Token], str | None]) -> str:
    """Replace values of text columns in a condition, if the function returns another text."""
    parser = _ConditionParser(text)
    parser.parse()
    for column, token in reversed(parser.texts):
        replacement = replace(column, token)
        if replacement is not None:
            start = token.end - len(text[token.start : token.end].lstrip())
            text = text[:start] + replacement + text[token.end :]
    return text


def describe_columns(records: Sequence[ImageRecord], where: str) -> str:
    """Describe the values of the columns that a condition names: counts of texts, ranges of numbers."""
    words = dict.fromkeys(word.lower() for word in re.findall(r"\w+", where))
    texts = []
    for column in (word for word in words if word in WHERE_COLUMNS):
        if column in _NUMBER_COLUMNS:
            numbers = [number for record in records if (number := _read_number(record, column)) is not None]
            texts.append(f"{column}: {min(numbers):.3g} to {max(numbers):.3g}" if numbers else f"{column}: none")
        else:
            counts = Counter(getattr(record, column) or "none" for record in records).most_common(_MAX_COLUMN_VALUES)
            texts.append(f"{column}: {', '.join(f'{value} {count}' for value, count in counts)}")
    return f"Values in the index: {'; '.join(texts)}."
