"""Output of the commands on a terminal: no markup, no control characters, no traceback."""

from __future__ import annotations

import logging
import os
import signal
import time

import pytest
import typer
from rich.markup import MarkupError
from rich.text import Text
from typer.testing import CliRunner

from medim.cli.terminal import (
    ColouredHandler,
    escape_control_characters,
    format_intervals,
    print_result,
    register_command,
)
from medim.types import UserError

HOSTILE = "a[/]b [red]c\x1b[31m\x1b]0;title\x07 \u202egnp.exe\r"


def run(body_error: BaseException | None, *arguments: str) -> object:
    """Run a command that logs and prints a hostile name, and raises an error if one is given."""
    application = typer.Typer()

    @register_command(application)
    def command() -> None:
        logging.getLogger("medim").warning("read %s", HOSTILE)
        print_result(HOSTILE, {HOSTILE: HOSTILE, "count": 3})
        if body_error is not None:
            raise body_error

    return CliRunner().invoke(application, list(arguments))


@pytest.mark.parametrize("error", [None, UserError(HOSTILE), FileNotFoundError(2, "absent", HOSTILE)])
def test_names_of_files_reach_the_terminal_without_control_characters_and_unchanged_otherwise(
    error: Exception | None,
) -> None:
    result = run(error)
    for text in (result.output, result.stderr):  # type: ignore[attr-defined]
        assert not set(text) & {"\x1b", "\x07", "\u202e", "\r"}
    assert "a[/]b [red]c\\x1b[31m" in result.output  # type: ignore[attr-defined]
    assert result.exit_code == (error is not None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [TypeError("Doe^Jane"), RecursionError(), MarkupError("x"), ValueError("Doe^Jane")])
def test_an_unexpected_error_is_one_sentence_without_its_message(error: Exception) -> None:
    result = run(error)
    assert result.exit_code == 1  # type: ignore[attr-defined]
    assert f"unexpected error ({type(error).__name__})" in result.output  # type: ignore[attr-defined]
    assert "Traceback" not in result.output  # type: ignore[attr-defined]
    assert "Doe" not in result.output  # type: ignore[attr-defined]


def wrap_error(cause: Exception) -> Exception:
    error = ValueError("x")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        wrap_error(RuntimeError("std::bad_alloc")),
    ],
)
def test_too_little_memory_is_reported_as_such(error: Exception) -> None:
    result = run(error)
    assert result.exit_code == 1  # type: ignore[attr-defined]
    assert "not enough memory" in result.output  # type: ignore[attr-defined]


def test_debug_shows_the_traceback_and_an_exit_code_of_the_command_is_kept() -> None:
    output = run(TypeError("x"), "--debug").output  # type: ignore[attr-defined]
    assert "Traceback" in output
    assert "TypeError: x" in output
    assert run(typer.Exit(75)).exit_code == 75  # type: ignore[attr-defined]


def test_letters_of_every_script_are_kept() -> None:
    text = "Größe 磁共振 سماعة\tline\n"
    assert escape_control_characters(text) == text


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("option", ["--hours", "--share"])
def test_an_option_with_a_number_that_is_not_finite_is_a_usage_error(option: str, text: str) -> None:
    application = typer.Typer()

    @register_command(application)
    def command(hours: float = 1.0, share: list[float] | None = None) -> None:
        raise AssertionError(hours, share)

    result = CliRunner().invoke(application, [option, text])
    assert result.exit_code == 2
    assert "expected a finite number" in result.output


def test_metrics_have_their_titles() -> None:
    row = {"value": 0.5, "ci_low": 0.25, "ci_high": 0.75, "n": 14}
    assert format_intervals({"metrics": {"r2": row, "hd95_left": row}}) == {
        "R2": "0.500 [0.250, 0.750]",
        "HD95 left": "0.500 mm [0.250, 0.750]",
        "in brackets": "95 % CI",
    }


def test_three_digits_the_subjects_and_missed_structures_stand_in_the_lines() -> None:
    none = {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    metrics = {
        "surface_dice_tail": {"value": 0.0002173, "ci_low": 0.0, "ci_high": 0.99962, "n": 14},
        "hd95_tail": {"value": 4.8463, "ci_low": 3.0, "ci_high": 123.4, "n": 14, "missed": 2},
        "hd95_head": {**none, "missed": 0},
        "dice_head": none,
    }
    assert format_intervals({"subjects": 14, "metrics": metrics}) == {
        "Surface Dice at 1 mm, tail": "0.000217 [0.00, 1.00]",
        "HD95 tail": "4.85 mm [3.00, 123], 2 of 14 missed",
        "HD95 head": "- (in no true mask)",
        "Dice, head": "-",
        "in brackets": "95 % CI over 14 subjects",
        "missed": "A missed structure counts with the diagonal of its image as distance.",
    }


@pytest.mark.parametrize("debug", [False, True])
def test_tracebacks_that_libraries_log_are_shown_with_debug_only(debug: bool) -> None:
    app = typer.Typer()

    def fail_inside() -> None:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            logging.getLogger("sqlalchemy.pool").exception("the disk is full")

    register_command(app, "work")(fail_inside)
    result = CliRunner().invoke(app, ["--debug"] if debug else [])
    assert "the disk is full" in result.output
    assert ("Traceback" in result.output) == debug


@pytest.mark.parametrize(("resume", "remedy"), [(True, "with --resume continues"), (False, "starts again")])
def test_a_signal_ends_every_command_with_exit_75_and_the_remedy(resume: bool, remedy: str) -> None:
    app = typer.Typer()

    def wait(resume: bool = False) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    def wait_without() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    register_command(app, "wait")(wait if resume else wait_without)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 75
    assert "stopped by SIGTERM" in result.output
    assert remedy in result.output
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("level", "message", "style"),
    [
        (logging.INFO, "measured 8 of 8 images", None),
        (logging.WARNING, "No subject IDs: each of 8 images counts as its own subject", "yellow"),
        (logging.WARNING, "WARNING leakage: 1 of 4 evaluation images (25%) was used in pretraining", "bold red"),
    ],
)
def test_warnings_are_coloured_on_a_terminal_and_leakage_is_red(level: int, message: str, style: str | None) -> None:
    record = logging.LogRecord("medim", level, __file__, 1, message, None, None)
    text = ColouredHandler(markup=False).render_message(record, message)
    assert isinstance(text, Text)
    assert text.plain == message
    assert any(span.style == style for span in text.spans) is (style is not None)


def test_a_long_value_is_folded_and_never_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    print_result("export", {"sha256": "0123456789" * 20})
    output = capsys.readouterr().out
    assert "".join(output.split()) == "exportsha256" + "0123456789" * 20
