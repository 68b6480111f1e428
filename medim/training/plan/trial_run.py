"""A few real steps of a pretraining run, taken apart: `medim.training.plan.plan` calls it in a process of its own."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from medim.config import PretrainConfig
from medim.data.index.index import Index
from medim.data.loading.cohort import Cohort, open_cohort
from medim.data.loading.datasets import ViewDataset
from medim.data.loading.store import Store
from medim.inference.ood import REFERENCE
from medim.models.serialization import load_encoder
from medim.training.engine.resources import children_memory, held, max_memory_allocated, memory_allocated, uses_cuda
from medim.training.fit_ood import rows_of_records
from medim.training.plan.workload import cached_bytes, reference_images, validation_images, worker_cached_bytes
from medim.training.pretrain.run import pretrain
from medim.training.tracking.delivery import tracking_uri
from medim.training.tracking.tracking import check_target
from medim.types import UsageError

MOST_STEPS, FEWEST_STEPS, ENOUGH_SECONDS = 60, 5, 20.0
WARM_UP = 2  # steps that are left out of the mean
FEW_IMAGES = 4  # enough to time one

Moment = tuple[float, float]  # seconds of a clock on the wall, and of this process on its processors


@dataclass(frozen=True)
class Measured:
    """What a short run took.

    Attributes:
        steps: it made.
        images: it was given.
        missing: images of the whole index that the store does not hold.
        reference_images: those whose statistics were written at its end.
        validation_images: views that each of its validations encoded.
        device: kind of the device it ran on, whose memory is told.
        clocks: by `wall` and `cpu`, seconds of `start`, `first_step` (beyond a later one), `step`, `validation`,
            `checkpoint`, `end`; and of one image `check` (is it in the store), `prepare` (bring it there), `read` (from
            there, beyond reading from RAM), `reference`.
        memory: bytes of the process `before` its first step, at its peak until the `steps` were done and until its
            `end`; and of a `worker`, always in RAM.
        bytes: of an `image` in the store and `in_memory`, of what was `cached` and what each worker did
            (`worker_cached`), of a `checkpoint`, a step's rows of the `history`, and the rest of the `run`.
    """

    steps: int
    images: int
    missing: int
    reference_images: int
    validation_images: int
    device: str
    clocks: dict[str, dict[str, float]]
    memory: dict[str, int]
    bytes: dict[str, float]


class Stopwatch(pl.Callback):
    """Notes when each step and validation ended and what the process held; ends the run when it has seen enough.

    Args:
        checkpoint: where one is saved at the end, to be timed.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self.began = self.done = self._validating = now()
        self.ends: list[Moment] = []
        self.validations: list[Moment] = []
        self.saving: Moment = (0.0, 0.0)
        self.before = self.peak = self.workers = self.after = 0
        self.device = torch.device("cpu")

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The first batch is yet to be loaded."""
        self.device = trainer.strategy.root_device
        self.began, self.before = now(), memory_allocated(self.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """A step is done."""
        self.ends.append(now())
        enough = self.ends[-1][0] - self.ends[0][0] > ENOUGH_SECONDS and len(self.ends) >= FEWEST_STEPS
        trainer.should_stop |= enough
        if enough or len(self.ends) == trainer.max_steps:
            self.workers = children_memory()

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self._validating = now()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop it."""
        self.validations.append(since(self._validating))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save a checkpoint, and start the clock of the run's end."""
        self.peak = max_memory_allocated(self.device)  # of steps: what saving takes does not grow with the batch
        began = now()
        trainer.save_checkpoint(self._checkpoint)
        self.saving = since(began)
        self.after, self.done = len(self.validations), now()


def measure(
    config: PretrainConfig,
    small: Index,
    index: Index,
    out: Path,
    split_seed: int,
    accelerator: str,
    store: Path,
    free: int,
) -> Measured:
    """Pretrain on a few images, in this process, which must be a fresh one: it changes the working folder and limits.

    Args:
        config: the run.
        small: images enough for a batch and a held-out batch, with their splits.
        index: all images of the run.
        out: a temporary folder.
        split_seed: of the split by subject.
        accelerator: Lightning's name of the device kind.
        store: folder of preprocessed images.
        free: bytes that this process may take beyond what it holds.

    Raises:
        MemoryError: it needs more than `free`.
    """
    store = store.absolute()
    small, index = (replace(i, root=i.root.resolve()) for i in (small, index))
    there = _is_there(tracking_uri())
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{out / 'mlflow.db'}"
    if there:
        check_target()  # the run's own data base is made already
    try:
        if not uses_cuda(accelerator):
            _limit(free)
        return _measure(config, small, index, out, split_seed, accelerator, store)
    except (RuntimeError, UsageError) as error:  # as it is, or as what `rehearse` makes of it
        if "allocate memory" in str(error) or "out of memory" in str(error):
            raise MemoryError from error
        raise


