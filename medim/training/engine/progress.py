"""Progress of a training: losses with chance levels, validation values and verdict; on a terminal or in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from medim.console.progress import bar_title, format_duration, shows_bars, start_live, stderr_console

log = logging.getLogger(__name__)
REFRESH_SECONDS = 0.25  # between two updates of the bar


@dataclass(frozen=True)
class ValidationStatus:
    """Result of the last validation.

    Attributes:
        step: step of the validation; 0 before the first one.
        values: validation loss or metric by name.
        verdict: verdict on the run; empty if the run has none.
    """

    step: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""


class StepLoss(NamedTuple):
    """Loss of a step, with its chance level if it has one."""

    value: float
    chance: float | None


def list_losses(outputs: Any) -> dict[str, StepLoss]:
    """List the losses of a step: terms with chance levels, or the only loss of a module."""
    outputs = outputs if isinstance(outputs, dict) else {}
    terms = {name: term for name, term in outputs.items() if hasattr(term, "chance")}
    losses = {name: StepLoss(float(term.loss.detach()), term.chance) for name, term in terms.items()}
    return losses or {name: StepLoss(float(outputs[name].detach()), None) for name in ("loss",) if name in outputs}


class TrainingProgress(Callback):
    """Base of callbacks that show the progress of a training.

    Args:
        get_status: function that returns the result of the last validation.
        after_seconds: estimated time after the last step, for validation and statistics.
        every_seconds: time between two updates.
    """

    def __init__(
        self,
        get_status: Callable[[], ValidationStatus] = ValidationStatus,
        *,
        after_seconds: float = 0.0,
        every_seconds: float,
    ) -> None:
        self._get_status, self._after_seconds, self._every_seconds = get_status, after_seconds, every_seconds
        self._start_time = self._last_time = time.monotonic()
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record the start time and step."""
        self._start_time, self._first_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Show the progress, if the last update is long enough ago."""
        now, step = time.monotonic(), trainer.global_step
        if now - self._last_time < self._every_seconds and step < trainer.max_steps:
            return
        self._last_time = now
        rate = (step - self._first_step) / max(1e-9, now - self._start_time)
        left = (trainer.max_steps - step) / rate + self._after_seconds
        self.show(trainer, f"{_format_rate(rate)}, {self._format_time_left(left)}", list_losses(outputs))

    def show(self, trainer: pl.Trainer, rate: str, losses: Mapping[str, StepLoss]) -> None:
        """Show the state after a step.

        Args:
            trainer: trainer with the number of the step.
            rate: rate and time left.
            losses: losses of the step.
        """
        raise NotImplementedError

    def _format_time_left(self, seconds: float) -> str:
        after = self._after_seconds
        part = f" ({format_duration(after)} of it after the last step)" if after >= 1 else ""
        return f"{format_duration(seconds)} left{part}"


class LineProgress(TrainingProgress):
    """Callback that logs the progress every few seconds, for output that is not a terminal."""

    def __init__(
        self,
        get_status: Callable[[], ValidationStatus] = ValidationStatus,
        *,
        after_seconds: float = 0.0,
        every_seconds: float = 5.0,
    ) -> None:
        super().__init__(get_status, after_seconds=after_seconds, every_seconds=every_seconds)

    def show(self, trainer: pl.Trainer, rate: str, losses: Mapping[str, StepLoss]) -> None:
        """Log step, rate, time left, losses, and the last validation."""
        parts = [f"step {trainer.global_step} of {trainer.max_steps}, {rate}"]
        parts += [f"{name} {loss.value:.3g}{_format_chance(loss.chance)}" for name, loss in losses.items()]
        status = self._get_status()
        values = ", ".join(f"{name} {value:.3g}" for name, value in status.values.items())
        held_out = f"; held out at step {status.step}: {values}" if values else ""
        log.info("%s%s%s", ", ".join(parts), held_out, f"; {status.verdict}" if status.verdict else "")


class BarProgress(TrainingProgress):
    """Callback that shows a bar and a table of the losses on a terminal."""

    def __init__(
        self, get_status: Callable[[], ValidationStatus] = ValidationStatus, *, after_seconds: float = 0.0
    ) -> None:
        super().__init__(get_status, after_seconds=after_seconds, every_seconds=REFRESH_SECONDS)
        title = bar_title()
        columns = [
            TextColumn(title or "training", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
        ]
        self._bar = Progress(*columns, console=stderr_console)
        self._task = self._bar.add_task("training", total=None, state="starting")
        self._live = Live(self._bar, console=stderr_console, transient=title is not None, refresh_per_second=4)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Show the bar."""
        super().on_train_start(trainer, module)
        self._bar.update(self._task, completed=trainer.global_step, total=int(trainer.max_steps))
        start_live(self._live)

    def show(self, trainer: pl.Trainer, rate: str, losses: Mapping[str, StepLoss]) -> None:
        """Update the bar and the table."""
        step, total = trainer.global_step, int(trainer.max_steps)
        self._bar.update(self._task, completed=step, total=total, state=f"step {step} of {total}, {rate}")
        self._live.update(Group(self._bar, *_build_loss_table(losses, self._get_status())))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave the last state on the terminal."""
        self._live.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the last state on the terminal."""
        self._live.stop()


def choose_progress(
    get_status: Callable[[], ValidationStatus] | None = None, *, after_seconds: float = 0.0
) -> TrainingProgress:
    """Choose a bar for a terminal, else log lines; see `TrainingProgress`."""
    kind = BarProgress if shows_bars() else LineProgress
    return kind(get_status or ValidationStatus, after_seconds=after_seconds)


def _build_loss_table(losses: Mapping[str, StepLoss], status: ValidationStatus) -> list[RenderableType]:
    """Build the table of losses with chance levels and validation values, and the line with the verdict."""
    table = Table("", "now", "chance", f"held out (step {status.step})" if status.step else "held out", box=None)
    names = dict.fromkeys([*losses, *status.values])
    for name in names:
        loss, value = losses.get(name), status.values.get(name)
        numbers = (loss and loss.value, loss and loss.chance, value)
        table.add_row(name, *("-" if number is None else f"{number:.4g}" for number in numbers))
    return [*([table] if names else []), *([status.verdict] if status.verdict else [])]


def _format_chance(chance: float | None) -> str:
    return "" if chance is None else f" (chance {chance:.3g})"


def _format_rate(rate: float) -> str:
    return f"{1 / rate:.3g} s/step" if 0 < rate < 1 else f"{rate:.1f} steps/s"
