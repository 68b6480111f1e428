"""How a run comes to its processes: Lightning starts them, or joins those that torchrun or SLURM started."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

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
)  # the others wait for the first, which may be preprocessing a hospital's archive
CHILD_VARIABLE = "MEDIM_CHILD"  # in the environment of processes that were started from here


def world_shape(devices: int | None, nodes: int | None) -> tuple[int, int]:
    """Processes a node, and nodes: as asked, else as torchrun or SLURM started them, else one.

    Raises:
        UsageError: they started another number than was asked for.
    """
    detection = _detect_launcher()
    if detection is None:
        return devices or 1, nodes or 1
    launcher, (n_local, n_nodes) = detection
    request = (devices or n_local, nodes or n_nodes)
    if request == (1, 1) and launcher == "SLURM":
        return request  # independent runs, or one
    if request != (n_local, n_nodes):
        raise UsageError(
            f"--devices {request[0]} --nodes {request[1]}: {launcher} started {n_local} on each of {n_nodes} node(s). "
            f"Leave "
            "both out to take what is there, or start as many: "
            + (
                "srun --nodes N --ntasks-per-node D."
                if launcher == "SLURM"
                else "torchrun --nnodes N --nproc-per-node D."
            )
        )
    return request


def planned_group(accelerator: str, devices: int | None, nodes: int | None) -> ProcessGroup:
    """The processes that a run will have, as far as the first knows before any is started; see `world_shape`."""
    on_cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return ProcessGroup(0, *world_shape(devices, nodes), kind="cuda" if on_cuda else "cpu")


@contextmanager
def launched(accelerator: str, plan: ProcessGroup) -> Iterator[ProcessGroup]:
    """Start or join the processes of a run, and let go of them when it ends; a failure of one ends all.

    Lightning starts the others on this machine by running this process's command again; they reach this place, too.

    Args:
        accelerator: Lightning's name of the device kind.
        plan: how many; on each of several nodes the same command runs, started by torchrun, by SLURM, or by hand with
            NODE_RANK, MASTER_ADDR and MASTER_PORT set.

    Raises:
        UserError: the devices are not there, or another process failed.
    """
    if plan.count == 1:
        _rank_holder.rank = 0  # also as one of several independent runs in a SLURM job
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
            raise SystemExit(0) from None  # in order; the first says so
        exit_codes = _end_children(60 if is_clean_stop else 10)
        if exit_codes and isinstance(error, RuntimeError):
            raise UserError(
                f"another of the {plan.count} processes failed (exit code {exit_codes[0]}), and so did the run. "
                "What it said stands above; --resume continues from the newest checkpoint."
            ) from error
        raise
    finally:
        dist.destroy_process_group()
        _end_children(None)
        os.environ.clear()
        os.environ.update(environment)


_children: list[Any] = []  # the processes that this one started


def _end_children(seconds: float | None) -> list[int]:
    """Wait for them so long, and end those that are still there; exit codes of those that failed by themselves."""
    exit_codes = []
    for process in _children:
        try:
            if process.wait(seconds):
                exit_codes.append(process.returncode)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.returncode = 0  # Lightning's observer would end this process, too
    _children.clear()
    return exit_codes


class SyncStopCallback(pl.Callback):
    """Ends a run in all processes where it is to end in one.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: ProcessGroup) -> None:
        self._ranks = ranks

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop after this step where one process is to."""
        trainer.should_stop = self._ranks.any_true(trainer.should_stop)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop after this validation where one process is to."""
        trainer.should_stop = self._ranks.any_true(trainer.should_stop)


def is_main_process() -> bool:
    """Whether this is the first process of the run, the one that speaks."""
    return bool(_rank_holder.rank == 0)


def trainer_options(accelerator: str, ranks: ProcessGroup) -> dict[str, Any]:
    """What Lightning's trainer is told of devices and processes."""
    # Not every parameter is on the way back of every loss: prior matching goes back twice, CPC leaves the summary out.
    strategy = DDPStrategy(find_unused_parameters=True) if ranks.count > 1 else "auto"
    return {"accelerator": accelerator, "devices": ranks.devices, "num_nodes": ranks.nodes, "strategy": strategy}


def slurm_environment() -> list[Any]:
    """SLURM's plugin where it started this process, told to leave the requeue signal to medim (exit code 75)."""
    detection = _detect_launcher()
    return [SLURMEnvironment(auto_requeue=False)] if detection and detection[0] == "SLURM" else []


def _detect_launcher() -> tuple[str, tuple[int, int]] | None:
    """Who started this process, as one of how many a node on how many nodes."""
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
    silent_options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        trainer = pl.Trainer(**trainer_options(accelerator, plan), plugins=slurm_environment(), **silent_options)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise UserError(
            f"--accelerator {accelerator} --devices {plan.devices} --nodes {plan.nodes}: this machine cannot run it "
            f"({error}). See `medim doctor`."
        ) from error
    return trainer.strategy, trainer.global_rank
