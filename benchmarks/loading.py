"""Speed of loading crops from the store, and step time below which loading limits a run.

For a preset on a set of images, these values are measured: crops per second and core, for images that are read for the
first time and for images in memory; the time of a step (one thread); the fraction of a step that a run without loading
processes would wait; and the step time below which N loading processes on separate cores limit the run. All times are
CPU times, which depend less than wall times on other processes of the machine.

    OMP_NUM_THREADS=1 python benchmarks/loading.py --preset mri --out loading.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import RunParts

from medim.config import read_config
from medim.data.loading.cohort import open_cohort
from medim.data.loading.datasets import ViewDataset
from medim.data.source import open_source
from medim.files import write_json
from medim.models.layers import use_channels_last
from medim.training.pretrain.config import resolve_pretrain_config

WORKERS = (1, 2, 4, 8)


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="mri")
    parser.add_argument("--data", type=Path, help="images; default: built-in cohort")
    parser.add_argument("--images", type=int, default=16, help="number of images to load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("loading.json"))
    arguments = parser.parse_args()
    results = measure_loading(arguments.preset, arguments.data, arguments.images, arguments.rounds)
    for name, value in results.items():
        print(f"{name}: {value}", flush=True)
    write_json(arguments.out, {"schema_version": 1, "threads": torch.get_num_threads(), **results})


def measure_loading(preset: str, data: Path | None, images: int, rounds: int) -> dict[str, Any]:
    """Measure the loading speed of a preset."""
    index, store = open_source(data, read_config("pretrain", preset)["modality"])
    config = resolve_pretrain_config(preset, (), index)
    records = index.records[:images]
    cohort = open_cohort(index, records, config.preprocessing, split_seed=0, store=store)
    views = config.views
    view_options: dict[str, Any] = {"shape": views.shape, "count": views.count, "augmentations": views.augmentations}
    view_options["same_crop"] = views.same_crop
    keys = list(cohort.keys.values())

    def time_load(dataset: ViewDataset, seed: int) -> float:
        return time_processor(lambda: [dataset[position, seed] for position in range(len(keys))]) / len(keys)

    time_load(ViewDataset(cohort.store, keys, **view_options), 0)  # excludes work at the first access
    cold, warm = [], []
    for round_ in range(rounds):
        dataset = ViewDataset(cohort.store, keys, **view_options)
        cold.append(time_load(dataset, round_))
        warm.append(time_load(dataset, round_ + 100))
    run = RunParts.from_config(config)
    for part in (run.encoder, run.decoder):
        if part is not None:
            use_channels_last(part)
    step_seconds = statistics.median([time_processor(run.step) for _ in range(rounds)])
    crop_seconds = {"read": statistics.median(cold), "in memory": statistics.median(warm)}
    return {
        "preset": preset,
        "views": list(views.shape),
        "batch_size": config.batch_size,
        "crops_a_second_a_core": {name: views.count / seconds for name, seconds in crop_seconds.items()},
        "step_seconds_one_thread": step_seconds,
        "share_waiting_without_loading_processes": {
            name: config.batch_size * seconds / (config.batch_size * seconds + step_seconds)
            for name, seconds in crop_seconds.items()
        },
        "loading_limits_below_step_seconds": {
            f"{workers} loading processes": config.batch_size * crop_seconds["read"] / workers for workers in WORKERS
        },
    }


def time_processor(work: Callable[[], object]) -> float:
    """Measure the CPU time of a call in seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
