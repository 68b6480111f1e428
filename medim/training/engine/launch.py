"""Launch the processes of a run: Lightning starts them, or joins processes started by torchrun or SLURM."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal, TypedDict

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from medim.signals import exited_after_saving
from medim.training.engine.process_group import SINGLE_PROCESS, ProcessGroup
from medim.types import UsageError, UserError

log = logging.getLogger(__name__)
_rank_holder: Any = rank_zero_only  # Lightning keeps the rank of this process on it
SHUTDOWN_GRACE_SECONDS = timedelta(
    days=7
)  # the other processes wait for the main process, which may preprocess a large archive
CHILD_VARIABLE = "MEDIM_CHILD"  # environment variable of the processes that this module started


def world_shape(devices: int | None, nodes: int | None) -> tuple[int, int]:
    """Determine the number of processes per node and the number of nodes.

    The requested values take precedence, then those of torchrun or SLURM; the default is one process on one node.

    Raises:
        UsageError: torchrun or SLURM started a different number of processes than requested.
    """
    detection = _detect_launcher()
    if detection is None:
        return devices or 1, nodes or 1
    launcher, (n_local, n_nodes) = detection
    request = (devices or n_local, nodes or n_nodes)
    if request == (1, 1) and launcher == "SLURM":
        return request  # a single run, or independent runs in one job
    if request != (n_local, n_nodes):
        raise UsageError(
            f"--devices {request[0]} --nodes {request[1]}: {launcher} started {n_local} processes on each of {n_nodes} "
            f"node(s). Omit both options to use these processes, or start the requested number: "
            + (
                "srun --nodes N --ntasks-per-node D."
                if launcher == "SLURM"
                else "torchrun --nnodes N --nproc-per-node D."
            )
        )
    return request


def planned_group(accelerator: str, devices: int | None, nodes: int | None) -> ProcessGroup:
    """Describe the processes that a run will have, before any is started; see `world_shape`."""
    on_cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return ProcessGroup(0, *world_shape(devices, nodes), kind="cuda" if on_cuda else "cpu")


def find_device(accelerator: str) -> torch.device:
    """Find the device of a run of one process.

    Args:
        accelerator: device kind, in the terms of Lightning.

    Raises:
        UserError: the device is not available.
    """
    device: torch.device = _build_strategy(accelerator, SINGLE_PROCESS)[0].root_device
    return device


@contextmanager
def launched(accelerator: str, plan: ProcessGroup) -> Iterator[ProcessGroup]:
    """Start or join the processes of a run, and end them with the run; if one process fails, all are ended.

    Lightning starts the other processes of this machine by running the command of this process again; those processes
    reach this function too.

    Args:
        accelerator: device kind, in the terms of Lightning.
        plan: number of processes. With several nodes, the same command runs on each node, started by torchrun, by
            SLURM, or by hand with NODE_RANK, MASTER_ADDR and MASTER_PORT set.

    Raises:
        UserError: the devices are not available, or another process failed.
    """
    if plan.count == 1:
        find_device(accelerator)
        _rank_holder.rank = 0  # also for one of several independent runs in a SLURM job
        yield SINGLE_PROCESS
        return
    environment, is_child = dict(os.environ), CHILD_VARIABLE in os.environ
    strategy, rank = _build_strategy(accelerator, plan)
    if rank:
        logging.getLogger("medim").setLevel(logging.ERROR)
    os.environ[CHILD_VARIABLE] = "1"
    launcher: Any = strategy.launcher
    launcher.launch(strategy.setup_environment)
    _children[:] = launcher.procs
    control = dist.new_group(backend="gloo", timeout=SHUTDOWN_GRACE_SECONDS)
    log.info(
        "%d processes, %d on each of %d node(s), on %s", plan.count, plan.devices, plan.nodes, strategy.root_device.type
    )
    try:
        yield replace(plan, rank=rank, kind=strategy.root_device.type, control=control)
    except BaseException as error:
        is_clean_stop = exited_after_saving(error)
        if is_child and is_clean_stop:
            raise SystemExit(0) from None  # the main process reports the stop
        exit_codes = _end_children(60 if is_clean_stop else 10)
        if exit_codes and isinstance(error, RuntimeError):
            raise UserError(
                f"another of the {plan.count} processes failed (exit code {exit_codes[0]}), so the run was ended. "
                "See its error message above; --resume continues from the newest checkpoint."
            ) from error
        raise
    finally:
        dist.destroy_process_group()
        _end_children(None)
        os.environ.clear()
        os.environ.update(environment)


_children: list[Any] = []  # processes that this process started


def _end_children(seconds: float | None) -> list[int]:
    """Wait for the child processes, kill those still running after `seconds`, and list the exit codes of failures."""
    exit_codes = []
    for process in _children:
        try:
            if process.wait(seconds):
                exit_codes.append(process.returncode)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.returncode = 0  # otherwise the observer of Lightning would end this process too
    _children.clear()
    return exit_codes


class SyncStopCallback(pl.Callback):
    """Stops a run in all processes if one process stops.

    Args:
        group: the processes of the run.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop all processes after this step if one of them is to stop."""
        trainer.should_stop = self._group.any_true(trainer.should_stop)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop all processes after this validation if one of them is to stop."""
        trainer.should_stop = self._group.any_true(trainer.should_stop)


