"""What a run shows of itself: every loss against its chance level, the health of the summaries, and a verdict."""

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
from medim.training.pretrain.checkpoint_selection import Selection
from medim.training.pretrain.verdict import ADVICE, Finding, Verdict, flatness, judge, shrinkage
from medim.training.tracking.tracking import tag

log = logging.getLogger(__name__)
PATIENCE = 25  # steps
FIRST_LOOK = 250  # the step by which every run is measured; before it, being at chance is not worth a warning
COLUMNS = ("step", "name", "loss", "chance", "held_out")
MEASURES = ("rankme", "feature_std", "weight_norm", "alignment", "uniformity", "probe", "probe_error")
BESIDE = ("gradient_norm/", "verdict/")  # how other rows begin that are no objective's
Gauge = Callable[[nn.Module], Mapping[str, float]]


class History(pl.Callback):
    """Records each step's losses and each validation's, says the verdict where it changes, and lives through a resume.

    Args:
        stop_on_collapse: end the run where a loss has stayed a nat above its chance level for `PATIENCE` steps, or the
            held-out summaries have collapsed.
        summary_trained: whether an objective reads the summary; if none does, its collapse says nothing of the run.
        gauges: what else is measured of the encoder at each validation; see `medim.training.pretrain.online_probe`.
        selection: keeps the weights of the step whose encoder the run leaves; None keeps none.
        weights: objective to its weight in the held-out loss that the selection reads; 1 where it is not given.
        first_norm: of the encoder's weights before the first step, to which the gauge `weight_norm` is held.

    Attributes:
        rows: (step, name, training loss or None, chance or None, held-out loss or None).
        held_out: name to (mean, standard error) of the last validation. A held-out batch with fewer subjects than a
            training batch has fewer classes and a lower chance level: its losses are moved to the training level, so
            that chance minus loss is what it is on the held-out batch.
        held_out_step: the step of that validation.
        measures: `rankme`, effective rank of the held-out summaries, `feature_std`, their spread (1 isotropic, 0
            collapsed), and what the gauges gave.
        diverged: a training loss stopped being a number, or (with `stop_on_collapse`) stayed far above chance.
        said: (step, verdict, why) wherever the verdict changed.
    """

    def __init__(
        self,
        *,
        stop_on_collapse: bool = False,
        summary_trained: bool = True,
        gauges: Sequence[Gauge] = (),
        selection: Selection | None = None,
        weights: Mapping[str, float] | None = None,
        first_norm: float = 0.0,
    ) -> None:
        self._stop = stop_on_collapse
        self._summary_trained = summary_trained
        self._gauges = gauges
        self.selection = selection
        self._weights = weights or {}
        self._first_norm = first_norm
        self._above: dict[str, int] = defaultdict(int)  # steps a term has been far above chance without falling
        self._lowest: dict[str, float] = {}  # loss of each term so far
        self._broken = self._strayed = ""
        self.rows: list[tuple[int, str, float | None, float | None, float | None]] = []
        self.held_out: dict[str, tuple[float, float]] = {}
        self.held_out_step = -1
        self.measures: dict[str, float] = {}
        self.said: list[tuple[int, Verdict, str]] = []
        self._loader: Iterable[Any] | None = None
        self._every = 0
        self._losses: dict[str, list[float]] = defaultdict(list)
        self._summaries: list[torch.Tensor] = []
        self._ended = self._began = time.perf_counter()
        self._waited = self._worked = 0.0
        self._steps = 0

    def watch(self, loader: Iterable[Any] | None, *, every: int) -> None:
        """Also measure at `FIRST_LOOK`.

        Args:
            loader: the held-out batches; None: there are none.
            every: steps between two validations.
        """
        self._loader, self._every = loader, every

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        """Note how long the step waited for its data."""
        self._began = time.perf_counter()
        self._waited += self._began - self._ended if self._steps else 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Record the step's losses, diagnostics and gradient norms; stop where one is not finite."""
        step, metrics = trainer.global_step, {}
        terms: dict[str, Term] = {name: term for name, term in outputs.items() if isinstance(term, Term)}
        for name, term in terms.items():
            values = {name: term.loss, **{f"{name}/{key}": value for key, value in term.diagnostics.items()}}
            for key, value in values.items():
                metrics[key] = self._record(step, key, float(value.detach()), term.chance if key == name else None)
                if not math.isfinite(metrics[key]):
                    self._broken = self._broken or f"{key} was {metrics[key]} at step {step}"
            self._compare(step, name, metrics[name], term.chance)
        for part, norm in outputs.get("gradient_norms", {}).items():
            metrics[f"gradient_norm/{part}"] = self._record(step, f"gradient_norm/{part}", float(norm), None)
        if trainer.logger and step % max(1, int(trainer.max_steps) // 200) == 0:
            trainer.logger.log_metrics(metrics, step)
        if self._broken or any(count == PATIENCE for count in self._above.values()):
            self._say(trainer, Finding("diverged", self._broken or self._strayed))
        trainer.should_stop |= self.diverged
        self._ended = time.perf_counter()
        self._worked += self._ended - self._began
        self._steps += 1
        if step == FIRST_LOOK < trainer.max_steps and self._every and step % self._every and not self._broken:
            self._look(trainer, module)

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
        """Average the held-out losses, measure the encoder, offer it to the selection, say what became of the run."""
        step = self.held_out_step = trainer.global_step
        summaries = torch.cat(self._summaries).numpy()
        self.measures = {
            f.__name__: float(f(summaries)) if np.isfinite(summaries).all() else 0.0 for f in (rankme, feature_std)
        }
        for gauge in self._gauges:
            self.measures.update(gauge(module.encoder))  # type: ignore[arg-type]  # the pretraining module has one
        for name, values in self._losses.items():
            error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
            self.held_out[name] = (float(np.mean(values)), error)
            self.rows.append((step, name, None, None, self.held_out[name][0]))
        for name, value in self.measures.items():
            self.rows.append((step, name, None, None, value if math.isfinite(value) else None))
        if trainer.logger:
            held_out = {f"held_out/{name}": mean for name, (mean, _) in self.held_out.items()}
            trainer.logger.log_metrics({**held_out, **self.measures}, step)
        if self.selection is not None:
            self.selection.consider(step, *self._score(), self._figures(), module)
        found = self.finding()
        if found.verdict != "at-chance" or step >= min(FIRST_LOOK, trainer.max_steps):
            self._say(trainer, found)
        trainer.should_stop |= self._stop and (self.collapsed or found.verdict == "collapsed")
        self._ended = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: all that later rows, the verdict and the choice of the encoder rest on."""
        return {
            "rows": self.rows,
            "held_out": self.held_out,
            "held_out_step": self.held_out_step,
            "measures": self.measures,
            "above": dict(self._above),
            "lowest": self._lowest,
            "broken": self._broken,
            "strayed": self._strayed,
            "said": self.said,
            "selection": self.selection.state_dict() if self.selection else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's history."""
        self.rows = [tuple(row) for row in state["rows"]]
        self.held_out = {name: tuple(pair) for name, pair in state["held_out"].items()}
        self.held_out_step, self.measures = state["held_out_step"], dict(state["measures"])
        self._above, self._lowest = defaultdict(int, state["above"]), dict(state.get("lowest", {}))
        self._broken, self._strayed = state["broken"], state["strayed"]
        self.said = [tuple(said) for said in state["said"]]
        if self.selection and state["selection"]:
            self.selection.load_state_dict(state["selection"])

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
    def rankme(self) -> float:
        """Effective rank of the held-out summaries; NaN before the first validation."""
        return self.measures.get("rankme", math.nan)

    @property
    def feature_std(self) -> float:
        """Spread of the held-out summaries; NaN before the first validation."""
        return self.measures.get("feature_std", math.nan)

    @property
    def diverged(self) -> bool:
        """Whether a training loss stopped being a number, or (with `stop_on_collapse`) stayed far above chance."""
        return bool(self._broken or (self._stop and self._strayed))

    @property
    def collapsed(self) -> bool:
        """Whether the held-out summaries lie on one point or line, though an objective trains them."""
        return bool(self._flat())

    def finding(self) -> Finding:
        """The verdict as things stand, and why."""
        levels = {name: chance for name, chance in self.chance().items() if chance is not None}
        if not levels:
            levels = {name: self.curve(name)[0] for name in self.chance()}
        broken = self._broken or (self._strayed if self._stop else "")
        shrunk = shrinkage(self.measures.get("weight_norm", math.nan), self._first_norm)
        return judge(levels, self.held_out, broken=broken, strayed=self._strayed, flat=self._flat(), shrunk=shrunk)

    def _flat(self) -> str:
        return flatness(self.rankme, self.feature_std) if self._summary_trained else ""

    def _record(self, step: int, name: str, value: float, chance: float | None) -> float:
        self.rows.append((step, name, value if math.isfinite(value) else None, chance, None))
        return value

    def _compare(self, step: int, name: str, loss: float, chance: float | None) -> None:
        """Count the steps that a loss has been far above chance without a new minimum: one that falls is on its way."""
        if loss < self._lowest.get(name, math.inf):
            self._lowest[name], self._above[name] = loss, 0
        self._above[name] = self._above[name] + 1 if chance is not None and loss > chance + 1.0 else 0
        if self._above[name] == PATIENCE:
            self._strayed = (
                f"{name}: a nat or more above its chance level {chance:.3g} for {PATIENCE} steps up to step {step}, "
                f"not falling, last {loss:.3g}"
            )

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure now, as Lightning's validation would."""
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

    def _say(self, trainer: pl.Trainer, found: Finding) -> None:
        """Say a verdict that is new: a log line, the history and a tag of the tracked run."""
        if self.said and self.said[-1][1] == found.verdict:
            return
        step = trainer.global_step
        self.said.append((step, *found))
        self.rows.append((step, f"verdict/{found.verdict}", None, None, None))
        if found.verdict == "learning":
            log.info("step %d: learning (%s)", step, found.why)
        else:
            log.warning("step %d: %s (%s). What to try: %s", step, found.verdict, found.why, ADVICE[found.verdict])
        if trainer.logger:
            tag(trainer.logger, "verdict", found.verdict)
            tag(trainer.logger, "verdict_step", str(step))

    def _total(self) -> tuple[float, float]:
        """Weighted held-out loss of the terms that have a chance level (of all where none has), and its error."""
        levels = self.chance()
        terms = [name for name, level in levels.items() if level is not None] or [*levels]
        pairs = [
            (self._weights.get(name.partition("/")[0], 1.0), *self.held_out[name])
            for name in terms
            if name in self.held_out
        ]
        error = math.sqrt(sum((weight * error) ** 2 for weight, _, error in pairs))
        return sum(weight * mean for weight, mean, _ in pairs), error

    def _score(self) -> tuple[float, float]:
        """What the selection compares, the larger the better, and its error; NaN where this step is not to be kept."""
        loss, error = self._total()
        if self.collapsed or self._broken or not math.isfinite(loss):
            return math.nan, 0.0
        return (self.measures["probe"], self.measures["probe_error"]) if "probe" in self.measures else (-loss, error)

    def _figures(self) -> dict[str, float]:
        return {"held_out_loss": self._total()[0], **self.measures}

    def _chance(self, name: str, term: Term) -> float:
        level = self.chance().get(name, term.chance)
        return level if level is not None else math.nan

    def diagnostics(self) -> dict[str, dict[str, float | None]]:
        """What objectives show beside their losses: mean of the last twenty steps, and the held-out value."""
        terms = self.chance()
        others = (name for _, name, *_ in self.rows if name not in terms and name not in MEASURES)
        names = dict.fromkeys(name for name in others if not name.startswith(BESIDE))
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
