"""History of a pretraining run: losses with chance levels, metrics of the encoder, and the verdict."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

from medim.files import write_csv
from medim.metrics.representation import feature_std, rankme
from medim.objectives import Term
from medim.training.engine.progress import ValidationStatus
from medim.training.engine.tracking_logger import set_tag
from medim.training.pretrain.checkpoint_selection import CheckpointSelection
from medim.training.pretrain.verdict import (
    ADVICE,
    TrainingVerdict,
    VerdictReport,
    describe_collapse,
    describe_shrinkage,
    judge_run,
)

log = logging.getLogger(__name__)
DIVERGENCE_PATIENCE = 25  # steps
# Every run is validated at this step; before it, the verdicts weak and at-chance are not reported.
FIRST_VALIDATION_STEP = 250
HISTORY_COLUMNS = ("step", "name", "loss", "chance", "val")
ENCODER_METRIC_NAMES = ("rankme", "feature_std", "weight_norm", "alignment", "uniformity", "probe", "probe_error")
NON_OBJECTIVE_PREFIXES = ("gradient_norm/", "verdict/")  # prefixes of rows that do not belong to an objective
EncoderMetric = Callable[[nn.Module], Mapping[str, float]]


class MetricHistory(pl.Callback):
    """Records losses and metrics of steps and validations, and reports changes of the verdict; saved in checkpoints.

    Args:
        stop_on_collapse: whether to end the run if a loss has been one nat or more above its chance level for
            `DIVERGENCE_PATIENCE` steps, or the validation summaries have collapsed.
        summary_trained: whether an objective uses the summary; if not, a collapsed summary does not affect the verdict.
        encoder_metrics: other metrics of the encoder at each validation; see `medim.training.pretrain.online_probe`.
        selection: selection of the step to save the weights of; None disables selection.
        weights: weight by objective in the validation loss for the selection; the default is 1. An objective of weight
            0 has no effect on the verdict.
        first_norm: norm of the encoder weights before the first step, the reference of the metric `weight_norm`.
        shortfall: first sentence of the advice, if the run is shorter than its preset; see `describe_shortfall`.

    Attributes:
        on_validated: function without arguments, called after each validation.
        status: last validation losses and the verdict, for the progress.
        rows: (step, name, training loss or None, chance or None, validation loss or None).
        held_out: (mean, standard error) of the last validation by term. A validation batch with fewer subjects than a
            training batch has fewer classes and a lower chance level; its losses are shifted to the chance level of
            training, so that chance minus loss is that of the validation batch.
        held_out_step: step of that validation.
        measures: `rankme`, effective rank of the validation summaries, `feature_std`, their spread (1 isotropic, 0
            collapsed), and the results of the encoder metrics.
        has_diverged: whether a training loss was not finite, or (with `stop_on_collapse`) stayed far above chance.
        verdict_changes: (step, verdict, reason) of each change of the verdict.
    """

    def __init__(
        self,
        *,
        stop_on_collapse: bool = False,
        summary_trained: bool = True,
        encoder_metrics: Sequence[EncoderMetric] = (),
        selection: CheckpointSelection | None = None,
        weights: Mapping[str, float] | None = None,
        first_norm: float = 0.0,
        shortfall: str = "",
    ) -> None:
        self._stop_on_collapse = stop_on_collapse
        self._summary_trained = summary_trained
        self._encoder_metrics = encoder_metrics
        self.selection = selection
        self._weights = weights or {}
        self._first_norm = first_norm
        self._shortfall = shortfall
        self.on_validated: Callable[[], None] = lambda: None
        self.status = ValidationStatus()
        self._steps_above_chance: dict[str, int] = defaultdict(
            int
        )  # steps for which a term has been far above chance without a new minimum
        self._lowest_losses: dict[str, float] = {}  # lowest loss of each term so far
        self._non_finite = self._above_chance = ""
        self.rows: list[tuple[int, str, float | None, float | None, float | None]] = []
        self.held_out: dict[str, tuple[float, float]] = {}
        self.held_out_step = -1
        self.measures: dict[str, float] = {}
        self.verdict_changes: list[tuple[int, TrainingVerdict, str]] = []
        self._loader: Iterable[Any] | None = None
        self._every = 0
        self._losses: dict[str, list[float]] = defaultdict(list)
        self._summaries: list[torch.Tensor] = []
        self._step_end = self._step_start = time.perf_counter()
        self._wait_seconds = self._compute_seconds = 0.0
        self._n_steps = 0

    def set_validation(self, loader: Iterable[Any] | None, *, every: int) -> None:
        """Set the validation batches for an additional validation at `FIRST_VALIDATION_STEP`.

        Args:
            loader: validation batches, or None.
            every: number of steps between two validations.
        """
        self._loader, self._every = loader, every

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record the start time."""
        self._step_end = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        """Measure how long the step waited for its data."""
        self._step_start = time.perf_counter()
        self._wait_seconds += self._step_start - self._step_end if self._n_steps else 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Record losses, diagnostics and gradient norms of the step; stop the run if a value is not finite."""
        step, metrics = trainer.global_step, {}
        terms: dict[str, Term] = {name: term for name, term in outputs.items() if isinstance(term, Term)}
        for name, term in terms.items():
            values = {name: term.loss, **{f"{name}/{key}": value for key, value in term.diagnostics.items()}}
            for key, value in values.items():
                metrics[key] = self._add_row(step, key, float(value.detach()), term.chance if key == name else None)
                if not math.isfinite(metrics[key]) and self._weight(name):
                    self._non_finite = self._non_finite or f"{key} was {metrics[key]} at step {step}"
            if self._weight(name):
                self._track_divergence(step, name, metrics[name], term.chance)
        for part, norm in outputs.get("gradient_norms", {}).items():
            metrics[f"gradient_norm/{part}"] = self._add_row(step, f"gradient_norm/{part}", float(norm), None)
        if trainer.logger and step % max(1, int(trainer.max_steps) // 200) == 0:
            trainer.logger.log_metrics(metrics, step)
        if self._non_finite or any(count == DIVERGENCE_PATIENCE for count in self._steps_above_chance.values()):
            self._report_verdict(trainer, VerdictReport("diverged", self._non_finite or self._above_chance))
        trainer.should_stop |= self.has_diverged
        self._step_end = time.perf_counter()
        self._compute_seconds += self._step_end - self._step_start
        self._n_steps += 1
        if (
            step == FIRST_VALIDATION_STEP < trainer.max_steps
            and self._every
            and step % self._every
            and not self._non_finite
        ):
            self._validate_now(trainer, module)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Clear the data of the last validation."""
        self._losses.clear()
        self._summaries.clear()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        """Collect losses, diagnostics and summaries of the batch."""
        for name, term in outputs["terms"].items():
            shift = 0.0 if term.chance is None else self._chance_level(name, term) - term.chance
            self._losses[name].append(float(term.loss) + shift)
            for key, value in term.diagnostics.items():
                self._losses[f"{name}/{key}"].append(float(value))
        self._summaries.append(outputs["summary"].float().cpu())

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Average the validation losses, compute the metrics, update the selection and the verdict."""
        step = self.held_out_step = trainer.global_step
        summaries = torch.cat(self._summaries).numpy()
        self.measures = {
            f.__name__: float(f(summaries)) if np.isfinite(summaries).all() else 0.0 for f in (rankme, feature_std)
        }
        for metric in self._encoder_metrics:
            self.measures.update(metric(module.encoder))  # type: ignore[arg-type]  # the pretraining module has an encoder
        for name, values in self._losses.items():
            error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
            self.held_out[name] = (float(np.mean(values)), error)
            self.rows.append((step, name, None, None, self.held_out[name][0]))
        for name, value in self.measures.items():
            self.rows.append((step, name, None, None, value if math.isfinite(value) else None))
        if trainer.logger:
            losses = {f"val/{name}": mean for name, (mean, _) in self.held_out.items()}
            trainer.logger.log_metrics({**losses, **self.measures}, step)
        if self.selection is not None:
            self.selection.update(step, *self._selection_score(), self._selection_metrics(), module)
        report = self.compute_verdict()
        if report.verdict not in ("weak", "at-chance") or step >= min(FIRST_VALIDATION_STEP, trainer.max_steps):
            self._report_verdict(trainer, report)
        trainer.should_stop |= self._stop_on_collapse and (self.has_collapsed or report.verdict == "collapsed")
        self._update_status(report)
        self.on_validated()
        self._step_end = time.perf_counter()

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints."""
        # The default is the class name. The class was named History before, and a checkpoint of that time must be read.
        return "History"

    def state_dict(self) -> dict[str, Any]:
        """Build the state for checkpoints, on which later rows, the verdict and the selection depend."""
        return {
            "rows": self.rows,
            "held_out": self.held_out,
            "held_out_step": self.held_out_step,
            "measures": self.measures,
            "above": dict(self._steps_above_chance),
            "lowest": self._lowest_losses,
            "broken": self._non_finite,
            "strayed": self._above_chance,
            "said": self.verdict_changes,
            "selection": self.selection.state_dict() if self.selection else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.rows = [tuple(row) for row in state["rows"]]
        self.held_out = {name: tuple(pair) for name, pair in state["held_out"].items()}
        self.held_out_step, self.measures = state["held_out_step"], dict(state["measures"])
        self._steps_above_chance, self._lowest_losses = defaultdict(int, state["above"]), dict(state.get("lowest", {}))
        self._non_finite, self._above_chance = state["broken"], state["strayed"]
        self.verdict_changes = [tuple(change) for change in state["said"]]
        if self.selection and state["selection"]:
            self.selection.load_state_dict(state["selection"])
        if self.held_out:
            self._update_status(self.compute_verdict())

    def write(self, path: Path) -> None:
        """Write the rows as CSV."""
        write_csv(path, HISTORY_COLUMNS, self.rows)

    def curve(self, name: str) -> list[float]:
        """List the training losses of a term by step; NaN if not finite."""
        return [
            math.nan if loss is None else loss
            for _, n, loss, _, held_out in self.rows
            if n == name and held_out is None
        ]

    def chance_levels(self) -> dict[str, float | None]:
        """Get the chance level of each term at its first step, by name; names of several terms contain a slash.

        If the level differs between batches (a foreground mask changes the number of classes), validation losses are
        also shifted to the level of the first step. Diagnostics have no chance level.
        """
        levels: dict[str, float | None] = {}
        for _, name, loss, chance, _ in self.rows:
            if loss is not None and (chance is not None or "/" not in name):
                levels.setdefault(name, chance)
        return levels

    @property
    def rankme(self) -> float:
        """Effective rank of the validation summaries; NaN before the first validation."""
        return self.measures.get("rankme", math.nan)

    @property
    def feature_std(self) -> float:
        """Spread of the validation summaries; NaN before the first validation."""
        return self.measures.get("feature_std", math.nan)

    @property
    def has_diverged(self) -> bool:
        """Whether a training loss was not finite, or (with `stop_on_collapse`) stayed far above chance."""
        return bool(self._non_finite or (self._stop_on_collapse and self._above_chance))

    @property
    def has_collapsed(self) -> bool:
        """Whether the validation summaries have collapsed to a point or line, although an objective trains them."""
        return bool(self._describe_collapse())

    def compute_verdict(self) -> VerdictReport:
        """Compute the current verdict with the reason."""
        trained_levels = {name: chance for name, chance in self.chance_levels().items() if self._weight(name)}
        levels = {name: chance for name, chance in trained_levels.items() if chance is not None}
        has_chance = bool(levels)
        if not has_chance:
            levels = {name: self.curve(name)[0] for name in trained_levels}
        non_finite = self._non_finite or (self._above_chance if self._stop_on_collapse else "")
        weight_shrinkage = describe_shrinkage(self.measures.get("weight_norm", math.nan), self._first_norm)
        return judge_run(
            levels,
            self.held_out,
            has_chance=has_chance,
            non_finite=non_finite,
            above_chance=self._above_chance,
            collapse=self._describe_collapse(),
            weight_shrinkage=weight_shrinkage,
        )

    def advice(self, verdict: TrainingVerdict) -> str:
        """Advice for a verdict; for an encoder that has learnt too little, first the number of missing steps if any."""
        return f"{self._shortfall} {ADVICE[verdict]}".strip() if verdict in ("weak", "at-chance") else ADVICE[verdict]

    def _update_status(self, report: VerdictReport) -> None:
        """Update the last validation losses of the terms, without diagnostics, and the verdict."""
        terms, step = self.chance_levels(), max(0, self.held_out_step)
        values = {name: mean for name, (mean, _) in self.held_out.items() if name in terms}
        self.status = ValidationStatus(step, values, f"verdict at step {step}: {report.verdict}")

    def _describe_collapse(self) -> str:
        return describe_collapse(self.rankme, self.feature_std) if self._summary_trained else ""

    def _add_row(self, step: int, name: str, value: float, chance: float | None) -> float:
        self.rows.append((step, name, value if math.isfinite(value) else None, chance, None))
        return value

    def _track_divergence(self, step: int, name: str, loss: float, chance: float | None) -> None:
        """Count the steps for which a loss has been far above chance; a new minimum resets the count."""
        if loss < self._lowest_losses.get(name, math.inf):
            self._lowest_losses[name], self._steps_above_chance[name] = loss, 0
        self._steps_above_chance[name] = (
            self._steps_above_chance[name] + 1 if chance is not None and loss > chance + 1.0 else 0
        )
        if self._steps_above_chance[name] == DIVERGENCE_PATIENCE:
            self._above_chance = (
                f"{name}: one nat or more above its chance level {chance:.3g} for {DIVERGENCE_PATIENCE} steps up to "
                f"step {step}, without a new minimum, last {loss:.3g}"
            )

    def _validate_now(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Validate now, in the same way as Lightning."""
        if self._loader is None or self.held_out_step == trainer.global_step:
            return
        self.on_validation_start(trainer, module)
        module.eval()
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for index, batch in enumerate(self._loader):
                batch = trainer.precision_plugin.convert_input(batch)
                outputs = module.validation_step(trainer.strategy.batch_to_device(batch), index)
                self.on_validation_batch_end(trainer, module, outputs, batch, index)
        module.train()
        self.on_validation_end(trainer, module)

    def _report_verdict(self, trainer: pl.Trainer, report: VerdictReport) -> None:
        """Report a changed verdict: log entry, history, and tag of the tracked run."""
        if self.verdict_changes and self.verdict_changes[-1][1] == report.verdict:
            return
        step = trainer.global_step
        self.verdict_changes.append((step, *report))
        self.rows.append((step, f"verdict/{report.verdict}", None, None, None))
        if report.verdict == "learning":
            log.info("step %d: learning (%s)", step, report.why)
        else:
            log.warning("step %d: %s (%s). Advice: %s", step, report.verdict, report.why, self.advice(report.verdict))
        if trainer.logger:
            set_tag(trainer.logger, "verdict", report.verdict)
            set_tag(trainer.logger, "verdict_step", str(step))

    def _weight(self, term: str) -> float:
        """Weight of the objective of a term."""
        return self._weights.get(term.partition("/")[0], 1.0)

    def _weighted_loss(self) -> tuple[float, float]:
        """Compute the weighted validation loss with its error, of the terms with a chance level, or of all terms."""
        levels = self.chance_levels()
        trained_terms = [name for name in levels if self._weight(name)]
        terms = [name for name in trained_terms if levels[name] is not None] or trained_terms
        pairs = [(self._weight(name), *self.held_out[name]) for name in terms if name in self.held_out]
        error = math.sqrt(sum((weight * error) ** 2 for weight, _, error in pairs))
        return sum(weight * mean for weight, mean, _ in pairs), error

    def _selection_score(self) -> tuple[float, float]:
        """Compute the score for the selection (higher is better) and its error; NaN excludes the step."""
        loss, error = self._weighted_loss()
        if self.has_collapsed or self._non_finite or not math.isfinite(loss):
            return math.nan, 0.0
        return (self.measures["probe"], self.measures["probe_error"]) if "probe" in self.measures else (-loss, error)

    def _selection_metrics(self) -> dict[str, float]:
        return {"val_loss": self._weighted_loss()[0], **self.measures}

    def _chance_level(self, name: str, term: Term) -> float:
        level = self.chance_levels().get(name, term.chance)
        return level if level is not None else math.nan

    def diagnostics(self) -> dict[str, dict[str, float | None]]:
        """Summarise the diagnostics of the objectives: mean of the last twenty steps, and validation value."""
        terms = self.chance_levels()
        others = (name for _, name, *_ in self.rows if name not in terms and name not in ENCODER_METRIC_NAMES)
        names = dict.fromkeys(name for name in others if not name.startswith(NON_OBJECTIVE_PREFIXES))
        last = {name: [v for v in self.curve(name)[-20:] if math.isfinite(v)] for name in names}
        held_out = {name: mean for name, (mean, _) in self.held_out.items() if math.isfinite(mean)}
        return {
            name: {"last": sum(values) / len(values) if values else None, "val": held_out.get(name)}
            for name, values in last.items()
        }

    @property
    def seconds_per_step(self) -> float:
        """Mean duration of a step in seconds, without waiting for data."""
        return self._compute_seconds / max(1, self._n_steps)

    @property
    def dataloader_wait_fraction(self) -> float:
        """Fraction of the time between the first and the last step that was spent waiting for data."""
        return self._wait_seconds / max(1e-9, self._wait_seconds + self._compute_seconds)
