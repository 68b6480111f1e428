"""Checkpoints for bit-exact resuming: written atomically, verified by SHA-256, the last two are kept."""

from __future__ import annotations

import hashlib
import io
import logging
import random
from pathlib import Path
from typing import Any, TypedDict, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from medim.files import write_bytes
from medim.signals import current_request
from medim.types import UserError

log = logging.getLogger(__name__)
MAX_CHECKPOINTS = 2
DIGEST_LABEL = b"\nsha256 "
DIGEST_LENGTH = len(DIGEST_LABEL) + 64
CORRUPT_SUFFIX = ".damaged"


def append_digest(data: bytes) -> bytes:
    """Append the SHA-256 of the data to the data; the result is still a zip archive that `torch.load` can read."""
    return data + DIGEST_LABEL + hashlib.sha256(data).hexdigest().encode()


def strip_digest(data: bytes) -> bytes | None:
    """Remove the digest that `append_digest` added; None if the data was changed, truncated or extended."""
    content = data[:-DIGEST_LENGTH]
    return content if len(data) > DIGEST_LENGTH and append_digest(content) == data else None


class RandomState(TypedDict):
    """States of the random generators of one process."""

    torch: torch.Tensor
    cuda: torch.Tensor | None
    numpy: list[Any]  # arguments of `numpy.random.set_state`, with the keys as a tensor
    python: tuple[Any, ...]


class ResumeState(TypedDict):
    """Keys of a checkpoint that `CheckpointCallback` reads; the last one is from Lightning."""

    random: list[RandomState]  # one per process of the run that saved it
    ended: bool
    resumed_from_steps: list[int]
    global_step: int


class ChecksumCheckpointIO(TorchCheckpointIO):
    """Checkpoint input and output: atomic writes, a SHA-256 per file, and no code execution on loading."""

    def save_checkpoint(self, checkpoint: dict[str, object], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary file, flush it and rename it."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(Path(path), append_digest(buffer.getvalue()))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, object]:
        """Load a checkpoint of tensors and plain values.

        Raises:
            UserError: the SHA-256 of the file does not match.
        """
        content = strip_digest(Path(path).read_bytes())
        if content is None:
            raise UserError(f"{path}: the checkpoint is corrupt (its SHA-256 does not match). Resume again.")
        checkpoint: dict[str, object] = torch.load(
            io.BytesIO(content), map_location=map_location or "cpu", weights_only=True
        )
        return checkpoint


def find_newest_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """Find the newest intact checkpoint to resume from and its step; (None, 0) if there is none.

    A corrupt checkpoint is logged and renamed to `step-<step>.ckpt.damaged`.
    """
    for leftover_file in folder.glob(".step-*.ckpt.*"):  # temporary file of an interrupted write
        leftover_file.unlink(missing_ok=True)
    for step, path in reversed(_list_by_step(folder)):
        if strip_digest(path.read_bytes()) is not None:
            return path, step
        path.replace(path.with_name(path.name + CORRUPT_SUFFIX))
        log.warning(
            "%s is corrupt and was renamed to *.damaged. "
            "Resuming from the previous checkpoint, or from step 0 if there is none.",
            path,
        )
    return None, 0


def list_corrupt_checkpoints(folder: Path) -> list[str]:
    """List the names of the checkpoints that a resume found corrupt."""
    return sorted(path.name.removesuffix(CORRUPT_SUFFIX) for path in folder.glob(f"step-*.ckpt{CORRUPT_SUFFIX}"))


def _list_by_step(folder: Path) -> list[tuple[int, Path]]:
    pairs = ((path.stem.removeprefix("step-"), path) for path in folder.glob("step-*.ckpt"))
    return sorted((int(n), path) for n, path in pairs if n.isdecimal())


class CheckpointCallback(Checkpoint):
    """Saves a checkpoint every few steps, at the end of the run, and when the run receives a stop signal.

    Lightning saves the weights, optimisers, schedules and the scaler of mixed precision; the step is the position of
    the sampler. This callback adds the states of the random generators of all processes: medim does not use them
    between two steps, but user code may. If a validation follows a step, the checkpoint is saved after the validation,
    so that a resumed run does not validate again. All processes stop at the same step.

    Args:
        folder: folder of the checkpoints.
        every: number of steps between two checkpoints.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self._every_steps = folder, every
        self._last_step = -1
        self._due = False
        self._should_stop = False
        self._state_to_restore: RandomState | None = None
        self.resumed_from_steps: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Restore the stop state and the last saved step of the checkpoint."""
        trainer.should_stop |= self._should_stop
        self._last_step = trainer.global_step if self.resumed_from_steps else -1

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        """Restore the states of the random generators, which the construction of the data loaders has changed."""
        self.restore_random_state()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Save a checkpoint if one is due, unless a validation follows this step."""
        step = trainer.global_step
        self._due |= step % self._every_steps == 0
        before_validation = trainer.enable_validation and step % int(trainer.val_check_batch or 1) == 0
        if not before_validation:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the checkpoint that was postponed until after the validation."""
        if trainer.state.fn == "fit":
            self._save_if_due(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the last step, so that the results can be written again without training."""
        self._due = True
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        stopping = bool(current_request().signal_name)
        if trainer.world_size > 1:
            stopping = trainer.strategy.reduce_boolean_decision(stopping, all=False)
        if (self._due or stopping) and self._last_step != trainer.global_step:
            trainer.save_checkpoint(self._folder / f"step-{trainer.global_step}.ckpt")
            self._last_step = trainer.global_step
            if trainer.is_global_zero:
                for _, path in _list_by_step(self._folder)[:-MAX_CHECKPOINTS]:
                    path.unlink(missing_ok=True)
        self._due = False
        if stopping:
            current_request().respond(f"step {trainer.global_step} is saved")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        """Add the random states of all processes, the stop state and the steps of earlier resumes."""
        states: list[RandomState | None] = [_get_random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, _get_random_state())
        checkpoint["random"] = states
        checkpoint["ended"] = trainer.should_stop
        checkpoint["resumed_from_steps"] = self.resumed_from_steps

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        """Read the random states, the stop state and the steps of earlier resumes."""
        state = cast(ResumeState, checkpoint)
        self._state_to_restore = state["random"][trainer.global_rank % len(state["random"])]
        self._should_stop = bool(state["ended"])
        self.resumed_from_steps = [*state["resumed_from_steps"], int(state["global_step"])]

    def restore_random_state(self) -> None:
        """Set the random generators to the state of the checkpoint; later calls do nothing."""
        if self._state_to_restore is not None:
            _set_random_state(self._state_to_restore)
        self._state_to_restore = None


def get_resume_steps(trainer: pl.Trainer) -> list[int]:
    """Get the steps at which a run was resumed."""
    return next((c.resumed_from_steps for c in trainer.checkpoint_callbacks if isinstance(c, CheckpointCallback)), [])


def _get_random_state() -> RandomState:
    """Get the states of the random generators of this process as tensors and plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
