"""What a run will cost on this machine, from a few real steps of it: memory, hours, disk, and what would fit."""

from __future__ import annotations

import logging
import math
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from medim.config import PretrainConfig
from medim.data.index.index import Index, Record
from medim.data.loading.datasets import CACHE_BYTES
from medim.data.loading.splits import split
from medim.data.loading.store import default_folder
from medim.training.auto_config import coarsest_stride
from medim.training.engine.checkpoints import KEPT
from medim.training.engine.resources import available_memory, free_disk
from medim.training.plan.trial_run import Measured, measure
from medim.training.plan.workload import (
    cached_bytes,
    checkpoints,
    reference_images,
    subjects,
    validation_images,
    validations,
    worker_cached_bytes,
)
from medim.training.pretrain.run import rehearse
from medim.types import UserError

log = logging.getLogger(__name__)
FURTHEST = 4  # times what was asked for, beyond which an estimate by proportion is not given
ROOM = 0.95  # of what is there that a plan may fill: predictions are not exact


def plan(
    config: PretrainConfig,
    index: Index,
    out: Path,
    *,
    split_seed: int = 0,
    accelerator: str = "auto",
    store: Path | None = None,
) -> dict[str, Any]:
    """Run a few steps of a pretraining run in a process of its own, and say what all of it will take.

    The images of these steps are preprocessed into the run's store, where the run finds them; nothing else is left.

    Args:
        config: the run.
        index: its images.
        out: the run's folder, or one on the same disk.
        split_seed: of the split by subject.
        accelerator: Lightning's name of the device kind.
        store: folder of preprocessed images; None is the user's cache.

    Returns:
        `seconds` of `start`, `steps`, `validations`, `checkpoints`, `end`, and `total`; `cpu_seconds` of the process,
        alike; `peak_memory_bytes` of the training process (or the GPU), `memory_bytes` with its loading processes
        (which take none of a GPU's); `disk_bytes`; what is `available`; `suggestions`; and `refusals`, a sentence for
        each thing that does not fit.

    Raises:
        UserError: the few steps cannot be run, whatever their batch size.
        UsageError: a section cannot be built.
    """
    rehearse(config)
    splits = split(index, seed=split_seed)
    train, held_out = ([r for r in index.records if splits[r.image] == part] for part in ("train", "val"))
    size = max(2, min(config.batch_size, subjects(train)))  # one subject alone is refused by the run itself
    config = config.model_copy(update={"batch_size": size})
    chosen = {*sample(train, max(size, 10)), *sample(held_out, max(size, 3))}
    small = replace(index, records=tuple(replace(r, split=splits[r.image]) for r in index.records if r.image in chosen))
    free = available_memory(accelerator)
    found, batch = _measured(config, small, index, split_seed, accelerator, store or default_folder(), free)
    return predict(config, found, batch, train, held_out, available=available(out, store, free))


def sample(records: list[Record], subjects: int) -> list[str]:
    """Keys of one image each of some subjects, and the largest image of all among them."""
    firsts: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: -math.prod(r.shape))[:1] + records:
        firsts.setdefault(record.subject, record)
    return [record.image for record in list(firsts.values())[:subjects]]


