"""What a run will cost on this machine, from a few real steps of it: memory, hours, disk, and what would fit."""

from __future__ import annotations

import logging
import math
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from medim.config import PretrainConfig
from medim.data.datasets import CACHE_BYTES
from medim.data.index import Index, Record
from medim.data.splits import split
from medim.data.store import default_folder
from medim.training.machine import available_memory, free_disk
from medim.training.pretrain import HELD_OUT_BATCHES, rehearse
from medim.training.rehearsal import Measured, measure
from medim.training.sizes import coarsest_stride
from medim.types import UserError

log = logging.getLogger(__name__)
KEPT_CHECKPOINTS = 2  # and one more while it is written
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
        alike; `peak_memory_bytes` of the training process (or the device), `memory_bytes` with its loading
        processes; `disk_bytes`; what is `available`; `suggestions`; and `refusals`, a sentence for each thing that
        does not fit.

    Raises:
        UserError: the few steps cannot be run, whatever their batch size.
        UsageError: a section cannot be built.
    """
    rehearse(config)
    splits = split(index, seed=split_seed)
    train, held_out = ([r for r in index.records if splits[r.image] == part] for part in ("train", "val"))
    size = min(config.batch_size, _subjects(train))
    config = config.model_copy(update={"batch_size": max(size, 1)})
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
            log.info("a batch of %d needs more memory than is free; trying %d", batch, batch // 2)
            batch //= 2


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
        batch: its batch size.
        train: images to train on.
        held_out: images to measure on.
        available: bytes free, by what.
    """
    steps, images = config.max_steps, len(train) + len(held_out)
    times = math.ceil(steps / min(config.checkpoint_every_steps, steps)) if _subjects(held_out) > 1 else 0
    saved = steps // config.checkpoint_every_steps
    looked_at = found.reference_images and min(256, len(train)) + min(256, len(held_out))
    scale = config.batch_size / batch
    read_again = _read_anew(config, found, len(train))

    def spent(clock: str) -> dict[str, float]:
        one = found.clocks[clock]
        parts = {
            "start": one["start"] + one["check"] * (images - found.images) + one["prepare"] * found.missing,
            "steps": one["first_step"] + steps * one["step"] * scale + read_again * one["read"],
            "validations": times * one["validation"] * scale,
            "checkpoints": saved * one["checkpoint"],
            "end": one["end"] + one["reference"] * (looked_at - found.reference_images),
        }
        return {**parts, "total": sum(parts.values())}

    seconds = spent("wall")
    base, steps_peak = found.memory["before"], found.memory["steps"]
    an_image = (steps_peak - base) / batch
    cached = _cache(config, found, train, held_out)
    peak = int(max(base + an_image * config.batch_size, found.memory["end"]) + cached)
    kept = min(KEPT_CHECKPOINTS + 1, saved + 1) if saved else 0
    disk = {
        "store": int(found.bytes["image"] * found.missing),
        "checkpoints": int(kept * found.bytes["checkpoint"]),
        "run": int(found.bytes["run"] + found.bytes["history"] * steps),
    }
    needed = {
        "memory": peak + config.workers * (found.memory["worker"] + cached),
        "disk": disk["checkpoints"] + disk["run"],
        "store": disk["store"],
    }
    model = {"base": base + cached, "image": an_image, "free": available["memory"] * ROOM}
    hints = suggestions(config, **model)
    return {
        "schema_version": 1,
        "command": "plan",
        "config_hash": config.hash,
        "input_shape": list(config.views.shape),
        "batch_size": config.batch_size,
        "steps": steps,
        "measured_steps": found.steps,
        "measured_batch_size": batch,
        "seconds_per_step": found.clocks["wall"]["step"] * scale,
        "seconds": seconds,
        "cpu_seconds": spent("cpu"),
        "hours": seconds["total"] / 3600,
        "peak_memory_bytes": peak,
        "memory_bytes": needed["memory"],
        "disk_bytes": {**disk, "total": sum(disk.values())},
        "available": available,
        "suggestions": hints,
        "refusals": refusals(needed, available, hints),
    }


def _read_anew(config: PretrainConfig, found: Measured, images: int) -> float:
    """Images read from the store, not from RAM, in the training process: each once, or ever again where RAM ends."""
    if config.workers:
        return 0.0
    drawn = config.max_steps * config.batch_size
    held = min(1.0, CACHE_BYTES / max(1.0, found.bytes["in_memory"] * images))
    return min(drawn, images) * held + drawn * (1 - held)


def _cache(config: PretrainConfig, found: Measured, train: list[Record], held_out: list[Record]) -> int:
    """Bytes of images that the run will keep in RAM beyond those that the short one kept."""
    each = found.bytes["in_memory"]
    touched = min(len(train), config.max_steps * config.batch_size), min(len(held_out), HELD_OUT_BATCHES * 64)
    full = [min(CACHE_BYTES, int(count * each)) for count in touched]
    return max(0, (0 if config.workers else full[0]) + full[1] - int(found.bytes["cached"]))


def suggestions(config: PretrainConfig, *, base: float, image: float, free: float) -> dict[str, Any]:
    """The largest batch, and the largest views at this batch, that fit by the figures of an image.

    Args:
        config: the run.
        base: bytes that do not depend on batch and views.
        image: bytes that each image of a batch adds.
        free: bytes that a plan may fill.

    Returns:
        `batch_size`, None where not even two fit, and `views`, None where the coarsest map would have fewer than two
        cells a side.
    """
    most = config.batch_size * FURTHEST
    batch = min(most, int((free - base) / image)) if image > 0 else most
    voxels = min(FURTHEST, (free - base) / max(1.0, image * config.batch_size))
    stride = coarsest_stride(config.encoder, config.spatial_dims)
    factor = max(0.0, voxels) ** (1 / config.spatial_dims)
    sides = [int(n * factor / stride) * stride for n in config.views.shape]
    return {
        "batch_size": batch if batch >= 2 else None,
        "views": sides if min(sides) >= 2 * stride else None,
    }


def refusals(needed: dict[str, int], there: dict[str, int], hints: dict[str, Any]) -> list[str]:
    """A sentence for each thing of which there is not enough: what is needed, what is there, what to change."""
    sentences = []
    if needed["memory"] > there["memory"] * ROOM:
        ways = [f"--set batch_size={hints['batch_size']}"] if hints["batch_size"] else []
        ways += [f"--set views.shape={hints['views']}".replace(" ", "")] if hints["views"] else []
        change = f"{' or '.join(ways)} would fit" if ways else "no batch or view would fit; take a smaller encoder"
        sentences.append(
            f"memory: the run needs about {_gib(needed['memory'])}, and {_gib(there['memory'])} are free here; "
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


def _subjects(records: list[Record]) -> int:
    return len({record.subject for record in records})


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
