"""Lightning trainer with the settings of medim: few log messages, and its own progress."""

from __future__ import annotations

import logging
import resource
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from medim.config import Precision, RunConfig
from medim.models.layers import use_channels_last
from medim.signals import current_request
from medim.training.engine.checkpoints import CheckpointCallback, ChecksumCheckpointIO
from medim.training.engine.launch import SyncStopCallback, slurm_environment, trainer_options
from medim.training.engine.process_group import SINGLE_PROCESS, ProcessGroup
from medim.training.engine.progress import TrainingProgress, choose_progress

log = logging.getLogger(__name__)
HARMLESS_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # raised by Lightning itself
    ".*does not have many workers",
    ".*your dataloader is not resumable",  # StepSampler makes it resumable: it starts at the step of the checkpoint
    "You defined a `validation_step` but have no `val_dataloader`",  # too few subjects to validate; logged
)


def make_trainer(
    config: RunConfig,
    out: Path,
    *,
    logger: Logger | bool,
    callbacks: list[Callback],
    accelerator: str = "auto",
    validate: bool = True,
    group: ProcessGroup = SINGLE_PROCESS,
    find_unused: bool = False,
) -> pl.Trainer:
    """Build a trainer for a run that counts steps instead of epochs.

    Args:
        config: steps, precision and checkpoint interval.
        out: folder of the run.
        logger: logger of the run, or False.
        callbacks: callbacks of the run; with a `TrainingProgress`, or the progress has no validation values.
        accelerator: device kind, in the terms of Lightning.
        validate: whether to validate at every checkpoint.
        group: the processes of the run.
        find_unused: whether a backward pass may leave parameters without gradient, with several processes.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for harmless in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=harmless)
    callbacks = [*callbacks, *([SyncStopCallback(group)] if group.count > 1 else [])]
    if not any(isinstance(callback, TrainingProgress) for callback in callbacks):
        callbacks.append(choose_progress())
    if not group.is_main:
        callbacks = [callback for callback in callbacks if not isinstance(callback, TrainingProgress)]
    checkpoints = CheckpointCallback(out / "checkpoints", config.checkpoint_every_steps)
    trainer = pl.Trainer(
        max_steps=config.max_steps,
        max_epochs=-1,
        **trainer_options(accelerator, group, find_unused=find_unused),
        precision=choose_precision(config.precision, accelerator, config.spatial_dims),
        callbacks=[*callbacks, checkpoints],
        logger=logger,
        plugins=[ChecksumCheckpointIO(), *slurm_environment()],
        default_root_dir=out,
        deterministic=True,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        limit_val_batches=1.0 if validate else 0,
        val_check_interval=min(config.checkpoint_every_steps, config.max_steps),
        check_val_every_n_epoch=None,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    # The signal handlers of Lightning would requeue SLURM jobs and lose a signal that arrives before the first step.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def choose_precision(precision: Precision, accelerator: str, spatial_dims: int) -> Precision:
    """Choose a precision in which the device computes fast and correctly.

    On a CPU without bf16 arithmetic the result is fp32; without AVX-512 BF16, AMX or similar instructions, convolutions
    of PyTorch take tens of times as long in bf16 as in fp32 (`benchmarks/layout_and_precision.py`). On a CPU with bf16,
    fp16 becomes bf16, because fp16 needs a loss scaler and is fast only on GPUs.

    In 3D the result on a CPU is fp32: with AVX-512 BF16, the convolutions of PyTorch 2.13 (oneDNN) compute the gradient
    of a 3 x 3 x 3 kernel from uninitialised memory if the map is two voxels deep (up to 1e37 times the right value),
    and wrong outputs for some maps of one voxel. Maps of 2D networks have no such error.

    Args:
        precision: precision in the configuration.
        accelerator: device kind, in the terms of Lightning.
        spatial_dims: 2 or 3.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if precision != "32-true" and on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.info("precision: this CPU has no bf16 arithmetic, so the run uses fp32 (32-true)")
        return "32-true"
    if precision != "32-true" and on_cpu and spatial_dims == 3:
        log.info("precision: 3D convolutions in bf16 are not reliable on CPUs, so the run uses fp32 (32-true)")
        return "32-true"
    return "bf16-mixed" if precision == "16-mixed" and on_cpu else precision


def run_trainer(
    trainer: pl.Trainer, module: pl.LightningModule, loader: Any, held_out: Any = None, *, checkpoint: Path | None
) -> None:
    """Run the trainer with channels-last convolutions, from a checkpoint if one is given.

    The module stays on the device of the training.

    Raises:
        StoppedError: Ctrl-C, SIGTERM or SIGUSR1 arrived; the step in progress was saved.
        KeyboardInterrupt: the user interrupted the run; Lightning alone would exit with a bare exit code.
    """
    use_channels_last(module)
    try:
        with current_request().deferred():
            trainer.fit(module, loader, held_out, ckpt_path=checkpoint)
    except SystemExit:
        raise KeyboardInterrupt from None
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, CheckpointCallback):
            callback.restore_random_state()  # needed if no step was left
    return_to_device(trainer, module)


def return_to_device(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Move a module back to the device of the training, from which Lightning moves it to the CPU after each run."""
    module.to(trainer.strategy.root_device)


def peak_memory() -> int:
    """Measure the peak memory in bytes: of the device if one was used, else of this process."""
    on_gpu = int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0  # not run
    return on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
