from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from medim.cli import app
from medim.cli.renamed_options import RENAMED_OPTIONS, translate_options

GROUP: Any = typer.main.get_command(app)
PAIRS = [(command, *pair) for command, names in RENAMED_OPTIONS.items() for pair in names.items()]


@pytest.mark.parametrize(("command", "old", "new"), PAIRS)
def test_the_new_name_is_an_option_of_the_command_and_the_old_one_is_hidden(command: str, old: str, new: str) -> None:
    options = {name for option in GROUP.commands[command].params for name in (*option.opts, *option.secondary_opts)}
    assert new in options
    assert old not in options


@pytest.mark.parametrize(("command", "old", "new"), PAIRS)
def test_an_old_name_is_replaced_with_a_warning(
    command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert translate_options([old, "x", f"{old}=y", "--", old], RENAMED_OPTIONS[command]) == [
        *(new, "x", f"{new}=y", "--", old)
    ]
    assert capsys.readouterr().err.count(f"{old} is now {new}") == 2


def test_a_command_takes_an_old_name_as_the_new_one(tmp_path: Path) -> None:
    names = ("--trust", "--public-key")
    results = [CliRunner().invoke(app, ["verify", str(tmp_path / "nowhere"), name, "key.pem"]) for name in names]
    assert [result.exit_code for result in results] == [1, 1], "2 is a wrong option"
    assert "--trust is now --public-key" in results[0].stderr
    assert "is now" not in results[1].stderr