def _measured(
    config: PretrainConfig, small: Index, index: Index, split_seed: int, accelerator: str, store: Path, free: int
) -> tuple[Measured, int]:
    """The figures at the largest batch, of the wanted one and its halves, that this machine can run."""
    batch = config.batch_size
    with tempfile.TemporaryDirectory(prefix="medim-plan-") as folder:
        while True:
            tried = config.model_copy(update={"batch_size": batch})
            given = (tried, small, index, Path(folder) / f"batch-{batch}", split_seed, accelerator, store, free)
            try:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    return pool.submit(measure, *given).result(), batch
            except (BrokenProcessPool, MemoryError):
                if batch <= 2:
                    raise UserError(
                        f"memory: two images a step need more than the {_gib(free)} that are free here. "
                        "Make views.shape or encoder.channels smaller, or take a machine with more memory."
                    ) from None
            smaller = max(2, batch // 2)
            log.info("a batch of %d needs more memory than is free; trying %d", batch, smaller)
            batch = smaller


@dataclass(frozen=True)
class Memory:
    """Bytes of RAM, or of the GPU where the run is on one (not run), that a run takes at once.

    Attributes:
        base: the training process without a batch, with the images that the whole run keeps in RAM.
        image: what each image of a batch adds.
        workers: the loading processes, which take none of a GPU's.
        end: the training process at its peak over a run with a batch that could be measured, its end included.
    """

    base: float
    image: float
    workers: float
    end: float

    def peak(self, batch: int) -> int:
        """Of the training process, with at least the batch that was measured."""
        return int(max(self.base + self.image * batch, self.end))

    def total(self, batch: int) -> int:
        """With the loading processes."""
        return self.peak(batch) + int(self.workers)


def predict(
    config: PretrainConfig,
    found: Measured,
    batch: int,
    train: list[Record],
    held_out: list[Record],
    *,
    available: dict[str, int],
) -> dict[str, Any]:
    """The whole run from what a short one took; see `plan`.

    Args:
        config: the run; its batch size is the wanted one.
        found: of the short run.
        batch: its batch size, smaller than the wanted one where that could not be run.
        train: images to train on.
        held_out: images to measure on.
        available: bytes free, by what.
    """
    often = _counted(config, found, batch, train, held_out)
    seconds, cpu_seconds = (_spent(found.clocks[clock], often) for clock in ("wall", "cpu"))
    memory = memory_of(config, found, batch, train, held_out)
    disk = disk_of(config, found)
    needed = {
        "memory": memory.total(config.batch_size),
        "disk": disk["checkpoints"] + disk["run"],
        "store": disk["store"],
    }
    hints = suggestions(config, memory, batch, available["memory"] * ROOM)
    return {
        "schema_version": 1,
        "command": "plan",
        "config_hash": config.hash,
        "input_shape": list(config.views.shape),
        "batch_size": config.batch_size,
        "steps": config.max_steps,
        "measured_steps": found.steps,
        "measured_batch_size": batch,
        "seconds_per_step": found.clocks["wall"]["step"] * config.batch_size / batch,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "hours": seconds["total"] / 3600,
        "peak_memory_bytes": memory.peak(config.batch_size),
        "memory_bytes": needed["memory"],
        "disk_bytes": {**disk, "total": sum(disk.values())},
        "available": available,
        "suggestions": hints,
        "refusals": refusals(needed, available, hints, failed=config.batch_size if batch < config.batch_size else None),
    }


def _counted(
    config: PretrainConfig, found: Measured, batch: int, train: list[Record], held_out: list[Record]
) -> dict[str, float]:
    """How often the run does each thing that the short one timed."""
    encoded = validation_images(config, train, held_out) / max(1, found.validation_images)
    looked_at = reference_images(train, held_out) if found.reference_images else 0
    return {
        "check": len(train) + len(held_out) - found.images,
        "prepare": found.missing,
        "step": config.max_steps * config.batch_size / batch,
        "read": _read_anew(config, found, len(train)),
        "validation": validations(config, held_out) * encoded,
        "checkpoint": checkpoints(config),
        "reference": looked_at - found.reference_images,
    }


def _spent(one: dict[str, float], often: dict[str, float]) -> dict[str, float]:
    """Seconds of each part of the run, and in total, on the clock that took `one` of each thing."""
    taken = {name: one[name] * count for name, count in often.items()}
    parts = {
        "start": one["start"] + taken["check"] + taken["prepare"],
        "steps": one["first_step"] + taken["step"] + taken["read"],
        "validations": taken["validation"],
        "checkpoints": taken["checkpoint"],
        "end": one["end"] + taken["reference"],
    }
    return {**parts, "total": sum(parts.values())}


def _read_anew(config: PretrainConfig, found: Measured, images: int) -> float:
    """Images read from the store, not from RAM, in the training process: each once, or ever again where RAM ends."""
    if config.workers:
        return 0.0
    drawn = config.max_steps * config.batch_size
    held = min(1.0, CACHE_BYTES / max(1.0, found.bytes["in_memory"] * images))
    return min(drawn, images) * held + drawn * (1 - held)


def memory_of(
    config: PretrainConfig, found: Measured, batch: int, train: list[Record], held_out: list[Record]
) -> Memory:
    """What the run will take: the figures of the short one, and the images that it will keep beyond those it kept.

    Args:
        config: the run.
        found: of the short run.
        batch: its batch size.
        train: images to train on.
        held_out: images to measure on.
    """
    base, image = found.memory["before"], (found.memory["steps"] - found.memory["before"]) / batch
    if found.device == "cuda":  # images and loading processes are in RAM
        return Memory(base, image, 0.0, found.memory["end"])
    each = found.bytes["in_memory"]
    kept = max(0.0, cached_bytes(config, each, train, held_out) - found.bytes["cached"])
    worker_kept = max(0.0, worker_cached_bytes(config, each, train) - found.bytes["worker_cached"])
    workers = config.workers * (found.memory["worker"] + worker_kept)
    return Memory(base + kept, image, workers, found.memory["end"] + kept)


def disk_of(config: PretrainConfig, found: Measured) -> dict[str, int]:
    """Bytes that the run will write into the `store`, as `checkpoints` and as the rest of the `run`.

    Args:
        config: the run.
        found: of the short run.
    """
    kept = min(KEPT + 1, checkpoints(config))  # one more while it is written
    return {
        "store": int(found.bytes["image"] * found.missing),
        "checkpoints": int(kept * found.bytes["checkpoint"]),
        "run": int(found.bytes["run"] + found.bytes["history"] * config.max_steps),
    }


def suggestions(config: PretrainConfig, memory: Memory, measured: int, free: float) -> dict[str, Any]:
    """The largest batch, and the largest views at this batch, that fit by the figures of an image.

    Args:
        config: the run.
        memory: that it takes.
        measured: the batch size that could be run; twice of it could not where it is not the wanted one.
        free: bytes that a plan may fill.

    Returns:
        `batch_size`, None where not even two fit, and `views`, None where the coarsest map would have fewer than two
        cells a side; both None where it is the run's end that does not fit, which neither changes.
    """
    room = free - memory.base - memory.workers
    if memory.total(config.batch_size) > free and room >= memory.image * config.batch_size:
        return {"batch_size": None, "views": None}
    most = config.batch_size * FURTHEST if measured == config.batch_size else 2 * measured - 1
    batch = min(most, int(room / memory.image)) if memory.image > 0 else most
    voxels = min(most / config.batch_size, room / max(1.0, memory.image * config.batch_size))
    stride = coarsest_stride(config.encoder, config.spatial_dims)
    factor = max(0.0, voxels) ** (1 / config.spatial_dims)
    sides = [int(n * factor / stride) * stride for n in config.views.shape]
    return {
        "batch_size": batch if batch >= 2 else None,
        "views": sides if min(sides) >= 2 * stride else None,
    }


def refusals(
    needed: dict[str, int], there: dict[str, int], hints: dict[str, Any], *, failed: int | None = None
) -> list[str]:
    """A sentence for each thing of which there is not enough: what is needed, what is there, what to change.

    Args:
        needed: bytes, by what.
        there: bytes free, by what.
        hints: see `suggestions`.
        failed: the wanted batch size, where it was tried and memory did not suffice.
    """
    sentences, too_much = [], needed["memory"] > there["memory"] * ROOM
    if too_much or failed:
        ways = [f"--set batch_size={hints['batch_size']}"] if hints["batch_size"] else []
        ways += [f"--set views.shape={hints['views']}".replace(" ", "")] if hints["views"] else []
        change = f"{' or '.join(ways)} would fit" if ways else "no batch or view would fit; take a smaller encoder"
        lacking = (
            f"the run needs about {_gib(needed['memory'])}" if too_much else f"a batch of {failed} could not be run"
        )
        sentences.append(
            f"memory: {lacking}, and {_gib(there['memory'])} are free here; "
            f"{change} (--set encode_in_chunks_of=N needs less too, where nothing normalises over the batch)."
        )
    for name, place, change in (
        ("disk", "--out", "give another --out or a larger checkpoint_every_steps"),
        ("store", "the store", "free some space or set MEDIM_CACHE to a larger disk"),
    ):
        if needed[name] > there[name] * ROOM:
            sentences.append(
                f"disk: {place} needs about {_gib(needed[name])}, and {_gib(there[name])} are free there; {change}."
            )
    return sentences


def available(out: Path, store: Path | None, memory: int) -> dict[str, int]:
    """Bytes free: of memory, on the run's disk, on the store's."""
    return {"memory": memory, "disk": free_disk(out), "store": free_disk(store or default_folder())}


def check(found: dict[str, Any]) -> None:
    """Refuse a plan that does not fit this machine.

    Raises:
        UserError: its first refusal.
    """
    if found["refusals"]:
        raise UserError(cast(str, found["refusals"][0]))


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
