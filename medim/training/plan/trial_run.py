"""Time a few steps of a pretraining run; `medim.training.plan.plan` calls it in a separate process."""

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
import psutil
import torch

from medim.config import PretrainConfig
from medim.data.index.index import Index
from medim.data.loading.cohort import Cohort, open_cohort
from medim.data.loading.datasets import ViewDataset
from medim.data.loading.store import Store
from medim.inference.ood import OOD_FILE
from medim.models.serialization import load_encoder
from medim.tracking.target import check_target, tracking_uri
from medim.training.engine.resources import (
    children_memory,
    max_memory_allocated,
    memory_allocated,
    uses_cuda,
)
from medim.training.fit_ood import iterate_record_features
from medim.training.plan.workload import (
    count_reference_images,
    count_validation_images,
    estimate_cached_bytes,
    estimate_worker_cached_bytes,
)
from medim.training.pretrain.options import PretrainOptions
from medim.training.pretrain.run import pretrain
from medim.types import UsageError

MAX_STEPS, MIN_STEPS, TARGET_SECONDS = 60, 5, 20.0
WARM_UP_STEPS = 2  # first steps, left out of the mean
TIMING_IMAGES = 4  # enough images to time one

Timestamp = tuple[float, float]  # seconds of wall-clock time and of processor time of this process


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """Time, memory and file sizes of a short run.

    Attributes:
        steps: number of steps of the short run.
        images: number of images of the short run.
        missing: number of images of the whole index that are not in the store.
        reference_images: number of images with statistics for the out-of-distribution detector.
        validation_images: number of views that each validation encoded.
        device: kind of the device; `memory` is that of this device.
        clocks: seconds by clock (`wall`, `cpu`) and operation: `start`, `first_step` (beyond a later step), `step`,
            `validation`, `checkpoint`, `end`; and per image `check` (look up in the store), `prepare` (preprocess into
            the store), `read` (from the store, beyond reading from RAM), `reference`.
        memory: bytes of the process `before` its first step, at the peak of its `steps` and at the peak until its
            `end`; and RAM of one `worker`.
        bytes: size of an `image` in the store and `in_memory`, of the images `cached` in RAM by the training process
            and by each worker (`worker_cached`), of a `checkpoint`, of the rows of `history` per step, and of the other
            files of the `run`.
        image_shape: largest side of a preprocessed image of the short run along each axis.
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
    image_shape: tuple[int, ...] = ()


class TimingCallback(pl.Callback):
    """Records times and memory of steps and validations, and ends the run after enough measurements.

    Args:
        checkpoint: path of the checkpoint that is saved and timed at the end.
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
        """Record the start time and memory, before the first batch is loaded."""
        self.device = trainer.strategy.root_device
        self.start, self.memory_before = timestamp(), memory_allocated(self.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Record the end time of a step, and stop the run after enough steps."""
        self.step_ends.append(timestamp())
        enough = self.step_ends[-1][0] - self.step_ends[0][0] > TARGET_SECONDS and len(self.step_ends) >= MIN_STEPS
        trainer.should_stop |= enough
        if enough or len(self.step_ends) == trainer.max_steps:
            self.worker_memory = children_memory()

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record the start time of a validation."""
        self._validation_start = timestamp()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record the duration of a validation."""
        self.validation_times.append(elapsed(self._validation_start))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save a checkpoint, and record its duration and the start time of the end of the run."""
        self.memory_peak = max_memory_allocated(
            self.device
        )  # of the steps: the memory for saving does not depend on the batch size
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
    """Pretrain on a few images in this process, which must be a fresh one: its working folder and limits change.

    Args:
        config: configuration of the run.
        small_index: images sufficient for a training batch and a validation batch, with their splits.
        index: all images of the run.
        out: temporary folder.
        split_seed: random seed of the split by subject.
        accelerator: device kind, in the terms of Lightning.
        store: folder of preprocessed images.
        free: bytes that this process may allocate in addition.

    Raises:
        MemoryError: the process needs more than `free` bytes.
    """
    store = store.absolute()
    small_index, index = (replace(i, root=i.root.resolve()) for i in (small_index, index))
    tracking_ready = _is_tracking_ready(tracking_uri())
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{out / 'mlflow.db'}"
    if tracking_ready:
        check_target()  # the database of the real run exists, so its creation is not timed
    try:
        if not uses_cuda(accelerator):
            _limit_memory(free)
        return _time_run(config, small_index, index, out, split_seed, accelerator, store)
    except (RuntimeError, UsageError) as error:  # raised directly, or converted by the dry run
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
    options = PretrainOptions(split_seed=split_seed, accelerator=accelerator, store=store, callbacks=[timing])
    start = timestamp()
    pretrain(short_config, small_index, out / "run", options)
    end, end_peak = elapsed(timing.end), max_memory_allocated(timing.device)
    steps = len(timing.step_ends)
    first = _subtract_times(timing.step_ends[0], timing.start)
    warm = min(WARM_UP_STEPS, steps - 1)
    step = (
        _divide_time(_subtract_times(timing.step_ends[-1], timing.step_ends[warm - 1]), steps - warm) if warm else first
    )
    validation = _divide_time(_sum_times(timing.validation_times), len(timing.validation_times))
    reference, n_reference = _time_reference(cohort, out / "run" / "encoder", timing.device)
    parts = {
        "start": _subtract_times(timing.start, start),
        "first_step": _subtract_times(first, step),
        "step": step,
        "validation": validation,
        "checkpoint": timing.save_time,
        "end": _subtract_times(
            end, _sum_times([*timing.validation_times[timing.n_fit_validations :], timing.save_time])
        ),  # the run also saves its last step
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
    return TrialResult(
        steps=steps,
        images=len(small_index.records),
        missing=missing,
        reference_images=n_reference,
        validation_images=count_validation_images(config, cohort.records("train"), cohort.records("val")),
        device=timing.device.type,
        clocks=clocks,
        memory=memory,
        bytes=sizes,
        image_shape=_measure_largest_sides(cohort),
    )


def _prepare_images(config: PretrainConfig, small_index: Index, index: Index, folder: Path) -> tuple[Timestamp, int]:
    """Preprocess the images of the short run; return the time per image, and the number of images still missing."""
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
    """Call a function that may fail for a bad file, which the run itself would leave out."""
    try:
        work()
    except Exception as error:  # a decoder may raise any exception
        if isinstance(error, MemoryError):
            raise


def _time_read(config: PretrainConfig, cohort: Cohort) -> Timestamp:
    """Measure the time to read an image from the store, beyond that of reading it from RAM."""
    keys, views = cohort.store_keys(cohort.records("train"))[:TIMING_IMAGES], config.views
    data = ViewDataset(cohort.store, keys, shape=views.shape, count=views.count, augmentations=views.augmentations)
    times = []
    for _ in range(2):
        start = timestamp()
        for place in range(len(keys)):
            data[place, 0]
        times.append(_divide_time(elapsed(start), len(keys)))
    return _subtract_times(*times)


def _time_reference(cohort: Cohort, encoder: Path, device: torch.device) -> tuple[Timestamp, int]:
    """Measure the time per image for the statistics of the out-of-distribution detector, and count the images."""
    if not (encoder / OOD_FILE).is_file():
        return (0.0, 0.0), 0
    records = cohort.records("train")
    network: Any = load_encoder(encoder).to(device)
    start = timestamp()
    rows = list(iterate_record_features(network, cohort, records[:TIMING_IMAGES], network.spec))
    return _divide_time(elapsed(start), len(rows)), count_reference_images(records, cohort.records("val"))


def _measure_largest_sides(cohort: Cohort) -> tuple[int, ...]:
    """Measure the largest side of the preprocessed images along each axis, in voxels."""
    shapes = [cohort.store.get_entry(key).shape for key in cohort.keys.values()]
    return tuple(max(sides) for sides in zip(*shapes, strict=True))


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
    """Read the wall clock and the processor clock."""
    return time.perf_counter(), time.process_time()


def elapsed(start: Timestamp) -> Timestamp:
    """Compute the seconds since a timestamp."""
    return _subtract_times(timestamp(), start)


def _limit_memory(free: int) -> None:
    """Limit the memory of this process, so that an allocation fails here instead of exhausting the machine."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + free, resource.RLIM_INFINITY))


def _is_tracking_ready(uri: str) -> bool:
    """Whether a tracking target exists; only a local SQLite file may be missing."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()


def _subtract_times(one: Timestamp, other: Timestamp) -> Timestamp:
    return one[0] - other[0], one[1] - other[1]


def _sum_times(moments: Sequence[Timestamp]) -> Timestamp:
    return sum(m[0] for m in moments), sum(m[1] for m in moments)


def _divide_time(duration: Timestamp, count: int) -> Timestamp:
    return duration[0] / max(1, count), duration[1] / max(1, count)