def is_main_process() -> bool:
    """Whether this is the main process of the run, which alone writes and reports."""
    return bool(_rank_holder.rank == 0)


class TrainerOptions(TypedDict):
    """Options of the Lightning trainer for devices and processes."""

    accelerator: str
    devices: int
    num_nodes: int
    strategy: DDPStrategy | Literal["auto"]


def trainer_options(accelerator: str, group: ProcessGroup, *, find_unused: bool = False) -> TrainerOptions:
    """Build the options of the Lightning trainer for devices and processes.

    Args:
        accelerator: device kind, in the terms of Lightning.
        group: the processes of the run.
        find_unused: search for parameters without gradient in each backward pass; without need, PyTorch warns of it.
    """
    strategy: Any = DDPStrategy(find_unused_parameters=find_unused) if group.count > 1 else "auto"
    return {"accelerator": accelerator, "devices": group.devices, "num_nodes": group.nodes, "strategy": strategy}


def slurm_environment() -> list[Any]:
    """Build the SLURM plugin if SLURM started this process; medim handles the requeue signal itself (exit code 75)."""
    detection = _detect_launcher()
    return [SLURMEnvironment(auto_requeue=False)] if detection and detection[0] == "SLURM" else []


def _detect_launcher() -> tuple[str, tuple[int, int]] | None:
    """Detect torchrun or SLURM as the launcher, with the number of processes per node and of nodes."""
    env = os.environ
    if TorchElasticEnvironment.detect():
        n_local = int(env["LOCAL_WORLD_SIZE"])
        return "torchrun", (n_local, int(env["WORLD_SIZE"]) // n_local)
    if "SLURM_NTASKS" in env and "SLURM_STEP_ID" in env and SLURMEnvironment.detect():
        n_nodes = int(env.get("SLURM_NNODES", 1))
        return "SLURM", (int(env["SLURM_NTASKS"]) // n_nodes, n_nodes)
    return None


def _build_strategy(accelerator: str, plan: ProcessGroup) -> tuple[Any, int]:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        trainer = pl.Trainer(
            **trainer_options(accelerator, plan),
            plugins=slurm_environment(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        count = f" --devices {plan.devices} --nodes {plan.nodes}" if plan.count > 1 else ""
        raise UserError(
            f"--device {accelerator}{count}: not available on this machine ({error}). "
            "Run `medim doctor` to list the devices."
        ) from error
    return trainer.strategy, trainer.global_rank
