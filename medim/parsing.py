"""Parse YAML, JSON and CSV text of unknown origin: limits on size and depth, no duplicate keys, finite numbers.

All readers of such files use these functions, so that a damaged or hostile file ends with one message that names it.
Cells of CSV files that a spreadsheet would run as a formula are written with a leading apostrophe, which the readers
remove.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medim.types import UserError

MAX_DEPTH = 50  # of nested lists and mappings
MAX_YAML_BYTES = 2**20
MAX_YAML_NODES = 10_000  # with the nodes that each alias repeats
MAX_JSON_BYTES = 2**28
MAX_CSV_BYTES = 2**31
MAX_NUMBER = 1e15  # magnitude of a number in a configuration
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")  # start of a cell that spreadsheets may run; an apostrophe makes it text
_ESCAPED_FORMULA = re.compile(r"'+[=+\-@\t\r\n]")
_UNUSUAL_ESCAPE = re.compile(r"\\u(?:0000|[dD][89abAB])")  # NUL, or the first half of a surrogate pair
_MERGE_TAG = "tag:yaml.org,2002:merge"
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueKeyLoader(_SafeLoader):  # type: ignore[misc]  # CSafeLoader has no type
    """Safe loader that rejects mappings with a key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Build a mapping after its own keys are checked; keys of a merged mapping (`<<`) may be replaced."""
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if (key.tag, key.value) in keys:
                    raise yaml.YAMLError(f"the key {key.value!r} occurs twice, again in line {key.start_mark.line + 1}")
                keys.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


def read_limited(path: Path, max_bytes: int, *, place: str | None = None) -> bytes:
    """Read a regular file of limited size; messages name `place`, or the path.

    Raises:
        UserError: the file is a pipe, a device or a folder, or it is larger than `max_bytes`.
        OSError: the file cannot be opened.
    """
    place = place or str(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{place}: expected a file, got a folder, a pipe or a device. Save the content as a file first."
        )
    if status.st_size > max_bytes:
        raise UserError(
            f"{place}: expected a file of at most {max_bytes:,} bytes, got {status.st_size:,}. Check the path."
        )
    return path.read_bytes()


def read_text(path: Path, max_bytes: int, *, place: str | None = None) -> str:
    """Read a UTF-8 text file of limited size, without a byte order mark.

    Raises:
        UserError: see `read_limited`; or the text is not UTF-8, or contains NUL.
        OSError: the file cannot be opened.
    """
    try:
        text = read_limited(path, max_bytes, place=place).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place or path}: expected text in UTF-8 ({error}). Save it in UTF-8, or copy it again."
        ) from None
    if "\0" in text:
        raise UserError(f"{place or path}: expected text, got NUL characters. Save it in UTF-8, or copy it again.")
    return text


def parse_yaml(text: str) -> Any:
    r"""Parse YAML of plain values; aliases, merged mappings and dates are allowed.

    Raises:
        ValueError: not YAML, or a duplicate key, or more than `MAX_YAML_BYTES`, `MAX_YAML_NODES` or `MAX_DEPTH`.

    Examples:
        >>> parse_yaml("{lr: 1.0e-3, views: {shape: [8, 8]}}")
        {'lr': 0.001, 'views': {'shape': [8, 8]}}
        >>> parse_yaml("lr: 1.0\nlr: 2.0")
        Traceback (most recent call last):
        ...
        ValueError: the key 'lr' occurs twice, again in line 2
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"at most {MAX_YAML_BYTES:,} characters are allowed, got {len(text):,}")
    try:
        _check_yaml_size(text)
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a safe loader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (RecursionError, OverflowError, TypeError) as error:  # of a scalar with a tag, such as a date
        raise ValueError(f"a value cannot be read ({type(error).__name__})") from None


def _check_yaml_size(text: str) -> None:
    """Count the nodes that the aliases of a document stand for, and its depth, before objects are built."""
    sizes: dict[str, int] = {}  # nodes below each finished anchor
    open_nodes: list[tuple[str | None, int]] = []  # anchor of each open collection, and the count at its start
    count = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes and any(anchor == event.anchor for anchor, _ in open_nodes):
                raise ValueError(f"the alias *{event.anchor} is inside its own anchor")
            count += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, count - 1))
            elif event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - start
        if len(open_nodes) > MAX_DEPTH:
            raise ValueError(f"at most {MAX_DEPTH} nested lists and mappings are allowed")
        if count > MAX_YAML_NODES:
            raise ValueError(f"at most {MAX_YAML_NODES:,} values are allowed, with those that aliases repeat")


def parse_json(data: bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: not JSON in UTF-8; or a duplicate key, a number that is not finite, a NUL character or half of a
            surrogate pair in a text, or more than `MAX_JSON_BYTES` or `MAX_DEPTH`.

    Examples:
        >>> parse_json(b'{"dice": 0.8}')
        {'dice': 0.8}
        >>> parse_json(b'{"dice": NaN}')
        Traceback (most recent call last):
        ...
        ValueError: expected a finite number, got NaN
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"at most {MAX_JSON_BYTES:,} bytes are allowed, got {len(data):,}")
    text = data.decode("utf-8-sig")
    try:
        content = json.loads(
            text, object_pairs_hook=_build_object, parse_float=_parse_finite, parse_constant=_parse_finite
        )
    except RecursionError:
        raise ValueError(f"at most {MAX_DEPTH} nested lists and objects are allowed") from None
    _check_json_depth(content)
    if _UNUSUAL_ESCAPE.search(text):
        _check_json_text(json.dumps(content, ensure_ascii=False))
    return content


