"""Short real runs on a device, with the figures of the table that `make test-gpu` prints."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import nibabel
import numpy as np
import torch
from safetensors.torch import load_file

import medim.training.finetune.run as finetuning
import medim.training.pretrain.run as pretraining
from medim.config import FinetuneConfig, PretrainConfig, load_config
from medim.data.index.index import Index, build_index
from medim.training.finetune.config import resolve_finetune_config
from medim.training.finetune.run import finetune
from medim.training.pretrain.run import pretrain

BATCH, SUBJECTS, SHAPE, SPACING = 6, 60, (24, 24, 24), 4.0
TASKS = ("segmentation", "classification", "findings", "regression")


@dataclass
class Run:
    """A run and its figures.

    Attributes:
        folder: folder of the run.
        summary: content of `summary.json`.
        step_seconds: median of the seconds of a step without the first.
        peak_bytes: peak memory of the device during the steps; 0 on a CPU.
    """

    folder: Path
    summary: dict[str, Any]
    step_seconds: float
    peak_bytes: int

    @property
    def first_losses(self) -> dict[str, float]:
        """Losses of the first step by name; of a fine-tuning run `loss`."""
        rows = list(csv.DictReader((self.folder / "history.csv").open()))
        return {
            row["name"]: float(row["loss"])
            for row in rows
            if row["step"] == "1" and row["loss"] and "/" not in row["name"]
        }

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Weights of the encoder or model."""
        (path,) = [*self.folder.glob("encoder/encoder.safetensors"), *self.folder.glob("model/model.safetensors")]
        return load_file(path)


class StepClock(pl.Callback):
    """Times of the steps, and peak memory of the device."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peak_bytes = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Reset the peak memory."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Record the time, after the device has finished."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated()
        self.times.append(time.perf_counter())

    @property
    def step_seconds(self) -> float:
        """Median of the seconds between two steps."""
        return (
            median(after - before for before, after in zip(self.times, self.times[1:], strict=False))
            if self.times[1:]
            else 0.0
        )


@contextmanager
def clocked() -> Iterator[StepClock]:
    """Add a clock to every trainer."""
    clock = StepClock()

    def make(make_trainer: Any, *args: Any, callbacks: Sequence[Any], **options: Any) -> Any:
        return make_trainer(*args, callbacks=[*callbacks, clock], **options)

    with (
        patch.object(pretraining, "make_trainer", partial(make, pretraining.make_trainer)),
        patch.object(finetuning, "make_trainer", partial(make, finetuning.make_trainer)),
    ):
        yield clock


@dataclass
class Cohort:
    """Noisy volumes of subjects, each with a bright ball, its mask and the labels of each task, and a folder for runs.

    Attributes:
        folder: folder of the cohort and of its runs.
    """

    folder: Path
    _count: int = field(default=0)

    def make(self) -> Cohort:
        """Write the images, and the labels of the tasks."""
        rng = np.random.default_rng(0)
        grid = np.stack(np.meshgrid(*(np.arange(side) for side in SHAPE), indexing="ij"))
        names, radii = [f"case_{n:02d}.nii.gz" for n in range(SUBJECTS)], [3 + n % 4 for n in range(SUBJECTS)]
        for name, radius in zip(names, radii, strict=True):
            centre = 12 + rng.integers(-3, 4, 3)
            ball = np.linalg.norm(grid - centre[:, None, None, None], axis=0) < radius
            image = (rng.normal(100, 10, SHAPE) + 80 * ball).astype(np.float32)
            for part, array in (("imagesTr", image), ("labelsTr", ball.astype(np.uint8))):
                (self.images / part).mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(array, np.diag([SPACING] * 3 + [1])), self.images / part / name)
        pairs = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
        content = {"labels": {"0": "background", "1": "ball"}, "modality": {"0": "MRI"}, "training": pairs}
        (self.images / "dataset.json").write_text(json.dumps(content))
        columns = {
            "classification": ["label", *("large" if radius > 4 else "small" for radius in radii)],
            "regression": ["label", *(f"{radius:.1f}" for radius in radii)],
            "findings": ["large,odd", *(f"{radius > 4:d},{'' if radius == 3 else radius % 2}" for radius in radii)],
        }
        for task, (header, *values) in columns.items():
            lines = [f"image,{header}", *(f"{name},{value}" for name, value in zip(names, values, strict=True))]
            (self.folder / f"{task}.csv").write_text("\n".join(lines) + "\n")
        return self

    @property
    def images(self) -> Path:
        """Folder of the images."""
        return self.folder / "images"

    def index(self, task: str = "segmentation") -> Index:
        """Index of the images, with the labels of a task."""
        labels = None if task == "segmentation" else self.folder / f"{task}.csv"
        return build_index(self.images, "mri", labels=labels)

    def new_folder(self) -> Path:
        """A folder for a run that does not exist yet."""
        self._count += 1
        return self.folder / f"run-{self._count}"

    @property
    def store(self) -> Path:
        """Folder of preprocessed images."""
        return self.folder / "store"

    def pretrain(self, config: PretrainConfig, device: str, **options: Any) -> Run:
        """Pretrain; options are those of `medim.training.pretrain.run.pretrain`."""
        folder = options.pop("folder", None) or self.new_folder()
        with clocked() as clock:
            summary = pretrain(config, self.index(), folder, accelerator=device, store=self.store, **options)
        return Run(folder, summary, clock.step_seconds, clock.peak_bytes)

    def finetune(self, config: FinetuneConfig, task: str, device: str, **options: Any) -> Run:
        """Fine-tune; options are those of `medim.training.finetune.run.finetune`."""
        folder = options.pop("folder", None) or self.new_folder()
        with clocked() as clock:
            summary: Any = finetune(config, self.index(task), folder, accelerator=device, store=self.store, **options)
        return Run(folder, summary, clock.step_seconds, clock.peak_bytes)


def pretrain_config(name: str, steps: int = 3, **changes: Any) -> PretrainConfig:
    """A preset with few steps of few images of the cohort."""
    short = {"max_steps": steps, "batch_size": BATCH, "checkpoint_every_steps": steps, "warmup_steps": 0, "lr": 1e-3}
    preprocessing = load_config("pretrain", "mri-demo").preprocessing
    return load_config("pretrain", name).model_copy(
        update={"preprocessing": preprocessing, "precision": "32-true", **short, **changes}
    )


def finetune_config(task: str, steps: int = 3, **changes: Any) -> FinetuneConfig:
    """The preset of a task, with few steps of few images of the cohort."""
    option = "classification" if task == "findings" else task
    preset = "mri-demo-segmentation" if task == "segmentation" else f"mri-{option}"
    short = {"max_steps": steps, "batch_size": 4, "checkpoint_every_steps": steps, "warmup_steps": 0, "lr": 1e-3}
    encoder = {"name": "unet", "channels": [8, 16, 32], "norm": "in", "summary_channels": 16}
    views = ["views.shape=[24, 24, 24]"]
    config = resolve_finetune_config(option, "mri", None, preset, views)
    preprocessing = load_config("pretrain", "mri-demo").preprocessing
    inference = {"mode": "whole", "multiple_of": 8}
    return config.model_copy(
        update={"encoder": encoder, "preprocessing": preprocessing, "inference": inference, **short, **changes}
    )


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def relative_difference(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest difference of losses, relative to each, or to 1 where it is smaller."""
    assert one.keys() == other.keys()
    assert one
    return max(abs(one[name] - value) / max(1.0, abs(value)) for name, value in other.items())