def _measure(
    config: PretrainConfig, small: Index, index: Index, out: Path, split_seed: int, accelerator: str, store: Path
) -> Measured:
    prepare, missing = _prepare(config, small, index, store)
    began = now()
    cohort = open_cohort(small, small.records, config.preprocessing, split_seed=split_seed, store=store)
    check = _each(since(began), len(small.records))
    watch = Stopwatch(out / "timed.ckpt")
    few = config.model_copy(update={"max_steps": min(config.max_steps, MOST_STEPS), "checkpoint_every_steps": 10**9})
    given: dict[str, Any] = {"split_seed": split_seed, "accelerator": accelerator, "store": store}
    began = now()
    pretrain(few, small, out / "run", callbacks=[watch], **given)
    end, end_peak = since(watch.done), max_memory_allocated(watch.device)
    steps = len(watch.ends)
    first = _minus(watch.ends[0], watch.began)
    warm = min(WARM_UP, steps - 1)
    step = _each(_minus(watch.ends[-1], watch.ends[warm - 1]), steps - warm) if warm else first
    validation = _each(_sum(watch.validations), len(watch.validations))
    reference, looked_at = _reference(config, cohort, out / "run" / "encoder")
    parts = {
        "start": _minus(watch.began, began),
        "first_step": _minus(first, step),
        "step": step,
        "validation": validation,
        "checkpoint": watch.saving,
        "end": _minus(end, _sum([*watch.validations[watch.after :], watch.saving])),  # the run saves its last step, too
        "check": check,
        "prepare": prepare,
        "read": _read(config, cohort),
        "reference": reference,
    }
    clocks = {
        clock: {name: max(0.0, part[i]) for name, part in parts.items()} for i, clock in enumerate(("wall", "cpu"))
    }
    memory = {
        "before": watch.before,
        "steps": watch.peak,
        "end": end_peak,
        "worker": watch.workers // max(1, config.workers),
    }
    sizes = _sizes(config.model_copy(update={"max_steps": steps}), cohort, out)
    validated = validation_images(config, cohort.records("train"), cohort.records("val"))
    found = (steps, len(small.records), missing, looked_at, validated, watch.device.type)
    return Measured(*found, clocks, memory, sizes)


def _prepare(config: PretrainConfig, small: Index, index: Index, folder: Path) -> tuple[Moment, int]:
    """Bring the images of the short run into the store; what one took, and how many of all are missing then."""
    store, steps = Store(folder), config.preprocessing

    def there(record: Any, of: Index) -> bool:
        key = store.key(of, record, steps)
        return (store.folder / key[:2] / f"{key}.b2nd").is_file()

    chosen = {record.image for record in small.records}
    others = [record for record in index.records if record.image not in chosen and not there(record, index)]
    wanted = [record for record in small.records if not there(record, small)]
    if not wanted and others:
        wanted, others = others[:FEW_IMAGES], others[FEW_IMAGES:]
    began = now()
    for record in wanted:
        _whatever(lambda record=record: store.add(index, record, steps))  # type: ignore[misc]
    return _each(since(began), len(wanted)), len(others)


def _whatever(work: Callable[[], object]) -> None:
    """Do what may fail for one bad file, as the run would leave it out."""
    try:
        work()
    except Exception as error:  # a decoder may raise anything
        if isinstance(error, MemoryError):
            raise


def _read(config: PretrainConfig, cohort: Cohort) -> Moment:
    """Reading an image from the store, beyond what it costs from RAM."""
    keys, views = cohort.store_keys(cohort.records("train"))[:FEW_IMAGES], config.views
    data = ViewDataset(cohort.store, keys, shape=views.shape, count=views.count, augmentations=views.augmentations)
    taken = []
    for _ in range(2):
        began = now()
        for place in range(len(keys)):
            data[place, 0]
        taken.append(_each(since(began), len(keys)))
    return _minus(*taken)


def _reference(config: PretrainConfig, cohort: Cohort, encoder: Path) -> tuple[Moment, int]:
    """What an image's statistics for the guard take, and of how many they were written."""
    if not (encoder / REFERENCE).is_file():
        return (0.0, 0.0), 0
    records = cohort.records("train")
    network: Any = load_encoder(encoder)
    began = now()
    few = list(rows_of_records(network, cohort, records[:FEW_IMAGES], network.spec))
    return _each(since(began), len(few)), reference_images(records, cohort.records("val"))


def _sizes(config: PretrainConfig, cohort: Cohort, out: Path) -> dict[str, float]:
    keys = list(cohort.keys.values())
    files = [path for key in keys for path in (cohort.store.folder / key[:2]).glob(f"{key}*.b2nd")]
    each = sum(cohort.store.entry(key).nbytes for key in keys) / len(keys)
    train, held_out = cohort.records("train"), cohort.records("val")
    run = [path for path in (out / "run").rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    history = (out / "run" / "history.csv").stat().st_size
    return {
        "image": sum(path.stat().st_size for path in files) / len(keys),
        "in_memory": each,
        "cached": cached_bytes(config, each, train, held_out),
        "worker_cached": worker_cached_bytes(config, each, train),
        "checkpoint": (out / "timed.ckpt").stat().st_size,
        "history": history / config.max_steps,
        "run": sum(path.stat().st_size for path in run) - history,
    }


def now() -> Moment:
    """Both clocks."""
    return time.perf_counter(), time.process_time()


def since(began: Moment) -> Moment:
    """Seconds from then to now."""
    return _minus(now(), began)


def _limit(free: int) -> None:
    """Let what this machine cannot hold fail here, rather than bring the machine down."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (held("VmData") + free, resource.RLIM_INFINITY))


def _is_there(uri: str) -> bool:
    """Whether a tracking target exists; only a local SQLite file may not."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()


def _minus(one: Moment, other: Moment) -> Moment:
    return one[0] - other[0], one[1] - other[1]


def _sum(moments: Sequence[Moment]) -> Moment:
    return sum(m[0] for m in moments), sum(m[1] for m in moments)


def _each(taken: Moment, count: int) -> Moment:
    return taken[0] / max(1, count), taken[1] / max(1, count)
