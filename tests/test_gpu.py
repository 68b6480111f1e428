"""Runs on a GPU, compared with the CPU: `make test-gpu`. The slow suite runs the same functions on the CPU.

docs/how-to/many-gpus.md lists the fault that each test would find.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from medim.config import list_presets, load_config
from medim.doctor import run_checks
from medim.evaluation.evaluate import evaluate
from medim.evaluation.probing.label_budget import Budget
from medim.evaluation.probing.probe import probe
from medim.objectives import OBJECTIVES
from medim.study.design import read_arms
from medim.study.prepare import StudyOptions
from medim.study.run import study
from medim.training.engine import trainer as training
from tests.device_runs import (
    TASKS,
    Cohort,
    Run,
    finetune_config,
    largest_difference,
    pretrain_config,
    relative_difference,
)

REPOSITORY = Path(__file__).resolve().parents[1]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here (make test-gpu on one that has)")
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])
CPU = pytest.param("cpu", marks=pytest.mark.slow)
AMDIM_3D = {"encoder": {"name": "amdim", "size": 32, "width": 8, "depth": 2, "summary_channels": 64}}
TOLERANCE = {"32-true": 2e-3, "bf16-mixed": 5e-2, "16-mixed": 1e-2}  # of the losses of the first step, to fp32 on a CPU


def choose_presets() -> dict[str, str]:
    """The first small 3D preset of each objective."""
    presets: dict[str, str] = {}
    for name in sorted(list_presets("pretrain")):
        if name.startswith("test-3d"):
            for section in load_config("pretrain", name).objectives:
                presets.setdefault(section["name"], name)
    assert set(presets) == set(OBJECTIVES)
    return presets


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("gpu")).make()


@pytest.fixture(scope="module")
def reference(cohort: Cohort) -> Callable[..., Run]:
    """The same pretraining or fine-tuning on the CPU in fp32, run once."""
    return cache(partial(_run_on_cpu, cohort))


def _run_on_cpu(cohort: Cohort, name: str) -> Run:
    if name in TASKS:
        return cohort.finetune(finetune_config(name, steps=1, precision="32-true"), name, "cpu")
    return cohort.pretrain(pretrain_config(name, steps=1), "cpu")


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Callable[[str, Run, float], None]]:
    """Adds a row of a run to the table that is printed at the end."""
    rows = [("run", "ms a step", "peak MiB", "difference of the first losses")]

    def add(name: str, run: Run, difference: float) -> None:
        rows.append((name, f"{1000 * run.step_seconds:.1f}", f"{run.peak_bytes / 2**20:.0f}", f"{difference:.1e}"))

    yield add
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    capture: Any = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("", *lines, sep="\n")


def check(run: Run, device: str) -> None:
    """The run was on the device, and its numbers are finite."""
    assert run.summary["device"].startswith(device)
    assert all(math.isfinite(loss) for loss in run.first_losses.values())
    assert all(bool(weight.isfinite().all()) for weight in run.weights.values())


def check_pretraining(device: str, name: str, precision: str, fixtures: tuple[Any, ...]) -> None:
    cohort, reference, table = fixtures
    run = cohort.pretrain(pretrain_config(name, steps=5 if device == "cuda" else 2, precision=precision), device)
    check(run, device)
    difference = relative_difference(run.first_losses, reference(name).first_losses)
    table(f"pretrain {name} {precision}", run, difference)
    assert difference < TOLERANCE[precision]


@pytest.fixture
def fixtures(cohort: Cohort, reference: Any, table: Any) -> tuple[Any, ...]:
    return cohort, reference, table


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", sorted(set(choose_presets().values())))
def test_pretraining_of_each_objective(name: str, precision: str, fixtures: tuple[Any, ...]) -> None:
    check_pretraining("cuda", name, precision, fixtures)


@pytest.mark.slow
def test_pretraining_on_the_cpu_as_on_a_gpu(fixtures: tuple[Any, ...]) -> None:
    check_pretraining("cpu", "test-3d-local-global", "32-true", fixtures)


@pytest.mark.parametrize(
    ("device", "precision"),
    [pytest.param("cuda", p, marks=GPU.marks) for p in TOLERANCE] + [pytest.param("cpu", "32-true", marks=CPU.marks)],
)
@pytest.mark.parametrize("task", TASKS)
def test_fine_tuning_and_evaluation_of_each_task(
    device: str, precision: str, task: str, fixtures: tuple[Any, ...], tmp_path: Path
) -> None:
    cohort, reference, table = fixtures
    steps = 5 if device == "cuda" else 2
    run = cohort.finetune(finetune_config(task, steps=steps, precision=precision), task, device)
    check(run, device)
    difference = relative_difference(run.first_losses, reference(task).first_losses)
    table(f"finetune {task} {precision}", run, difference)
    assert difference < TOLERANCE[precision]
    result = evaluate(run.folder, cohort.index(task), tmp_path / "evaluation")
    measured = {name: metric["value"] for name, metric in run.summary["val"]["metrics"].items()}
    again = {name: result["metrics"][name]["value"] for name in measured}
    assert again == pytest.approx(measured, rel=1e-3, abs=1e-3, nan_ok=True), "the saved weights are those measured"


@pytest.mark.parametrize("device", [GPU, CPU])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_repeats_and_resumes_to_the_last_bit(device: str, precision: str, cohort: Cohort, tmp_path: Path) -> None:
    if device == "cpu" and precision != "32-true":
        pytest.skip("3D is fp32 on a CPU")
    config = pretrain_config("test-3d-local-global", steps=4, checkpoint_every_steps=2, precision=precision)
    whole, again = (cohort.pretrain(config, device) for _ in range(2))
    assert largest_difference(whole.weights, again.weights) == 0
    with pytest.raises(InterruptedError):
        cohort.pretrain(config, device, folder=tmp_path / "run", callbacks=(_Interrupt(),))
    resumed = cohort.pretrain(config, device, folder=tmp_path / "run", resume=True)
    assert resumed.summary["resumed_from_steps"] == [2]
    assert largest_difference(whole.weights, resumed.weights) == 0


class _Interrupt(pl.Callback):
    """Ends the run after the third step; the checkpoint of the second is there."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise InterruptedError


