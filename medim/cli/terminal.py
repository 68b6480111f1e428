"""Common parts of all commands: `--quiet`, `--debug`, errors as messages and exit codes, result tables."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console, ConsoleRenderable
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from medim.cli.renamed_options import RENAMED_OPTIONS, translate_options
from medim.cli.traceback_text import describe_os_error, format_traceback
from medim.console.progress import active_bars, stderr_console
from medim.signals import handle_shutdown_signals
from medim.types import UserError
from medim.version import install_command

if TYPE_CHECKING:
    from medim.data.index.index import Index

console = Console(emoji=False)
wide_console = Console(emoji=False, width=10_000)  # for tables that are not printed on a terminal
_REMEDIES = {  # whether the command has --resume: advice after a signal
    True: "the same command with --resume continues",
    False: "the same command starts again",
}
_CONTROL_FLOW = (typer.Exit, typer.Abort, typer.BadParameter)  # handled by typer
_MEMORY_MESSAGE = re.compile(  # of torch, CUDA, C++ and threads
    r"can't allocate memory|out of memory|not enough memory|bad_alloc|[Cc]annot allocate|can't start new thread"
)
_CONTROL_CATEGORIES = {"Cc", "Cf", "Zl", "Zp"}  # control and format characters, line and paragraph separators


class ColouredHandler(RichHandler):
    """Log lines for a terminal; warnings are coloured."""

    def render_message(self, record: logging.LogRecord, message: str) -> ConsoleRenderable:
        """Render a message, in yellow if it is a warning and in red if it is an error or a leakage of images."""
        text = super().render_message(record, message)
        if isinstance(text, Text) and record.levelno >= logging.WARNING:
            is_severe = record.levelno >= logging.ERROR or message.startswith("WARNING leakage")
            text.stylize("bold red" if is_severe else "yellow")
        return text


class MedimCommand(TyperCommand):
    """Command with the messages of medim that also accepts the option names of earlier versions."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options after old names are replaced by new ones, see `renamed_options`."""
        try:
            rest = super().parse_args(ctx, translate_options(args, RENAMED_OPTIONS.get(str(self.name), {})))
            self._check_finite(ctx)
            return rest
        except typer.BadParameter as error:
            error.message = _describe_bad_value(error)
            raise

    def _check_finite(self, ctx: Any) -> None:
        """Reject options whose value is nan or infinite, which the parser and its limits accept."""
        parameters: list[Any] = list(self.params)
        for parameter in parameters:
            value = ctx.params.get(str(parameter.name))
            numbers = value if isinstance(value, list | tuple) else [value]
            for number in numbers:
                if isinstance(number, float) and not math.isfinite(number):
                    raise typer.BadParameter(f"expected a finite number, got {number}", ctx=ctx, param=parameter)


def _describe_bad_value(error: typer.BadParameter) -> str:
    """Describe a value that the parser rejects, in the form of the messages about configurations."""
    from pydantic import ValidationError

    from medim.config import describe_value_error

    cause = error.__cause__
    return describe_value_error(cause.errors()[0]) if isinstance(cause, ValidationError) else error.message


