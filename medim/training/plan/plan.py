"""Estimate the time, memory and disk space of a run from a few steps of it, and suggest sizes that fit."""

from __future__ import annotations

import logging
import math
import tempfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from medim.config import PretrainConfig
from medim.data.index.index import ImageRecord, Index
from medim.data.loading.datasets import CACHE_BYTES
from medim.data.loading.splits import assign_splits
from medim.data.loading.store import locate_default_store
from medim.data.parallel import block_interrupts_of_workers, open_process_pool, prepare_pool_worker
from medim.training.auto_config import coarsest_stride
from medim.training.engine.checkpoints import MAX_CHECKPOINTS
from medim.training.engine.resources import available_memory, free_disk
from medim.training.plan.estimate import PlanEstimate, SizeSuggestions
from medim.training.plan.trial_run import TrialResult, run_trial
from medim.training.plan.workload import (
    count_checkpoints,
    count_reference_images,
    count_subjects,
    count_validation_images,
    count_validations,
    estimate_cached_bytes,
    estimate_worker_cached_bytes,
)
from medim.training.pretrain.config import dry_run_pretraining
from medim.types import UserError

log = logging.getLogger(__name__)
MAX_EXTRAPOLATION = 4  # largest factor on the requested sizes for which an estimate is extrapolated
USABLE_FRACTION = 0.95  # fraction of the free memory or disk that a plan may use, because predictions are not exact


def plan_pretraining(
    config: PretrainConfig,
    index: Index,
    out: Path,
    *,
    split_seed: int = 0,
    accelerator: str = "auto",
    store: Path | None = None,
) -> PlanEstimate:
    """Run a few steps of a pretraining run in a separate process, and predict the costs of the whole run.

    The images of these steps are preprocessed into the store of the run, where the run uses them later; no other files
    remain.

    Args:
        config: configuration of the run.
        index: images of the run.
        out: folder of the run, or one on the same disk.
        split_seed: random seed of the split by subject.
        accelerator: device kind, in the terms of Lightning.
        store: folder of preprocessed images; None is the cache of the user.

    Returns:
        `seconds` of `start`, `steps`, `validations`, `checkpoints`, `ood_detector`, `end` and `total`; `cpu_seconds` of
        the process, with the same keys; `peak_memory_bytes` of the training process (or the GPU); `memory_bytes`, which
        includes the data-loading workers (except on a GPU); `disk_bytes`; `available` (see `measure_free_bytes`);
        `suggestions` (see `suggest_sizes`); and `refusals`, one sentence per resource that does not suffice.

    Raises:
        UserError: the steps cannot be run with any batch size.
        UsageError: a section of the configuration cannot be built.
    """
    dry_run_pretraining(config)
    splits = assign_splits(index, seed=split_seed)
    train, held_out = ([r for r in index.records if splits[r.image] == part] for part in ("train", "val"))
    size = max(2, min(config.batch_size, count_subjects(train)))  # the run itself rejects a single subject
    config = config.model_copy(update={"batch_size": size})
    images = {*sample_image_keys(train, max(size, 10)), *sample_image_keys(held_out, max(size, 3))}
    small_index = replace(
        index, records=tuple(replace(r, split=splits[r.image]) for r in index.records if r.image in images)
    )
    free_memory = available_memory(accelerator)
    trial, batch = _run_trial_in_process(
        config, small_index, index, split_seed, accelerator, store or locate_default_store(), free_memory
    )
    return predict_costs(config, trial, batch, train, held_out, free_bytes=measure_free_bytes(out, store, free_memory))


def sample_image_keys(records: list[ImageRecord], n_subjects: int) -> list[str]:
    """Select one image per subject for some subjects, including the largest image of all."""
    firsts: dict[str, ImageRecord] = {}
    for record in sorted(records, key=lambda r: -math.prod(r.shape))[:1] + records:
        firsts.setdefault(record.subject, record)
    return [record.image for record in list(firsts.values())[:n_subjects]]


