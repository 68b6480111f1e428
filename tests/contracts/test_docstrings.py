"""Every option of a configuration is explained by the docstring of what takes it, which `config show` prints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from medim.cli.presets import parse_docstring
from medim.data.loading.augmentations import AUGMENTATIONS
from medim.data.preprocessing.steps import STEPS
from medim.inference.network import INFERENCES
from medim.models.critics import CRITICS
from medim.models.decoders import DECODERS
from medim.models.encoders import ENCODERS
from medim.models.heads import HEADS
from medim.objectives import OBJECTIVES

TABLES = (STEPS, AUGMENTATIONS, ENCODERS, DECODERS, CRITICS, OBJECTIVES, HEADS, INFERENCES)


@pytest.mark.parametrize("entry", [pytest.param(e, id=f"{e.__module__}.{n}") for t in TABLES for n, e in t.items()])
def test_an_entrys_docstring_explains_every_option(entry: Callable[..., Any]) -> None:
    parameters = inspect.signature(entry).parameters.values()
    summary, said = parse_docstring(entry)
    assert summary.endswith(".")
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in said] == []


def test_an_explanation_over_several_lines_is_read_whole() -> None:
    def entry(*, first: int, second: int) -> None:
        """What it does,
        in two lines.

        More of it.

        Args:
            first: one line: with a colon.
            second: this one goes on
                in the next.

        Returns:
            third: nothing.
        """

    summary, said = parse_docstring(entry)
    assert summary == "What it does, in two lines."
    assert said == {"first": "one line: with a colon.", "second": "this one goes on in the next."}