def _build_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return content


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {text[:30]}")
    return number


def _check_json_depth(content: Any) -> None:
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"at most {MAX_DEPTH} nested lists and objects are allowed")


def _check_json_text(text: str) -> None:
    if "\\u0000" in text.replace("\\\\", ""):
        raise ValueError("a text contains a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text contains half of a surrogate pair") from None


def find_extreme_number(content: Any, path: tuple[str, ...] = ()) -> tuple[str, Any] | None:
    """Find a number that is not finite, or larger than `MAX_NUMBER`; None if there is none.

    Returns:
        Dotted path and value.

    Examples:
        >>> find_extreme_number({"objectives": [{"name": "local_dim", "weight": float("nan")}]})
        ('objectives.0.weight', nan)
    """
    if isinstance(content, float | int) and not abs(content) <= MAX_NUMBER:
        return ".".join(path), content
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    matches = (find_extreme_number(item, (*path, str(key))) for key, item in items)
    return next((match for match in matches if match), None)


@dataclass(frozen=True)
class CsvContent:
    """Rows of a CSV file.

    Attributes:
        columns: names in the header line.
        rows: cells by column name; the cells of a row without a column are left out.
        lines: line number of each row.
    """

    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Iterate over the rows."""
        return iter(self.rows)

    def require_columns(self, place: Path | str, columns: Iterable[str], *, remedy: str = "Copy it again.") -> None:
        """Check that the file has columns.

        Args:
            place: the file, for the message.
            columns: expected names.
            remedy: sentence at the end of the message.

        Raises:
            UserError: a column is missing.
        """
        expected = tuple(columns)
        if not set(expected) <= set(self.columns):
            names = ", ".join(self.columns)[:200] or "none"
            raise UserError(f"{place}: expected the columns {', '.join(expected)}, got {names}. {remedy}")


def read_csv(
    path: Path,
    *,
    delimiters: str = ",",
    complete: bool = True,
    remedy: str = "Copy it again.",
    place: str | None = None,
) -> CsvContent:
    """Read a CSV file with a header line, and remove the apostrophes of `escape_formula`.

    Args:
        path: file in UTF-8.
        delimiters: possible separators; the most frequent one in the header line is used.
        complete: whether every row must have a cell for each column, as in the files that medim writes.
        remedy: sentence at the end of a message.
        place: name of the file in messages, without identities; None for the path.

    Raises:
        UserError: the file is not regular, not UTF-8 or not CSV, or a row is incomplete.
        OSError: the file cannot be opened.
    """
    place = place or str(path)
    text = read_text(path, MAX_CSV_BYTES, place=place)
    delimiter = max(delimiters, key=next(iter(text.splitlines()), "").count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, lines = [], []
    try:
        columns = tuple(unescape_formula(name) for name in next(reader, []))
        if complete and len(set(columns)) < len(columns):
            raise UserError(f"{place}: expected one column per name, got {', '.join(columns)[:200]}. {remedy}")
        for cells in filter(None, reader):
            if complete and len(cells) != len(columns):
                raise UserError(
                    f"{place}, line {reader.line_num}: expected {len(columns)} cells, got {len(cells)}. {remedy}"
                )
            padded = [*cells, *[""] * (len(columns) - len(cells))]
            rows.append(dict(zip(columns, map(unescape_formula, padded), strict=False)))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(
            f"{place}, line {reader.line_num}: expected a row of a CSV file, got {error}. {remedy}"
        ) from None
    return CsvContent(columns, tuple(rows), tuple(lines))


def encode_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """Encode a CSV file with a header line; None becomes an empty cell, and `escape_formula` is applied."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    quoting_writer = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in (columns, *rows):
        cells = ["" if cell is None else escape_formula(cell) for cell in row]
        has_return = any(isinstance(cell, str) and "\r" in cell for cell in cells)  # not quoted before Python 3.13
        (quoting_writer if has_return else writer).writerow(cells)
    return buffer.getvalue().encode()


def escape_formula(cell: object) -> object:
    """Put an apostrophe before a text that a spreadsheet would run as a formula; numbers are left as they are.

    Examples:
        >>> escape_formula("=1+1"), escape_formula("@SUM(A1)"), escape_formula(-1.5), escape_formula("-1.5")
        ("'=1+1", "'@SUM(A1)", -1.5, '-1.5')
    """
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) and not _is_number(cell) else cell


def unescape_formula(cell: str) -> str:
    """Remove the apostrophe of `escape_formula`.

    Examples:
        >>> unescape_formula("'=1+1"), unescape_formula("O'Brien")
        ('=1+1', "O'Brien")
    """
    return cell[1:] if _ESCAPED_FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()
