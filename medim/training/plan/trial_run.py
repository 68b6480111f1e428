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
from medim.inference.ood import OOD_FILE
from medim.models.serialization import load_encoder
from medim.training.engine.resources import (
    children_memory,
    max_memory_allocated,
    memory_allocated,
    process_status_bytes,
    uses_cuda,
)
from medim.training.fit_ood import iterate_record_features
from medim.training.plan.workload import (
    count_reference_images,
    count_validation_images,
    estimate_cached_bytes,
    estimate_worker_cached_bytes,
)
from medim.training.pretrain.run import pretrain
from medim.training.tracking.delivery import tracking_uri
from medim.training.tracking.tracking import check_target
from medim.types import UsageError

MAX_STEPS, MIN_STEPS, TARGET_SECONDS = 60, 5, 20.0
WARM_UP_STEPS = 2  # steps that are left out of the mean
TIMING_IMAGES = 4  # enough to time one

Timestamp = tuple[float, float]  # seconds of a clock on the wall, and of this process on its processors


@dataclass(frozen=True)
class TrialResult:
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


class TimingCallback(pl.Callback):
    """Notes when each step and validation ended and what the process held; ends the run when it has seen enough.

    Args:
        checkpoint: where one is saved at the end, to be timed.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self.start = self.end = self._validation_start = timestamp()
        self.step_ends: list[Timestamp] = []
        self.validation_times: list[Timestamp] = []
        self.save_time: Timestamp = (0.0, 0.0)
        self.memory_before = self.memory_peak = self.worker_memory = self.n_fit_validations = 0
        self.device = torch.device("cpu")

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The first batch is yet to be loaded."""
        self.device = trainer.strategy.root_device
        self.start, self.memory_before = timestamp(), memory_allocated(self.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """A step is done."""
        self.step_ends.append(timestamp())
        enough = self.step_ends[-1][0] - self.step_ends[0][0] > TARGET_SECONDS and len(self.step_ends) >= MIN_STEPS
        trainer.should_stop |= enough
        if enough or len(self.step_ends) == trainer.max_steps:
            self.worker_memory = children_memory()

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self._validation_start = timestamp()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop it."""
        self.validation_times.append(elapsed(self._validation_start))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save a checkpoint, and start the clock of the run's end."""
        self.memory_peak = max_memory_allocated(self.device)  # of steps: what saving takes does not grow with the batch
        save_start = timestamp()
        trainer.save_checkpoint(self._checkpoint)
        self.save_time = elapsed(save_start)
        self.n_fit_validations, self.end = len(self.validation_times), timestamp()


def run_trial(
    config: PretrainConfig,
    small_index: Index,
    index: Index,
    out: Path,
    split_seed: int,
    accelerator: str,
    store: Path,
    free: int,
) -> TrialResult:
    """Pretrain on a few images, in this process, which must be a fresh one: it changes the working folder and limits.

    Args:
        config: the run.
        small_index: images enough for a batch and a held-out batch, with their splits.
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
    small_index, index = (replace(i, root=i.root.resolve()) for i in (small_index, index))
    tracking_ready = _is_tracking_ready(tracking_uri())
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{out / 'mlflow.db'}"
    if tracking_ready:
        check_target()  # the run's own data base is made already
    try:
        if not uses_cuda(accelerator):
            _limit_memory(free)
        return _time_run(config, small_index, index, out, split_seed, accelerator, store)
    except (RuntimeError, UsageError) as error:  # as it is, or as what `rehearse` makes of it
        if "allocate memory" in str(error) or "out of memory" in str(error):
            raise MemoryError from error
        raise


def _time_run(
    config: PretrainConfig, small_index: Index, index: Index, out: Path, split_seed: int, accelerator: str, store: Path
) -> TrialResult:
    prepare, missing = _prepare_images(config, small_index, index, store)
    start = timestamp()
    cohort = open_cohort(small_index, small_index.records, config.preprocessing, split_seed=split_seed, store=store)
    check = _divide_time(elapsed(start), len(small_index.records))
    timing = TimingCallback(out / "timed.ckpt")
    short_config = config.model_copy(
        update={"max_steps": min(config.max_steps, MAX_STEPS), "checkpoint_every_steps": 10**9}
    )
    options: dict[str, Any] = {"split_seed": split_seed, "accelerator": accelerator, "store": store}
    start = timestamp()
    pretrain(short_config, small_index, out / "run", callbacks=[timing], **options)
    end, end_peak = elapsed(timing.end), max_memory_allocated(timing.device)
    steps = len(timing.step_ends)
    first = _subtract_times(timing.step_ends[0], timing.start)
    warm = min(WARM_UP_STEPS, steps - 1)
    step = (
        _divide_time(_subtract_times(timing.step_ends[-1], timing.step_ends[warm - 1]), steps - warm) if warm else first
    )
    validation = _divide_time(_sum_times(timing.validation_times), len(timing.validation_times))
    reference, n_reference = _time_reference(config, cohort, out / "run" / "encoder")
    parts = {
        "start": _subtract_times(timing.start, start),
        "first_step": _subtract_times(first, step),
        "step": step,
        "validation": validation,
        "checkpoint": timing.save_time,
        "end": _subtract_times(
            end, _sum_times([*timing.validation_times[timing.n_fit_validations :], timing.save_time])
        ),  # the run saves its last step, too
        "check": check,
        "prepare": prepare,
        "read": _time_read(config, cohort),
        "reference": reference,
    }
    clocks = {
        clock: {name: max(0.0, part[i]) for name, part in parts.items()} for i, clock in enumerate(("wall", "cpu"))
    }
    memory = {
        "before": timing.memory_before,
        "steps": timing.memory_peak,
        "end": end_peak,
        "worker": timing.worker_memory // max(1, config.workers),
    }
    sizes = _measure_file_sizes(config.model_copy(update={"max_steps": steps}), cohort, out)
    n_validation_views = count_validation_images(config, cohort.records("train"), cohort.records("val"))
    counts = (steps, len(small_index.records), missing, n_reference, n_validation_views, timing.device.type)
    return TrialResult(*counts, clocks, memory, sizes)


def _prepare_images(config: PretrainConfig, small_index: Index, index: Index, folder: Path) -> tuple[Timestamp, int]:
    """Bring the images of the short run into the store; what one took, and how many of all are missing then."""
    store, steps = Store(folder), config.preprocessing

    def is_in_store(record: Any, source_index: Index) -> bool:
        key = store.compute_key(source_index, record, steps)
        return (store.folder / key[:2] / f"{key}.b2nd").is_file()

    small_images = {record.image for record in small_index.records}
    others = [record for record in index.records if record.image not in small_images and not is_in_store(record, index)]
    new_records = [record for record in small_index.records if not is_in_store(record, small_index)]
    if not new_records and others:
        new_records, others = others[:TIMING_IMAGES], others[TIMING_IMAGES:]
    start = timestamp()
    for record in new_records:
        _ignore_errors(lambda record=record: store.add(index, record, steps))  # type: ignore[misc]
    return _divide_time(elapsed(start), len(new_records)), len(others)


def _ignore_errors(work: Callable[[], object]) -> None:
    """Do what may fail for one bad file, as the run would leave it out."""
    try:
        work()
    except Exception as error:  # a decoder may raise anything
        if isinstance(error, MemoryError):
            raise


def _time_read(config: PretrainConfig, cohort: Cohort) -> Timestamp:
    """Reading an image from the store, beyond what it costs from RAM."""
    keys, views = cohort.store_keys(cohort.records("train"))[:TIMING_IMAGES], config.views
    data = ViewDataset(cohort.store, keys, shape=views.shape, count=views.count, augmentations=views.augmentations)
    times = []
    for _ in range(2):
        start = timestamp()
        for place in range(len(keys)):
            data[place, 0]
        times.append(_divide_time(elapsed(start), len(keys)))
    return _subtract_times(*times)


def _time_reference(config: PretrainConfig, cohort: Cohort, encoder: Path) -> tuple[Timestamp, int]:
    """What an image's statistics for the guard take, and of how many they were written."""
    if not (encoder / OOD_FILE).is_file():
        return (0.0, 0.0), 0
    records = cohort.records("train")
    network: Any = load_encoder(encoder)
    start = timestamp()
    rows = list(iterate_record_features(network, cohort, records[:TIMING_IMAGES], network.spec))
    return _divide_time(elapsed(start), len(rows)), count_reference_images(records, cohort.records("val"))


def _measure_file_sizes(config: PretrainConfig, cohort: Cohort, out: Path) -> dict[str, float]:
    keys = list(cohort.keys.values())
    files = [path for key in keys for path in (cohort.store.folder / key[:2]).glob(f"{key}*.b2nd")]
    image_bytes = sum(cohort.store.get_entry(key).nbytes for key in keys) / len(keys)
    train, held_out = cohort.records("train"), cohort.records("val")
    run_files = [path for path in (out / "run").rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    history = (out / "run" / "history.csv").stat().st_size
    return {
        "image": sum(path.stat().st_size for path in files) / len(keys),
        "in_memory": image_bytes,
        "cached": estimate_cached_bytes(config, image_bytes, train, held_out),
        "worker_cached": estimate_worker_cached_bytes(config, image_bytes, train),
        "checkpoint": (out / "timed.ckpt").stat().st_size,
        "history": history / config.max_steps,
        "run": sum(path.stat().st_size for path in run_files) - history,
    }


def timestamp() -> Timestamp:
    """Both clocks."""
    return time.perf_counter(), time.process_time()


def elapsed(start: Timestamp) -> Timestamp:
    """Seconds from then to now."""
    return _subtract_times(timestamp(), start)


def _limit_memory(free: int) -> None:
    """Let what this machine cannot hold fail here, rather than bring the machine down."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (process_status_bytes("VmData") + free, resource.RLIM_INFINITY))


def _is_tracking_ready(uri: str) -> bool:
    """Whether a tracking target exists; only a local SQLite file may not."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()


def _subtract_times(one: Timestamp, other: Timestamp) -> Timestamp:
    return one[0] - other[0], one[1] - other[1]


def _sum_times(moments: Sequence[Timestamp]) -> Timestamp:
    return sum(m[0] for m in moments), sum(m[1] for m in moments)


def _divide_time(duration: Timestamp, count: int) -> Timestamp:
    return duration[0] / max(1, count), duration[1] / max(1, count)
