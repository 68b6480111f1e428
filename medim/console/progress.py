"""Progress of long work: a bar with rate and time left on a terminal, else log lines."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.live import Live

SECONDS_PER_LINE = 5.0  # between two log lines
stderr_console = Console(stderr=True, emoji=False)
active_bars = ExitStack()  # bars on the terminal, closed at the end of a command
_title: ContextVar[str | None] = ContextVar("title", default=None)


def shows_bars() -> bool:
    """Whether progress is shown as bars: on a terminal, without `--quiet`, or inside `titled_bars`."""
    is_loud = logging.getLogger("medim").isEnabledFor(logging.INFO) or _title.get() is not None
    return stderr_console.is_terminal and is_loud


@contextmanager
def titled_bars(title: str) -> Iterator[None]:
    """Show bars inside the block even if log lines are turned off, with a title, and remove them when they are full."""
    token = _title.set(title)
    try:
        yield
    finally:
        _title.reset(token)


def bar_title() -> str | None:
    """Title of the bars, see `titled_bars`; None outside of it."""
    return _title.get()


def show_progress(verb: str, unit: str = "images", unit_size: int = 1) -> Callable[[int, int], None]:
    """Show progress: a bar with rate and time left on a terminal, else a log line every few seconds.

    Args:
        verb: past participle that starts the line, such as "preprocessed".
        unit: plural noun of the items.
        unit_size: number of counts per item, such as 10**6 for bytes shown as MB.

    Returns:
        Function of the finished count and the total; a total of 0 means unknown.
    """
    if shows_bars():
        return _build_bar(verb, unit, unit_size)
    last = time.monotonic()

    def log_progress(done: int, total: int) -> None:
        """Log the count at most every 5 s and at the end."""
        nonlocal last
        if done == total or time.monotonic() - last > SECONDS_PER_LINE:
            last = time.monotonic()
            total_text = f" of {total // unit_size}" if total else ""
            logging.getLogger("medim").info("%s %d%s %s", verb, done // unit_size, total_text, unit)

    return log_progress


def _build_bar(verb: str, unit: str, unit_size: int) -> Callable[[int, int], None]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate, title = TextColumn(f"{{task.fields[rate]}} {unit}/s"), bar_title()
    columns = [TextColumn(f"{title}: {verb}" if title else verb, markup=False), BarColumn(), MofNCompleteColumn(), rate]
    bar = Progress(*columns, TimeRemainingColumn(), console=stderr_console, transient=title is not None)
    task = bar.add_task(verb, total=None, rate="-")

    def update_bar(done: int, total: int) -> None:
        """Update the bar; the first call shows it and the last one stops it."""
        start_live(bar.live)
        speed = bar.tasks[task].speed
        text = "-" if speed is None else f"{speed:.4g}"
        bar.update(task, completed=done // unit_size, total=total // unit_size or None, rate=text)
        if done == total:
            bar.stop()

    return update_bar


def start_live(live: Live) -> None:
    """Show a changing part of the terminal, until it or the command ends; no effect if it is shown already."""
    if not live.is_started:
        active_bars.callback(live.stop)  # also where an error ends the work
        live.start()


def format_duration(seconds: float) -> str:
    """Format a duration with its two largest units.

    Examples:
        >>> format_duration(81), format_duration(754), format_duration(7500)
        ('81 s', '13 min', '2 h 5 min')
    """
    if not math.isfinite(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