def register_command(
    typer_app: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command.

    The function takes the arguments of the command as parameters, or all in one dataclass with a field per argument.
    The command also has `--quiet` and `--debug`, and turns errors into messages and exit codes.

    Args:
        typer_app: application or group to add the command to.
        name: name of the command; None takes the name of the function.
    """
    quiet = Annotated[bool, typer.Option("--quiet", help="Print only the result.")]
    debug = Annotated[bool, typer.Option("--debug", help="Show the traceback if the command fails.")]

    def register_body(body: Callable[..., None]) -> Callable[..., None]:
        """Register one function and return it unchanged."""
        arguments_class = _find_arguments_class(body)

        @functools.wraps(body)
        def run_command(**options: Any) -> None:
            """Run the function and exit with the code of the error that it raises."""
            is_quiet, with_traceback = options.pop("quiet"), options.pop("debug")
            _configure_logging(is_quiet, with_traceback=with_traceback)
            try:
                with active_bars, handle_shutdown_signals(remedy=_REMEDIES["resume" in options]):
                    body(**options) if arguments_class is None else body(arguments_class(**options))
            except (Exception, KeyboardInterrupt) as error:
                if isinstance(error, _CONTROL_FLOW):
                    raise
                if with_traceback:
                    Console(stderr=True, soft_wrap=True, emoji=False).print(
                        escape_control_characters(format_traceback(error)), markup=False, highlight=False
                    )
                Console(stderr=True, soft_wrap=True, emoji=False).print(
                    escape_control_characters(f"medim: {_format_error(error)}"), markup=False, highlight=False
                )
                raise typer.Exit(getattr(error, "exit_code", 1)) from None

        extra_parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for name, annotation in (("quiet", quiet), ("debug", debug))
        ]
        run_command.__signature__ = inspect.Signature([*_list_parameters(body), *extra_parameters])  # type: ignore[attr-defined]
        run_command.__annotations__ = {p.name: p.annotation for p in run_command.__signature__.parameters.values()}  # type: ignore[attr-defined]
        typer_app.command(name or body.__name__, cls=MedimCommand)(run_command)
        return body

    return register_body


def _find_arguments_class(body: Callable[..., None]) -> type | None:
    """Find the dataclass that contains the arguments of a command; None for a command with plain parameters."""
    annotations = [p.annotation for p in inspect.signature(body, eval_str=True).parameters.values()]
    classes = [a for a in annotations if isinstance(a, type) and is_dataclass(a)]
    return classes[0] if classes else None


def _list_parameters(body: Callable[..., None]) -> list[inspect.Parameter]:
    """List the arguments of a command in the order of its help: the parameters, or the fields of their dataclass."""
    parameters = _list_declared_parameters(body)
    for parameter in parameters:
        for option in getattr(parameter.annotation, "__metadata__", ()):
            option.case_sensitive = False  # of choices: MRI is mri
    return parameters


def _list_declared_parameters(body: Callable[..., None]) -> list[inspect.Parameter]:
    arguments_class = _find_arguments_class(body)
    if arguments_class is None:
        return list(inspect.signature(body, eval_str=True).parameters.values())
    annotations = get_type_hints(arguments_class, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=annotations[field.name],
        )
        for field in fields(arguments_class)
    ]


def _configure_logging(is_quiet: bool, *, with_traceback: bool) -> None:
    """Log lines to standard error: through rich on a terminal, plain and unwrapped elsewhere.

    Tracebacks that libraries log, such as those of a tracking database on a full disk, are left out by default.
    """
    if stderr_console.is_terminal:
        handler: logging.Handler = ColouredHandler(
            console=stderr_console, markup=False, show_path=False, show_level=False, log_time_format="%H:%M:%S"
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(_escape_log_record)
    if not with_traceback:
        handler.addFilter(_remove_traceback)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("medim").setLevel(logging.WARNING if is_quiet else logging.INFO)


def _format_error(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"this command needs {error.name}, which is not installed. Run: {install_command('train')}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. Files written so far are complete. Run the command again (with --resume, if it has that)."
    if _is_memory_error(error):
        return "not enough memory. Use smaller batches or images, or a machine with more memory."
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, UserError | ImportError):
        return str(error)
    return (  # without the message, which may contain names of files or patients
        f"unexpected error ({type(error).__name__}). Run the command again with --debug to see where, and report it."
    )


def _is_memory_error(error: BaseException) -> bool:
    """Whether an error, or the error that caused it, is one of memory: torch raises RuntimeError for it."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY_MESSAGE.search(str(error))):
        return True
    cause = error.__cause__ or error.__context__
    is_own_message = isinstance(error, UserError | ImportError | OSError)
    return cause is not None and not is_own_message and _is_memory_error(cause)


def escape_control_characters(text: str) -> str:
    r"""Replace characters that control a terminal or the direction of text, such as ESC in a file name, by escapes.

    Examples:
        >>> escape_control_characters("scan\x1b[31m.png")
        'scan\\x1b[31m.png'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _CONTROL_CATEGORIES else c.encode("unicode_escape").decode()
        for c in text
    )


def _escape_log_record(record: logging.LogRecord) -> bool:
    """Escape control characters in the message of a log record, and keep the record."""
    record.msg, record.args = escape_control_characters(record.getMessage()), None
    return True


def _remove_traceback(record: logging.LogRecord) -> bool:
    """Remove the traceback of a log record, and keep the record."""
    record.exc_info = record.exc_text = record.stack_info = None
    return True


def format_intervals(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Format each metric, by its title, with its unit and its 95 % interval; then the meaning of the interval."""
    from medim.metrics import find_metric
    from medim.metrics.segmentation import MISSED_NOTE
    from medim.reports.page import metric_name

    estimates = {key: value for key, value in metrics.get("metrics", metrics).items() if isinstance(value, dict)}
    lines = {}
    for key, estimate in estimates.items():
        match = find_metric(key)
        unit = f" {match[0].unit}" if match and match[0].unit else ""
        lines[metric_name(key).removesuffix(f",{unit}")] = _format_estimate(estimate, unit)
    if any(estimate["ci_low"] is not None for estimate in estimates.values()):
        subjects = f" over {metrics['subjects']:,} subjects" if metrics.get("subjects") else ""
        lines["in brackets"] = f"95 % CI{subjects}"
    if any(estimate.get("missed") for estimate in estimates.values()):
        lines["missed"] = MISSED_NOTE
    return lines


def _format_estimate(estimate: Mapping[str, float | None], unit: str) -> str:
    """Format `value unit [low, high]` with the number of missed structures; a dash if the value is not defined."""
    value, low, high = (estimate[part] for part in ("value", "ci_low", "ci_high"))
    text = "-" if value is None else f"{format_significant(value)}{unit}"
    if low is not None and high is not None:
        text += f" [{format_significant(low)}, {format_significant(high)}]"
    if value is None:
        text += " (in no true mask)" if "missed" in estimate else ""
    elif estimate.get("missed"):
        text += f", {estimate['missed']} of {estimate['n']} missed"
    return text


def format_significant(value: float) -> str:
    """Format a number with three significant digits.

    Examples:
        >>> [format_significant(value) for value in (0.9996, 0.0002173, 12.0, 1234.5)]
        ['1.00', '0.000217', '12.0', '1,234']
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def format_averages(summary: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Format the metrics of label subsets, one line per kind of features and budget."""

    def format_spread(spread: Mapping[str, float | None]) -> str:
        """Format `mean ± sd`, or `value [low, high]` if there is one subset."""
        mean, sd, low, high = (format_or_dash(spread[part]) for part in ("mean", "sd", "ci_low", "ci_high"))
        return f"{mean} [{low}, {high}]" if sd == "-" else f"{mean} ± {sd}"

    return {
        f"{row['features']}, {row['budget']} labels": ", ".join(
            f"{name.replace('_', ' ')} {format_spread(value)}" for name, value in row.items() if isinstance(value, dict)
        )
        for row in summary
    }


def format_loss(loss: Mapping[str, float | None], chance: float | None) -> str:
    """Format first, last and validation loss of a term and its chance level in one line."""
    first, last, held_out = (format_or_dash(loss[key]) for key in ("first", "last", "val"))
    return f"{first} -> {last}, held out {held_out}, chance {format_or_dash(chance)}"


def format_or_dash(value: float | None) -> str:
    """Format a number with four significant digits, None as a dash."""
    return "-" if value is None else f"{value:.4g}"


def print_source(index: Index, *, split_seed: int | None = None, rejections_file: Path | None = None) -> None:
    """Print what a command reads: files, images, subjects, classes, and what is left out; nothing with `--quiet`.

    Args:
        index: the images.
        split_seed: seed of the split by subject; None prints only splits of the source.
        rejections_file: file that the command writes with the reason of each file that is left out.
    """
    from medim.data.loading.source_summary import describe_source, warn_mixed_sizes

    warn_mixed_sizes(index)
    if logging.getLogger("medim").isEnabledFor(logging.INFO):
        _print_table(
            stderr_console, "source", describe_source(index, split_seed=split_seed, rejections_file=rejections_file)
        )


def print_result(title: str, rows: Mapping[str, Any]) -> None:
    """Print a result as a table of two columns."""
    _print_table(console, title, rows)


def _print_table(target: Console, title: str, rows: Mapping[str, Any]) -> None:
    table = Table(title=_plain_text(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # no part of a hash or path is left out
    for name, value in rows.items():
        table.add_row(_plain_text(name), _plain_text(_format_value(value)))
    target.print(table, soft_wrap=not target.is_terminal, markup=False, highlight=False)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the same keys as a table with a header; no rows print nothing."""
    if not rows:
        return
    table = Table(title=_plain_text(title), title_justify="left", box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(_plain_text(name), overflow="fold")
    for row in rows:
        table.add_row(*(_plain_text(_format_value(value)) for value in row.values()))
    (console if sys.stdout.isatty() else wide_console).print(table, markup=False, highlight=False)


def print_warning(text: str) -> None:
    """Print a warning to standard error, in colour on a terminal, also with --quiet."""
    line = Text(escape_control_characters(f"WARNING {text}"), style="bold yellow")
    stderr_console.print(line, soft_wrap=True, markup=False, highlight=False)


def _format_value(value: object) -> str:
    return format_or_dash(value) if value is None or isinstance(value, float) else str(value)


def _plain_text(text: str) -> Text:
    """Build a text in which rich interprets neither markup nor control characters."""
    return Text(escape_control_characters(text))
