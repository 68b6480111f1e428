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
messages = Console(stderr=True)
_running = ExitStack()  # bars on the terminal


def command(on: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that has `--quiet` and `--debug`, and turns errors into messages and exit codes."""
    quiet = Annotated[bool, typer.Option("--quiet", help="Print results alone.")]
    debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

    def register(body: Callable[..., None]) -> Callable[..., None]:
        """Make a body the command; the body is returned as it was."""

        @functools.wraps(body)
        def run(**options: Any) -> None:
            """Run the body, and leave with the exit code of what it raises; `--help` shows the body's docstring."""
            quietly, tracing = options.pop("quiet"), options.pop("debug")
            _log(quietly)
            try:
                with _running:
                    body(**options)
            except (UserError, OSError, ImportError, KeyboardInterrupt) as error:
                if tracing:
                    raise
                Console(stderr=True, soft_wrap=True).print(f"medim: {_message(error)}", markup=False, highlight=False)
                raise typer.Exit(getattr(error, "exit_code", 1)) from None

        own = inspect.signature(body, eval_str=True)
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for name, annotation in (("quiet", quiet), ("debug", debug))
        ]
        run.__signature__ = own.replace(parameters=[*own.parameters.values(), *extra])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
        on.command(name)(run)
        return body

    return register


def _log(quietly: bool) -> None:
    """Log lines to standard error: through rich on a terminal, plain and unwrapped elsewhere."""
    if messages.is_terminal:
        form: dict[str, Any] = {"show_path": False, "show_level": False, "log_time_format": "%H:%M:%S"}
        handler: logging.Handler = RichHandler(console=messages, markup=False, **form)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("medim").setLevel(logging.WARNING if quietly else logging.INFO)


def _message(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f'this command needs {error.name}, which is not installed. Run: pip install "medim[train]"'
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. What was written is whole; the same command continues it, with --resume where it has that."
    return str(error)


def progress(verb: str, unit: str = "images", per: int = 1) -> Callable[[int, int], None]:
    """Show how many images are done, or units of `per`; a total of 0 is not known.

    A bar with rate and time left on a terminal, else a line every few seconds.
    """
    if messages.is_terminal and logging.getLogger("medim").isEnabledFor(logging.INFO):
        return _bar(verb, unit, per)
    last = time.monotonic()

    def say(done: int, total: int) -> None:
        """Log how many are done, at most every 5 s and at the end."""
        nonlocal last
        if done == total or time.monotonic() - last > 5:
            last = time.monotonic()
            of = f" of {total // per}" if total else ""
            logging.getLogger("medim").info("%s %d%s %s", verb, done // per, of, unit)

    return say


def _bar(verb: str, unit: str, per: int) -> Callable[[int, int], None]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn(f"{{task.fields[rate]}} {unit}/s")
    bar = Progress(TextColumn(verb), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=messages)
    task = bar.add_task(verb, total=None, rate="-")

    def say(done: int, total: int) -> None:
        """Move the bar, which the first call shows and the last one stops."""
        if not bar.live.is_started:
            _running.callback(bar.stop)  # also where an error ends the work
        bar.start()
        speed = bar.tasks[task].speed
        bar.update(task, completed=done // per, total=total // per or None, rate=number(speed))
        if done == total:
            bar.stop()

    return say


def intervals(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Each metric with its interval, as text."""
    rows = metrics.get("metrics", metrics)
    return {
        k: f"{number(v['value'])} [{number(v['ci_low'])}, {number(v['ci_high'])}]"
        for k, v in rows.items()
        if isinstance(v, dict)
    }


def averages(summary: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Mean and standard deviation over label subsets, a line for each kind of features and each budget."""

    def text(spread: Mapping[str, float | None]) -> str:
        """`mean ± sd`; the mean alone where there is one subset."""
        mean, sd = ("-" if value is None else f"{value:.3f}" for value in (spread["mean"], spread["sd"]))
        return mean if sd == "-" else f"{mean} ± {sd}"

    return {
        f"{row['features']}, {row['budget']} labels": f"auroc {text(row['auroc'])}, "
        f"balanced accuracy {text(row['balanced_accuracy'])}"
        for row in summary
    }


def curve(loss: Mapping[str, float | None], chance: float | None) -> str:
    """A term's losses in one line."""
    first, last, held_out = (number(loss[key]) for key in ("first", "last", "held_out"))
    return f"{first} -> {last}, held out {held_out}, chance {number(chance)}"


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def show(title: str, rows: Mapping[str, Any]) -> None:
    """Print a result as a small table."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, number(value) if value is None or isinstance(value, float) else str(value))
    console.print(table, soft_wrap=not sys.stdout.isatty(), markup=False, highlight=False)
