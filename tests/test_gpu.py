"""What needs a GPU: `make test-gpu`. Written without one, and not run until somebody has."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medim.config import list_presets, load_config
from medim.data.example.cohort import make_example
from medim.data.index.index import Index, build_index
from medim.training.pretrain.run import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here (make test-gpu on one that has)"),
]
REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = [name for name in list_presets("pretrain") if name.startswith("test-3d")]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make_example(folder, subjects=16, formats=("nifti",))
    return folder / "nifti"


@pytest.fixture(scope="module")
def index(cohort: Path) -> Index:
    return build_index(cohort, "mri")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", SMALL)
def test_a_small_preset_trains_on_the_gpu(name: str, precision: str, index: Index, tmp_path: Path) -> None:
    short = {"max_steps": 5, "batch_size": 8, "checkpoint_every_steps": 5, "precision": precision}
    config = load_config("pretrain", name).model_copy(update=short)
    summary = pretrain(config, index, tmp_path / "run", accelerator="cuda", store=tmp_path / "store")  # type: ignore[arg-type]
    assert summary["device"].startswith("cuda")
    assert all(math.isfinite(loss["last"]) for loss in summary["loss"].values())


def test_the_gpu_learns_what_the_cpu_learns(index: Index, tmp_path: Path) -> None:
    config = load_config("pretrain", "test-3d-local-dim")
    short = {"max_steps": 5, "batch_size": 8, "checkpoint_every_steps": 5, "lr": 1e-4}
    losses = []
    for kind in ("cpu", "cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        run = config.model_copy(update=short)
        summary = pretrain(run, index, tmp_path / kind, accelerator=kind, store=tmp_path / "store")  # type: ignore[arg-type]
        losses.append(summary["loss"]["local_dim"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
@pytest.mark.parametrize("norm", ["in", "bn"])
def test_two_gpus_learn_what_one_learns(norm: str, cohort: Path, tmp_path: Path) -> None:
    encoder = (
        f"encoder={{name: convnet, channels: [8, 16], kernel_size: 3, hidden: 0, summary: mean_max, norm: {norm}}}"
    )
    short = ["max_steps=10", "batch_size=8", "checkpoint_every_steps=10", "lr=1.0e-4", encoder]
    command = [sys.executable, "-m", "medim.cli", "pretrain", "--modality", "mri", "--data", str(cohort)]
    command += ["--config", "test-3d-local-dim", "--accelerator", "cuda", *(w for s in short for w in ("--set", s))]
    found = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        subprocess.run([*command, "--devices", devices, "--out", str(out)], cwd=REPOSITORY, check=True, timeout=1800)
        assert json.loads((out / "summary.json").read_text())["processes"] == int(devices)
        found.append(load_file(out / "encoder" / "encoder.safetensors"))
    assert max(float((found[0][key].double() - found[1][key].double()).abs().max()) for key in found[0]) < 1e-3


def test_the_demonstration_runs_on_the_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "pipelines/smoke.py", "--accelerator", "cuda", "--out", str(tmp_path / "demo")]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=3600)
