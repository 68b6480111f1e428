"""Lightning module of fine-tuning, and validation during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from medim.config import FinetuneConfig
from medim.data.index.index import ImageRecord, Index
from medim.evaluation.cases import write_cases
from medim.evaluation.evaluate import validate_network
from medim.files import write_csv
from medim.model_spec import ModelSpec
from medim.models.model import Model, as_numpy_function
from medim.training.engine.gradients import clip_gradients, unscale_fused_gradients
from medim.training.engine.optim import build_optimiser
from medim.training.engine.progress import ValidationStatus
from medim.training.pretrain.history import HISTORY_COLUMNS
from medim.types import UserError

N_STATUS_METRICS = 3  # metrics in the progress
FinetuneRow = tuple[int, str, float | None, None, float | None]  # columns of history.csv


class FinetuneModule(pl.LightningModule):
    """Training of a model on labelled images; pretrained parts have their own learning rate.

    Args:
        model: encoder, decoder and head.
        config: configuration with the schedule.
        pretrained: parts of the model with pretrained weights.
    """

    def __init__(self, model: Model, config: FinetuneConfig, pretrained: Sequence[torch.nn.Module] = ()) -> None:
        super().__init__()
        self.model = model
        self._config = config
        self._pretrained = tuple(pretrained)  # a tuple, because a list of modules would be registered again
        self.rows: list[FinetuneRow] = []

    def configure_optimizers(self) -> Any:
        """Build the optimiser; the learning rate of pretrained parts is scaled by `pretrained_lr_scale`."""
        config, model = self._config, self.model
        parts = [part for part in (model.encoder, model.decoder, model.head) if part is not None]
        scale = {id(part): config.pretrained_lr_scale for part in self._pretrained}
        main, decay = build_optimiser([(part, scale.get(id(part), 1.0)) for part in parts], **config.optimisation)
        return [main], [{"scheduler": decay, "interval": "step"}]

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], step: int) -> torch.Tensor:
        """Compute the loss of the head on a batch of images (N, C, ...) and targets (N,) or (N, ...).

        Raises:
            UserError: the loss is not finite.
        """
        image, target = batch
        head: Any = self.model.head
        loss: torch.Tensor = head.loss(self.model(image), target)
        if not torch.isfinite(loss):
            raise UserError(
                f"step {self.global_step + 1}: expected a finite loss, got {float(loss.detach())}. Fine-tuning "
                f"diverged; lower lr (now {self._config.lr:g}), and check the intensities after preprocessing."
            )
        self.rows.append((self.global_step + 1, "loss", float(loss.detach()), None, None))
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradient, after unscaling."""
        unscale_fused_gradients(optimizer, getattr(self.trainer.precision_plugin, "scaler", None))
        clip_gradients(optimizer, self._config.gradient_clip)

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Add the history to the checkpoint."""
        checkpoint["rows"] = self.rows

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Restore the history from the checkpoint."""
        rows: Any = checkpoint["rows"]
        self.rows = [tuple(row) for row in rows]


class ValidationCallback(pl.Callback):
    """Validates after the given steps and adds the metrics to the history; they do not affect the training.

    `history.csv` is renewed after each validation and checkpoint.

    Args:
        steps: steps after which to validate.
        every: steps between two checkpoints.
        out: folder of the run, for `history.csv` and `cases-<step>.parquet`.
        index: index of the images.
        records: images of the validation split.
        spec: spec of the model.

    Attributes:
        status: first metrics of the last validation, for the progress.
    """

    def __init__(
        self, steps: Sequence[int], every: int, out: Path, index: Index, records: Sequence[ImageRecord], spec: ModelSpec
    ) -> None:
        self.status = ValidationStatus()
        self._steps, self._every, self._out = frozenset(steps), every, out
        self._index, self._records, self._spec = index, records, spec

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Validate with the precision of the run, if this step is one of `steps`; renew the history."""
        assert isinstance(module, FinetuneModule)
        step = trainer.global_step
        if step in self._steps and self._records:
            self._validate(trainer, module)
        elif step % self._every:
            return
        if step < trainer.max_steps:  # the run writes the last one
            write_csv(self._out / "history.csv", HISTORY_COLUMNS, module.rows)

    def _validate(self, trainer: pl.Trainer, module: FinetuneModule) -> None:
        with trainer.precision_plugin.forward_context():
            evaluation, cases = validate_network(
                as_numpy_function(module.model.eval()), self._index, self._records, self._spec
            )
        module.model.train()
        write_cases(self._out / f"cases-{trainer.global_step}.parquet", cases, self._spec.kind)
        values = {name: metric["value"] for name, metric in evaluation["metrics"].items()}
        module.rows += [(trainer.global_step, f"val/{name}", None, None, value) for name, value in values.items()]
        first = {name: value for name, value in values.items() if value is not None}
        self.status = ValidationStatus(trainer.global_step, dict(list(first.items())[:N_STATUS_METRICS]))