def _run_trial_in_process(
    config: PretrainConfig,
    small_index: Index,
    index: Index,
    split_seed: int,
    accelerator: str,
    store: Path,
    free_memory: int,
) -> tuple[TrialResult, int]:
    """Run the trial with the requested batch size, halved until it fits in memory; return the result and batch size."""
    batch = config.batch_size
    with tempfile.TemporaryDirectory(prefix="medim-plan-") as folder:
        while True:
            trial_config = config.model_copy(update={"batch_size": batch})
            arguments = (
                trial_config,
                small_index,
                index,
                Path(folder) / f"batch-{batch}",
                split_seed,
                accelerator,
                store,
                free_memory,
            )
            try:
                with open_process_pool(1, _prepare_trial) as pool:
                    with block_interrupts_of_workers():
                        future = pool.submit(run_trial, *arguments)
                    return future.result(), batch
            except (BrokenProcessPool, MemoryError):
                if batch <= 2:
                    raise UserError(
                        f"memory: two images per step need more than the {_render_gib(free_memory)} that are free. "
                        "Reduce views.shape or encoder.channels, or use a machine with more memory."
                    ) from None
            smaller = max(2, batch // 2)
            log.info("a batch of %d needs more memory than is free; trying %d", batch, smaller)
            batch = smaller


def _prepare_trial() -> None:
    """Turn off the messages of a trial, such as its verdict, which do not concern the planned run."""
    prepare_pool_worker()
    logging.disable(logging.WARNING)


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a run in bytes: GPU memory if the run uses a GPU (not run), else RAM.

    Attributes:
        base: memory of the training process without a batch, including the images that the run keeps in RAM.
        image: additional memory per image of a batch.
        workers: memory of the data-loading workers; 0 on a GPU.
        end: peak memory of the training process over a whole run with the measured batch size, including the end of the
            run.
    """

    base: float
    image: float
    workers: float
    end: float

    def peak(self, batch: int) -> int:
        """Compute the peak of the training process for a batch size that is not below the measured one."""
        return int(max(self.base + self.image * batch, self.end))

    def total(self, batch: int) -> int:
        """Compute the peak of the training process and its data-loading workers."""
        return self.peak(batch) + int(self.workers)


def predict_costs(
    config: PretrainConfig,
    trial: TrialResult,
    batch: int,
    train: list[ImageRecord],
    held_out: list[ImageRecord],
    *,
    free_bytes: dict[str, int],
) -> PlanEstimate:
    """Predict the costs of the whole run from those of a short run; see `plan_pretraining`.

    Args:
        config: configuration of the run, with the requested batch size.
        trial: result of the short run.
        batch: batch size of the short run; smaller than the requested one if that did not fit in memory.
        train: images of the training split.
        held_out: images of the validation split.
        free_bytes: free bytes of `memory`, `disk` and `store`.
    """
    counts = _count_operations(config, trial, batch, train, held_out)
    seconds, cpu_seconds = (_compute_seconds(trial.clocks[clock], counts) for clock in ("wall", "cpu"))
    memory = estimate_memory(config, trial, batch, train, held_out)
    disk = estimate_disk(config, trial)
    requirements = {
        "memory": memory.total(config.batch_size),
        "disk": disk["checkpoints"] + disk["run"],
        "store": disk["store"],
    }
    free_memory = free_bytes["memory"] * USABLE_FRACTION
    hints = suggest_sizes(config, memory, batch, free_memory, image_shape=trial.image_shape)
    return {
        "schema_version": 1,
        "command": "plan",
        "config_hash": config.hash,
        "input_shape": list(config.views.shape),
        "batch_size": config.batch_size,
        "steps": config.max_steps,
        "measured_steps": trial.steps,
        "measured_batch_size": batch,
        "seconds_per_step": trial.clocks["wall"]["step"] * config.batch_size / batch,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "hours": seconds["total"] / 3600,
        "peak_memory_bytes": memory.peak(config.batch_size),
        "memory_bytes": requirements["memory"],
        "disk_bytes": {**disk, "total": sum(disk.values())},
        "available": free_bytes,
        "suggestions": hints,
        "refusals": list_refusals(
            requirements, free_bytes, hints, oversized_batch=config.batch_size if batch < config.batch_size else None
        ),
    }


def _count_operations(
    config: PretrainConfig, trial: TrialResult, batch: int, train: list[ImageRecord], held_out: list[ImageRecord]
) -> dict[str, float]:
    """Count how often the run performs each operation that the short run timed."""
    view_ratio = count_validation_images(config, train, held_out) / max(1, trial.validation_images)
    n_reference = count_reference_images(train, held_out) if trial.reference_images else 0
    return {
        "check": len(train) + len(held_out) - trial.images,
        "prepare": trial.missing,
        "step": config.max_steps * config.batch_size / batch,
        "read": _count_store_reads(config, trial, len(train)),
        "validation": count_validations(config, held_out) * view_ratio,
        "checkpoint": count_checkpoints(config),
        "reference": n_reference,
        "trial_reference": trial.reference_images,
    }


def _compute_seconds(unit_seconds: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
    """Compute the seconds of each part of the run and in total, from the seconds per operation of one clock."""
    units = {**unit_seconds, "trial_reference": unit_seconds["reference"]}
    seconds = {name: units[name] * count for name, count in counts.items()}
    parts = {
        "start": unit_seconds["start"] + seconds["check"] + seconds["prepare"],
        "steps": unit_seconds["first_step"] + seconds["step"] + seconds["read"],
        "validations": seconds["validation"],
        "checkpoints": seconds["checkpoint"],
        "ood_detector": seconds["reference"],
        "end": max(0.0, unit_seconds["end"] - seconds["trial_reference"]),
    }
    return {**parts, "total": sum(parts.values())}


def _count_store_reads(config: PretrainConfig, trial: TrialResult, images: int) -> float:
    """Count the images that the training process reads from the store instead of RAM.

    Each image is read once; if not all images fit in RAM, the others are read each time.
    """
    if config.workers:
        return 0.0
    n_reads = config.max_steps * config.batch_size
    ram_fraction = min(1.0, CACHE_BYTES / max(1.0, trial.bytes["in_memory"] * images))
    return min(n_reads, images) * ram_fraction + n_reads * (1 - ram_fraction)


def estimate_memory(
    config: PretrainConfig, trial: TrialResult, batch: int, train: list[ImageRecord], held_out: list[ImageRecord]
) -> MemoryEstimate:
    """Estimate the memory of the run from that of the short run and the additional images kept in RAM.

    Args:
        config: configuration of the run.
        trial: result of the short run.
        batch: batch size of the short run.
        train: images of the training split.
        held_out: images of the validation split.
    """
    base, image = trial.memory["before"], (trial.memory["steps"] - trial.memory["before"]) / batch
    if trial.device == "cuda":  # images and data-loading workers are in RAM
        return MemoryEstimate(base, image, 0.0, trial.memory["end"])
    image_bytes = trial.bytes["in_memory"]
    cache_growth = max(0.0, estimate_cached_bytes(config, image_bytes, train, held_out) - trial.bytes["cached"])
    worker_cache_growth = max(
        0.0, estimate_worker_cached_bytes(config, image_bytes, train) - trial.bytes["worker_cached"]
    )
    workers = config.workers * (trial.memory["worker"] + worker_cache_growth)
    return MemoryEstimate(base + cache_growth, image, workers, trial.memory["end"] + cache_growth)


def estimate_disk(config: PretrainConfig, trial: TrialResult) -> dict[str, int]:
    """Estimate the bytes on disk of the `store`, of the `checkpoints` and of the other files of the `run`.

    Args:
        config: configuration of the run.
        trial: result of the short run.
    """
    n_checkpoints = min(MAX_CHECKPOINTS + 1, count_checkpoints(config))  # one more while a checkpoint is being written
    return {
        "store": int(trial.bytes["image"] * trial.missing),
        "checkpoints": int(n_checkpoints * trial.bytes["checkpoint"]),
        "run": int(trial.bytes["run"] + trial.bytes["history"] * config.max_steps),
    }


def suggest_sizes(
    config: PretrainConfig, memory: MemoryEstimate, trial_batch: int, free: float, *, image_shape: tuple[int, ...] = ()
) -> SizeSuggestions:
    """Compute the largest batch size, and the largest views at the requested batch size, that fit in memory.

    Args:
        config: configuration of the run.
        memory: memory estimate of the run.
        trial_batch: batch size of the short run; if it is not the requested one, twice this size did not fit.
        free: bytes that a plan may use.
        image_shape: largest side of a preprocessed image along each axis; no larger views are suggested.

    Returns:
        `batch_size`, None if fewer than two images fit, and `views`, None if the coarsest map would have fewer than two
        cells per side, or no larger views are of use. Both are None if only the end of the run does not fit, which does
        not depend on them.
    """
    room = free - memory.base - memory.workers
    if memory.total(config.batch_size) > free and room >= memory.image * config.batch_size:
        return {"batch_size": None, "views": None}
    largest = config.batch_size * MAX_EXTRAPOLATION if trial_batch == config.batch_size else 2 * trial_batch - 1
    batch = min(largest, int(room / memory.image)) if memory.image > 0 else largest
    voxels = min(largest / config.batch_size, room / max(1.0, memory.image * config.batch_size))
    stride = coarsest_stride(config.encoder, config.spatial_dims)
    factor = max(0.0, voxels) ** (1 / config.spatial_dims)
    sides = [int(n * factor / stride) * stride for n in config.views.shape]
    limits = [side // stride * stride for side in image_shape] or sides
    shape = list(config.views.shape)
    limited = [min(side, max(limit, n)) for side, limit, n in zip(sides, limits, shape, strict=True)]
    is_useful = min(limited) >= 2 * stride and (limited != shape or sides == shape)
    return {"batch_size": batch if batch >= 2 else None, "views": limited if is_useful else None}


def list_refusals(
    requirements: dict[str, int],
    free_bytes: dict[str, int],
    hints: SizeSuggestions,
    *,
    oversized_batch: int | None = None,
) -> list[str]:
    """Describe each resource that does not suffice: the required bytes, the free bytes and the remedy.

    Args:
        requirements: required bytes of `memory`, `disk` and `store`.
        free_bytes: free bytes of the same resources.
        hints: result of `suggest_sizes`.
        oversized_batch: the requested batch size, if it was tried and did not fit in memory.
    """
    sentences, exceeds_memory = [], requirements["memory"] > free_bytes["memory"] * USABLE_FRACTION
    if exceeds_memory or oversized_batch:
        ways = [f"--set batch_size={hints['batch_size']}"] if hints["batch_size"] else []
        ways += [f"--set views.shape={hints['views']}".replace(" ", "")] if hints["views"] else []
        change = f"{' or '.join(ways)} would fit" if ways else "no batch or view size would fit; use a smaller encoder"
        shortage = (
            f"the run needs about {_render_gib(requirements['memory'])}"
            if exceeds_memory
            else f"a batch of {oversized_batch} could not be run"
        )
        sentences.append(
            f"memory: {shortage}, and {_render_gib(free_bytes['memory'])} are free here; "
            f"{change} (--set gradient_cache_chunk=N also reduces memory, without batch normalisation)."
        )
    for name, place, change in (
        ("disk", "--out", "use another --out or a larger checkpoint_every_steps"),
        ("store", "the store", "free some space or set MEDIM_CACHE to a folder on a larger disk"),
    ):
        if requirements[name] > free_bytes[name] * USABLE_FRACTION:
            sentences.append(
                f"disk: {place} needs about {_render_gib(requirements[name])}, and {_render_gib(free_bytes[name])} are "
                f"free there; {change}."
            )
    return sentences


def measure_free_bytes(out: Path, store: Path | None, memory: int) -> dict[str, int]:
    """Measure the free bytes of memory, of the disk of the run and of the disk of the store."""
    return {"memory": memory, "disk": free_disk(out), "store": free_disk(store or locate_default_store())}


def check_plan(estimate: PlanEstimate) -> None:
    """Reject a plan that does not fit this machine.

    Raises:
        UserError: the first refusal of the plan.
    """
    if estimate["refusals"]:
        raise UserError(estimate["refusals"][0])


def _render_gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
