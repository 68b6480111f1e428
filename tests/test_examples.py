"""The examples in docstrings run, and the check detects one that is wrong."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = [
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((REPOSITORY / "medim").rglob("*.py"))
    if ">>>" in path.read_text()
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    examples = [example for test in doctest.DocTestFinder().find(module) for example in test.examples]
    is_skipped = [example.options.get(doctest.SKIP, False) for example in examples]
    result = doctest.testmod(module, optionflags=FLAGS)
    assert examples
    assert result.attempted > 0 or all(is_skipped)
    assert result.failed == 0


def test_a_wrong_example_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_example.py").write_text('"""Text.\n\n>>> 1 + 1\n3\n"""\n')
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert doctest.testmod(importlib.import_module("wrong_example"), optionflags=FLAGS).failed == 1
