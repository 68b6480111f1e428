"""What a run shows of itself: every loss against its chance level, the spread of the summaries, and a verdict."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch

from medim.evaluation.features import feature_std, rankme
from medim.files import write_csv
from medim.objectives import Term

Verdict = Literal["learning", "at-chance", "collapsed", "diverged"]
PATIENCE = 25  # steps
KEPT = ("rows", "held_out", "held_out_step", "rankme", "feature_std", "diverged")  # in a checkpoint
COLUMNS = ("step", "name", "loss", "chance", "held_out")


class History(pl.Callback):
    """Records each step's losses and each validation's, and keeps them through a resume.

    Args:
        stop_on_collapse: end the run where a loss has stayed a nat above its chance level for `PATIENCE` steps, or the
            held-out summaries have collapsed.
        summary_trained: whether an objective reads the summary; if none does, its collapse says nothing of the run.

    Attributes:
        rows: (step, name, training loss or None, chance or None, held-out loss or None).
        held_out: name to (mean, standard error) of the last validation. A held-out batch with fewer subjects than a
            training batch has fewer classes and a lower chance level: its losses are moved to the training level, so
            that chance minus loss is what it is on the held-out batch.
        held_out_step: the step of that validation.
        rankme: effective rank of the held-out summaries; feature_std: their spread (1 isotropic, 0 collapsed).
        diverged: a training loss stopped being a number, or (with `stop_on_collapse`) stayed far above chance.
    """

    def __init__(self, *, stop_on_collapse: bool = False, summary_trained: bool = True) -> None:
        self._stop = stop_on_collapse
        self._summary_trained = summary_trained
        self._above: dict[str, int] = defaultdict(int)  # steps a term has been far above chance
        self.rows: list[tuple[int, str, float | None, float | None, float | None]] = []
        self.held_out: dict[str, tuple[float, float]] = {}
        self.held_out_step = -1
        self.rankme = self.feature_std = math.nan
        self.diverged = False
        self._losses: dict[str, list[float]] = defaultdict(list)
        self._summaries: list[torch.Tensor] = []
        self._ended = self._began = time.perf_counter()
        self._waited = self._worked = 0.0
        self._steps = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        """Note how long the step waited for its data."""
        self._began = time.perf_counter()
        self._waited += self._began - self._ended if self._steps else 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Record the step's losses and diagnostics; stop where one is not finite."""
        step, metrics = trainer.global_step, {}
        terms: dict[str, Term] = outputs
        for name, term in terms.items():
            values = {name: term.loss, **{f"{name}/{key}": value for key, value in term.diagnostics.items()}}
            for key, value in values.items():
                number = float(value.detach())
                self.rows.append(
                    (step, key, number if math.isfinite(number) else None, term.chance if key == name else None, None)
                )
                metrics[key] = number
                self.diverged |= not math.isfinite(number)
            far = term.chance is not None and float(term.loss.detach()) > term.chance + 1.0
            self._above[name] = self._above[name] + 1 if far else 0
        self.diverged |= self._stop and max(self._above.values(), default=0) >= PATIENCE
        if trainer.logger and step % max(1, int(trainer.max_steps) // 200) == 0:
            trainer.logger.log_metrics(metrics, step)
        trainer.should_stop |= self.diverged
        self._ended = time.perf_counter()
        self._worked += self._ended - self._began
        self._steps += 1

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Forget the last validation."""
        self._losses.clear()
        self._summaries.clear()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        """Keep the batch's losses, diagnostics and summaries."""
        for name, term in outputs["terms"].items():
            below = 0.0 if term.chance is None else self._chance(name, term) - term.chance
            self._losses[name].append(float(term.loss) + below)
            for key, value in term.diagnostics.items():
                self._losses[f"{name}/{key}"].append(float(value))
        self._summaries.append(outputs["summary"].float().cpu())

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Average the held-out losses; measure the summaries' rank and spread."""
        self.held_out_step = trainer.global_step
        summaries = torch.cat(self._summaries).numpy()
        self.rankme, self.feature_std = (
            float(f(summaries)) if np.isfinite(summaries).all() else 0.0 for f in (rankme, feature_std)
        )
        for name, values in self._losses.items():
            error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
            self.held_out[name] = (float(np.mean(values)), error)
            self.rows.append((trainer.global_step, name, None, None, self.held_out[name][0]))
        self.rows.append((trainer.global_step, "rankme", None, None, self.rankme))
        if trainer.logger:
            held_out = {f"held_out/{name}": mean for name, (mean, _) in self.held_out.items()}
            trainer.logger.log_metrics(
                {**held_out, "rankme": self.rankme, "feature_std": self.feature_std}, trainer.global_step
            )
        trainer.should_stop |= self._stop and self.collapsed
        self._ended = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in KEPT} | {"above": dict(self._above)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's history."""
        for name in KEPT:
            setattr(self, name, state[name])
        self.rows = [tuple(row) for row in state["rows"]]
        self._above.update(state["above"])

    def write(self, path: Path) -> None:
        """Write the rows as CSV."""
        write_csv(path, COLUMNS, self.rows)

    def curve(self, name: str) -> list[float]:
        """A term's training losses, step by step; NaN where it was not finite."""
        return [
            math.nan if loss is None else loss
            for _, n, loss, _, held_out in self.rows
            if n == name and held_out is None
        ]

    def chance(self) -> dict[str, float | None]:
        """Chance level of each term at its first step; a term of several has a slash in its name.

        Where the level differs between batches (a mask of the foreground changes the number of classes), held-out
        losses are moved to that of the first step, too. A diagnostic has no chance level.
        """
        found: dict[str, float | None] = {}
        for _, name, loss, chance, _ in self.rows:
            if loss is not None and (chance is not None or "/" not in name):
                found.setdefault(name, chance)
        return found

    @property
    def collapsed(self) -> bool:
        """Whether the held-out summaries lie on one point or line, though an objective trains them."""
        return self._summary_trained and (self.rankme < 1.5 or self.feature_std < 0.05)

    def _chance(self, name: str, term: Term) -> float:
        level = self.chance().get(name, term.chance)
        return level if level is not None else math.nan

    def diagnostics(self) -> dict[str, dict[str, float | None]]:
        """What objectives show beside their losses: mean of the last twenty steps, and the held-out value."""
        terms = self.chance()
        names = dict.fromkeys(name for _, name, *_ in self.rows if name not in {*terms, "rankme"})
        last = {name: [v for v in self.curve(name)[-20:] if math.isfinite(v)] for name in names}
        held_out = {name: mean for name, (mean, _) in self.held_out.items() if math.isfinite(mean)}
        return {
            name: {"last": sum(values) / len(values) if values else None, "held_out": held_out.get(name)}
            for name, values in last.items()
        }

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of a step, without waiting for data."""
        return self._worked / max(1, self._steps)

    @property
    def data_wait_fraction(self) -> float:
        """Share of the time between the first step and the last spent waiting for data."""
        return self._waited / max(1e-9, self._waited + self._worked)


def verdict(history: History) -> Verdict:
    """One word on a run; see `summary.json` in docs/reference/files.md.

    `learning`: every term that has a chance level is below it, held out, by at least 5 % of it (of 1 nat where it is
    0) and three standard errors; where no term has one, its first training loss takes the place. `diverged`: a loss
    stopped being a number, or a term ends above chance by as much. `collapsed`: the held-out summaries lie on one
    point or line (RankMe below 1.5, or feature_std below 0.05).
    """
    levels = {name: chance for name, chance in history.chance().items() if chance is not None}
    if not levels:
        levels = {name: history.curve(name)[0] for name in history.chance()}
    margins = []
    for name, level in levels.items():
        if name in history.held_out:
            mean, error = history.held_out[name]
            margins.append((level - mean, max(0.05 * (abs(level) or 1.0), 3 * error)))
    if history.diverged or any(not math.isfinite(gain) or gain < -need for gain, need in margins):
        return "diverged"
    if history.collapsed:
        return "collapsed"
    return "learning" if margins and all(gain >= need for gain, need in margins) else "at-chance"
