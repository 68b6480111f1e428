"""One table of codes: the code base gives what it holds, and page and tests show it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from medim.data.index.rejection_codes import QUALITY_CODES, REJECTION_REASONS

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = (REPOSITORY / "docs" / "reference" / "rejections.md").read_text()
CODES = [*REJECTION_REASONS.items(), *QUALITY_CODES.items()]


def texts(node: ast.expr | None) -> list[str]:
    """The texts that an expression may give, where it gives them itself."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    return []


def given(tree: ast.AST) -> Iterator[str]:
    """The codes that a module gives."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for name, value in pairs:
                    if isinstance(name, ast.Name) and name.id == "reason":
                        yield from texts(value)
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "id", "")
        at = {"ReadError": 0, "Rejection": 1}.get(called)
        if at is not None and len(node.args) > at:
            yield from texts(node.args[at])
        if called == "getattr" and texts(node.args[1]) == ["reason"]:
            yield from texts(node.args[2])
        if called in {"RejectedFile", "Rejection", "ReadError"}:
            yield from (text for key in node.keywords if key.arg == "reason" for text in texts(key.value))


def rows(width: int) -> dict[str, list[str]]:
    """The tables of the page with so many columns, by code."""
    cells = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in cells if len(row) == width}


def test_the_code_base_gives_the_codes_of_the_table_and_no_others() -> None:
    sources = {
        path: path.read_text() for path in (REPOSITORY / "medim").rglob("*.py") if path.name != "rejection_codes.py"
    }
    codes = {code for source in sources.values() for code in given(ast.parse(source))} - {""}  # no reason
    assert codes <= set(REJECTION_REASONS)
    assert [code for code in REJECTION_REASONS if not any(f'"{code}"' in source for source in sources.values())] == []


def test_every_quality_of_the_table_is_given_by_a_reader() -> None:
    sources = "".join(path.read_text() for path in (REPOSITORY / "medim" / "data" / "readers").rglob("*.py"))
    assert [code for code in QUALITY_CODES if f'"{code}"' not in sources] == []


def test_the_page_has_the_tables_as_they_are() -> None:
    assert {code: cells[0] for code, cells in rows(4).items()} == REJECTION_REASONS
    assert {code: cells[0] for code, cells in rows(3).items()} == QUALITY_CODES


@pytest.mark.parametrize("code", [code for code, _ in CODES])
def test_the_test_that_the_page_names_is_there_and_names_the_code(code: str) -> None:
    path, _, name = (rows(4) | rows(3))[code][-1].strip("`").partition("::")
    source = (REPOSITORY / "tests" / path).read_text()
    assert re.search(rf"^ *def {name}\(", source, re.MULTILINE)
    assert f'"{code}"' in source or rf"\[{code}\]" in source
