"""What every command shares: `--quiet`, `--debug`, errors as messages and exit codes, progress, printed results."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from medim.types import UserError

console = Console()
stderr_console = Console(stderr=True)
_active_bars = ExitStack()  # bars on the terminal


def register_command(
    typer_app: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that has `--quiet` and `--debug`, and turns errors into messages and exit codes."""
    quiet = Annotated[bool, typer.Option("--quiet", help="Print results alone.")]
    debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

    def register_body(body: Callable[..., None]) -> Callable[..., None]:
        """Make a body the command; the body is returned as it was."""

        @functools.wraps(body)
        def run_command(**options: Any) -> None:
            """Run the body, and leave with the exit code of what it raises; `--help` shows the body's docstring."""
            is_quiet, with_traceback = options.pop("quiet"), options.pop("debug")
            _configure_logging(is_quiet)
            try:
                with _active_bars:
                    body(**options)
            except (UserError, OSError, ImportError, KeyboardInterrupt) as error:
                if with_traceback:
                    raise
                Console(stderr=True, soft_wrap=True).print(
                    f"medim: {_format_error(error)}", markup=False, highlight=False
                )
                raise typer.Exit(getattr(error, "exit_code", 1)) from None

        signature = inspect.signature(body, eval_str=True)
        extra_parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for name, annotation in (("quiet", quiet), ("debug", debug))
        ]
        run_command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra_parameters])  # type: ignore[attr-defined]
        run_command.__annotations__ = {p.name: p.annotation for p in run_command.__signature__.parameters.values()}  # type: ignore[attr-defined]
        typer_app.command(name)(run_command)
        return body

    return register_body


def _configure_logging(is_quiet: bool) -> None:
    """Log lines to standard error: through rich on a terminal, plain and unwrapped elsewhere."""
    if stderr_console.is_terminal:
        handler_options: dict[str, Any] = {"show_path": False, "show_level": False, "log_time_format": "%H:%M:%S"}
        handler: logging.Handler = RichHandler(console=stderr_console, markup=False, **handler_options)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("medim").setLevel(logging.WARNING if is_quiet else logging.INFO)


def _format_error(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f'this command needs {error.name}, which is not installed. Run: pip install "medim[train]"'
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. What was written is whole; the same command continues it, with --resume where it has that."
    return str(error)


def show_progress(verb: str, unit: str = "images", unit_size: int = 1) -> Callable[[int, int], None]:
    """Show how many images are done, or units of `unit_size`; a total of 0 is not known.

    A bar with rate and time left on a terminal, else a line every few seconds.
    """
    if stderr_console.is_terminal and logging.getLogger("medim").isEnabledFor(logging.INFO):
        return _build_bar(verb, unit, unit_size)
    last = time.monotonic()

    def log_progress(done: int, total: int) -> None:
        """Log how many are done, at most every 5 s and at the end."""
        nonlocal last
        if done == total or time.monotonic() - last > 5:
            last = time.monotonic()
            total_text = f" of {total // unit_size}" if total else ""
            logging.getLogger("medim").info("%s %d%s %s", verb, done // unit_size, total_text, unit)

    return log_progress


def _build_bar(verb: str, unit: str, unit_size: int) -> Callable[[int, int], None]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn(f"{{task.fields[rate]}} {unit}/s")
    bar = Progress(
        TextColumn(verb), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=stderr_console
    )
    task = bar.add_task(verb, total=None, rate="-")

    def update_bar(done: int, total: int) -> None:
        """Move the bar, which the first call shows and the last one stops."""
        if not bar.live.is_started:
            _active_bars.callback(bar.stop)  # also where an error ends the work
        bar.start()
        speed = bar.tasks[task].speed
        bar.update(task, completed=done // unit_size, total=total // unit_size or None, rate=format_or_dash(speed))
        if done == total:
            bar.stop()

    return update_bar


def format_intervals(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Each metric with its interval, as text."""
    rows = metrics.get("metrics", metrics)
    return {
        k: f"{format_or_dash(v['value'])} [{format_or_dash(v['ci_low'])}, {format_or_dash(v['ci_high'])}]"
        for k, v in rows.items()
        if isinstance(v, dict)
    }


def format_averages(summary: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Mean and standard deviation over label subsets, a line for each kind of features and each budget."""

    def format_spread(spread: Mapping[str, float | None]) -> str:
        """`mean ± sd`; the mean alone where there is one subset."""
        mean, sd = ("-" if value is None else f"{value:.3f}" for value in (spread["mean"], spread["sd"]))
        return mean if sd == "-" else f"{mean} ± {sd}"

    return {
        f"{row['features']}, {row['budget']} labels": f"auroc {format_spread(row['auroc'])}, "
        f"balanced accuracy {format_spread(row['balanced_accuracy'])}"
        for row in summary
    }


def format_loss(loss: Mapping[str, float | None], chance: float | None) -> str:
    """A term's losses in one line."""
    first, last, held_out = (format_or_dash(loss[key]) for key in ("first", "last", "held_out"))
    return f"{first} -> {last}, held out {held_out}, chance {format_or_dash(chance)}"


def format_or_dash(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def print_result(title: str, rows: Mapping[str, Any]) -> None:
    """Print a result as a small table."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, format_or_dash(value) if value is None or isinstance(value, float) else str(value))
    console.print(table, soft_wrap=not sys.stdout.isatty(), markup=False, highlight=False)
