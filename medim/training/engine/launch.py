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

from medim.signals import saved_and_left
from medim.training.engine.process_group import ALONE, Ranks
from medim.types import UsageError, UserError

log = logging.getLogger(__name__)
_first_only: Any = rank_zero_only  # Lightning keeps the rank of this process on it
PATIENCE = timedelta(days=7)  # the others wait for the first, which may be preprocessing a hospital's archive
CHILD = "MEDIM_CHILD"  # in the environment of processes that were started from here


def shape(devices: int | None, nodes: int | None) -> tuple[int, int]:
    """Processes a node, and nodes: as asked, else as torchrun or SLURM started them, else one.

    Raises:
        UsageError: they started another number than was asked for.
    """
    found = _started()
    if found is None:
        return devices or 1, nodes or 1
    by, (local, machines) = found
    wanted = (devices or local, nodes or machines)
    if wanted == (1, 1) and by == "SLURM":
        return wanted  # independent runs, or one
    if wanted != (local, machines):
        raise UsageError(
            f"--devices {wanted[0]} --nodes {wanted[1]}: {by} started {local} on each of {machines} node(s). Leave "
            "both out to take what is there, or start as many: "
            + ("srun --nodes N --ntasks-per-node D." if by == "SLURM" else "torchrun --nnodes N --nproc-per-node D.")
        )
    return wanted


def planned(accelerator: str, devices: int | None, nodes: int | None) -> Ranks:
    """The processes that a run will have, as far as the first knows before any is started; see `shape`."""
    on_cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return Ranks(0, *shape(devices, nodes), kind="cuda" if on_cuda else "cpu")


@contextmanager
def together(accelerator: str, plan: Ranks) -> Iterator[Ranks]:
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
        _first_only.rank = 0  # also as one of several independent runs in a SLURM job
        yield ALONE
        return
    before, child = dict(os.environ), CHILD in os.environ
    strategy, rank = _strategy(accelerator, plan)
    if rank:
        logging.getLogger("medim").setLevel(logging.ERROR)
    os.environ[CHILD] = "1"
    launcher: Any = strategy.launcher
    launcher.launch(strategy.setup_environment)
    _children[:] = launcher.procs
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    log.info(
        "%d processes, %d on each of %d node(s), on %s", plan.count, plan.devices, plan.nodes, strategy.root_device.type
    )
    try:
        yield replace(plan, rank=rank, kind=strategy.root_device.type, control=control)
    except BaseException as error:
        stopped = saved_and_left(error)
        if child and stopped:
            raise SystemExit(0) from None  # in order; the first says so
        failed = _end_children(60 if stopped else 10)
        if failed and isinstance(error, RuntimeError):
            raise UserError(
                f"another of the {plan.count} processes failed (exit code {failed[0]}), and so did the run. What it "
                "said stands above; --resume continues from the newest checkpoint."
            ) from error
        raise
    finally:
        dist.destroy_process_group()
        _end_children(None)
        os.environ.clear()
        os.environ.update(before)


_children: list[Any] = []  # the processes that this one started


def _end_children(seconds: float | None) -> list[int]:
    """Wait for them so long, and end those that are still there; exit codes of those that failed by themselves."""
    failed = []
    for process in _children:
        try:
            if process.wait(seconds):
                failed.append(process.returncode)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.returncode = 0  # Lightning's observer would end this process, too
    _children.clear()
    return failed


class StopTogether(pl.Callback):
    """Ends a run in all processes where it is to end in one.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop after this step where one process is to."""
        trainer.should_stop = self._ranks.any(trainer.should_stop)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop after this validation where one process is to."""
        trainer.should_stop = self._ranks.any(trainer.should_stop)


def leads() -> bool:
    """Whether this is the first process of the run, the one that speaks."""
    return bool(_first_only.rank == 0)


def engine(accelerator: str, ranks: Ranks) -> dict[str, Any]:
    """What Lightning's trainer is told of devices and processes."""
    # Not every parameter is on the way back of every loss: prior matching goes back twice, CPC leaves the summary out.
    strategy = DDPStrategy(find_unused_parameters=True) if ranks.count > 1 else "auto"
    return {"accelerator": accelerator, "devices": ranks.devices, "num_nodes": ranks.nodes, "strategy": strategy}


def cluster() -> list[Any]:
    """SLURM's plugin where it started this process, told to leave the requeue signal to medim (exit code 75)."""
    found = _started()
    return [SLURMEnvironment(auto_requeue=False)] if found and found[0] == "SLURM" else []


def _started() -> tuple[str, tuple[int, int]] | None:
    """Who started this process, as one of how many a node on how many nodes."""
    env = os.environ
    if TorchElasticEnvironment.detect():
        local = int(env["LOCAL_WORLD_SIZE"])
        return "torchrun", (local, int(env["WORLD_SIZE"]) // local)
    if "SLURM_NTASKS" in env and "SLURM_STEP_ID" in env and SLURMEnvironment.detect():
        machines = int(env.get("SLURM_NNODES", 1))
        return "SLURM", (int(env["SLURM_NTASKS"]) // machines, machines)
    return None


def _strategy(accelerator: str, plan: Ranks) -> tuple[Any, int]:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        trainer = pl.Trainer(**engine(accelerator, plan), plugins=cluster(), **quiet)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise UserError(
            f"--accelerator {accelerator} --devices {plan.devices} --nodes {plan.nodes}: this machine cannot run it "
            f"({error}). See `medim doctor`."
        ) from error
    return trainer.strategy, trainer.global_rank
