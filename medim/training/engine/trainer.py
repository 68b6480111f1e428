"""Lightning's trainer as medim uses it: quiet logs, progress for terminals and for log files."""

from __future__ import annotations

import logging
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import Logger

from medim.config import Precision, RunConfig
from medim.models.layers import use_channels_last
from medim.signals import current_request
from medim.training.engine.checkpoints import CheckpointCallback, ChecksumCheckpointIO
from medim.training.engine.launch import SyncStopCallback, slurm_environment, trainer_options
from medim.training.engine.process_group import SINGLE_PROCESS, ProcessGroup
from medim.types import UserError

log = logging.getLogger(__name__)
HARMLESS_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own
    ".*does not have many workers",
    ".*your dataloader is not resumable",  # it is: StepSampler starts at the checkpoint's step
    "You defined a `validation_step` but have no `val_dataloader`",  # too few subjects to hold out, and said so
)


class LineProgress(Callback):
    """A log line every few seconds, for output that is not a terminal."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self._every_seconds = every_seconds
        self._start_time = self._last_time = time.monotonic()
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start_time, self._first_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Say step, rate and time left."""
        now, step = time.monotonic(), trainer.global_step
        if now - self._last_time < self._every_seconds and step < trainer.max_steps:
            return
        self._last_time = now
        rate = (step - self._first_step) / max(1e-9, now - self._start_time)
        log.info(
            "step %d of %d, %.1f steps/s, %.0f s left%s",
            *(step, trainer.max_steps, rate, (trainer.max_steps - step) / rate),
            _format_losses(outputs),
        )


def _format_losses(outputs: Any) -> str:
    """The step's losses beside their chance levels, where the module returns terms."""
    terms: dict[str, Any] = outputs if isinstance(outputs, dict) else {}
    objective_terms = {name: term for name, term in terms.items() if hasattr(term, "chance")}
    texts = [
        f"{name} {float(term.loss.detach()):.3g}" + (f" (chance {term.chance:.3g})" if term.chance is not None else "")
        for name, term in objective_terms.items()
    ]
    return "".join(f", {text}" for text in texts)


def make_trainer(
    config: RunConfig,
    out: Path,
    *,
    logger: Logger | bool,
    callbacks: list[Callback],
    accelerator: str = "auto",
    validate: bool = True,
    clip: float = 0.0,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> pl.Trainer:
    """A trainer for a run that counts steps, not epochs.

    Args:
        config: steps, precision and checkpoint interval.
        out: the run's folder.
        logger: MLflow's, or False.
        callbacks: the run's own.
        accelerator: Lightning's name of the device kind.
        validate: run the validation loop at every checkpoint.
        clip: largest gradient norm, for a module that does not clip by itself; 0 does not clip.
        ranks: the processes of the run.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for harmless in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=harmless)
    callbacks = [*callbacks, *([SyncStopCallback(ranks)] if ranks.count > 1 else [])]
    checkpoints = CheckpointCallback(out / "checkpoints", config.checkpoint_every_steps)
    progress = RichProgressBar(leave=True) if sys.stderr.isatty() and log.isEnabledFor(logging.INFO) else LineProgress()
    try:
        trainer = pl.Trainer(
            max_steps=config.max_steps,
            max_epochs=-1,
            **trainer_options(accelerator, ranks),
            precision=choose_precision(config.precision, accelerator),
            callbacks=[*callbacks, checkpoints, progress],
            logger=logger,
            plugins=[ChecksumCheckpointIO(), *slurm_environment()],
            default_root_dir=out,
            deterministic=True,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            gradient_clip_val=clip or None,
            limit_val_batches=1.0 if validate else 0,
            val_check_interval=min(config.checkpoint_every_steps, config.max_steps),
            check_val_every_n_epoch=None,
            enable_model_summary=False,
            enable_progress_bar=isinstance(progress, RichProgressBar),
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise UserError(
            f"--accelerator {accelerator}: this machine cannot run it ({error}). See `medim doctor`."
        ) from error
    # Lightning's own handlers would requeue SLURM jobs by themselves and forget a signal before the first step.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def choose_precision(precision: Precision, accelerator: str = "auto") -> Precision:
    """The precision that a device can run at full speed: fp32 in place of bf16 where a CPU would emulate it.

    fp16, which needs a loss scaler and has its arithmetic on GPUs, is bf16 on a CPU. Without AVX-512 BF16, AMX or their
    like, PyTorch's convolutions in bf16 take tens of times as long as in fp32 (`benchmarks/layout_and_precision.py`).

    Args:
        precision: what the configuration asks for.
        accelerator: Lightning's name of the device kind.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if precision != "32-true" and on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.info("precision: this CPU has no bf16 arithmetic, so the run is in fp32 (32-true)")
        return "32-true"
    return "bf16-mixed" if precision == "16-mixed" and on_cpu else precision


def run_trainer(
    trainer: pl.Trainer, module: pl.LightningModule, loader: Any, held_out: Any = None, *, checkpoint: Path | None
) -> None:
    """Run the trainer, with convolutions channels last, from a checkpoint where one is given.

    Raises:
        StoppedError: SIGTERM or SIGUSR1 came; the step it came in is saved.
        KeyboardInterrupt: Lightning alone would leave with a bare exit code.
    """
    use_channels_last(module)
    try:
        with current_request().deferred():
            trainer.fit(module, loader, held_out, ckpt_path=checkpoint)
    except SystemExit:
        raise KeyboardInterrupt from None
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, CheckpointCallback):
            callback.restore_random_state()  # where no step was left to do


def peak_memory() -> int:
    """Bytes: the device's peak where one was used, else the process's."""
    on_gpu = int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0  # not run
    return on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