@pytest.mark.parametrize("device", [GPU, CPU])
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_cache_chunk": 2},
        {"workers": 1},
        {"compile": True},
        {"channels_first": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_option_of_speed_or_memory_keeps_the_losses(
    device: str, changes: dict[str, Any], cohort: Cohort, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`channels_first` turns off the layout that every run uses."""
    if device == "cpu" and "workers" in changes:
        pytest.skip("the tests of pretraining load images in other processes")
    base = {"encoder": {**load_config("pretrain", "test-3d-local-dim").encoder, "norm": "in"}}
    plain = cohort.pretrain(pretrain_config("test-3d-local-dim", **base), device)
    if "channels_first" in changes:
        monkeypatch.setattr(training, "use_channels_last", lambda module: None)
        changes = {}
    if "compile" in changes and device == "cpu":
        monkeypatch.setattr(
            torch, "compile", partial(torch.compile, backend="eager")
        )  # the generated code takes a minute
    run = cohort.pretrain(pretrain_config("test-3d-local-dim", **base, **changes), device)
    check(run, device)
    difference = relative_difference(run.first_losses, plain.first_losses)
    table(f"pretrain with {', '.join(changes) or 'channels first'}", run, difference)
    assert difference < 1e-3


@pytest.mark.parametrize("device", [GPU, CPU])
def test_the_encoder_of_amdim_trains_in_3d(device: str, cohort: Cohort, table: Any) -> None:
    views = load_config("pretrain", "test-3d-amdim").views.model_copy(update={"shape": (32, 32, 32)})
    config = pretrain_config("test-3d-amdim", steps=2, views=views, **AMDIM_3D)
    run = cohort.pretrain(config, device)
    check(run, device)
    table("pretrain AMDIM's encoder in 3D", run, 0.0)


@pytest.mark.parametrize("device", [GPU, CPU])
def test_the_cells_of_a_study_and_its_probe_run(device: str, cohort: Cohort, tmp_path: Path) -> None:
    encoder = cohort.pretrain(pretrain_config("mri-demo", steps=2), device).folder
    config = finetune_config("classification", steps=2, encoder=load_config("pretrain", "mri-demo").encoder)
    options = StudyOptions(accelerator=device, store=cohort.store, lr_multipliers=())
    index = cohort.index("classification")
    arms = read_arms([f"tuned={encoder}"], [f"frozen={encoder}"])
    summary = study("classification", config, index, arms, [Budget(labelled=4)], tmp_path / "study", options)
    assert summary["comparisons"]
    cells = [json.loads(path.read_text()) for path in (tmp_path / "study" / "cells").rglob("summary.json")]
    assert cells
    assert all(cell["device"].startswith(device) for cell in cells if cell.get("command") == "finetune")
    rows = probe(encoder, index, tmp_path / "probe")
    assert rows


@pytest.mark.parametrize("device", [GPU])
def test_the_plan_of_a_run_and_the_devices_are_reported(device: str, cohort: Cohort, tmp_path: Path) -> None:
    command = [
        "plan",
        "--modality",
        "mri",
        "--data",
        str(cohort.images),
        "--config",
        "mri-demo",
        "--device",
        device,
    ]
    _run_medim(*command, "--set", "batch_size=4", "--json", str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text())
    assert list(run_checks())


def _run_medim(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(
        [sys.executable, "-m", "medim.cli", *arguments], cwd=REPOSITORY, env=environment, check=True, timeout=600
    )


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize("norm", ["in", "bn"])
def test_two_gpus_learn_what_one_learns(norm: str, cohort: Cohort, tmp_path: Path) -> None:
    encoder = (
        f"encoder={{name: convnet, channels: [8, 16], kernel_size: 3, hidden: 0, summary: mean_max, norm: {norm}}}"
    )
    short = ["max_steps=10", "batch_size=8", "checkpoint_every_steps=10", "lr=1.0e-4", encoder]
    command = ["pretrain", "--modality", "mri", "--data", str(cohort.images), "--config", "test-3d-local-dim"]
    command += ["--device", "cuda", *(word for setting in short for word in ("--set", setting))]
    weights = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        _run_medim(*command, "--devices", devices, "--out", str(out))
        assert json.loads((out / "summary.json").read_text())["processes"] == int(devices)
        weights.append(load_file(out / "encoder" / "encoder.safetensors"))
    assert largest_difference(*weights) < 1e-3


@pytest.mark.gpu
@NO_GPU
def test_the_demonstration_runs_on_the_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "pipelines/smoke.py", "--accelerator", "cuda", "--out", str(tmp_path / "demo")]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=600)
