"""What follows the training runs on its device, from which Lightning takes the network: here `meta`, for a GPU."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

import medim.training
from medim.config import FinetuneConfig, PretrainConfig
from medim.data.index.index import Index
from medim.training.engine import launch
from medim.training.finetune import run as finetuning
from medim.training.plan import trial_run
from medim.training.pretrain import run as pretraining

GPU = torch.device("meta")


class Devices:
    """Devices on which the network was met, by the name of the function."""

    def __init__(self) -> None:
        self.found: dict[str, torch.device] = {}

    def spy(self, name: str, result: Any = None) -> Callable[..., Any]:
        def note(*args: Any, **_: Any) -> Any:
            network = next(arg for arg in args if isinstance(arg, nn.Module))
            self.found[name] = next(network.parameters()).device
            return result

        return note


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    """Trainers of a device without memory, which leave the module on the CPU, as those of Lightning do."""

    def fit(trainer: pl.Trainer, module: Any, *_: Any, **__: Any) -> None:
        module.trainer = trainer
        getattr(module, "rows", []).append((1, "loss", 0.5, None, None))
        module.to_empty(device="cpu")

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", property(lambda _: GPU, lambda *_: None))
    return Devices()


def test_fine_tuning_measures_on_the_device_of_the_training(
    finetune_config: FinetuneConfig,
    cohort_index: Index,
    devices: Devices,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("start_head_as_probe", "save_model", "save_ood_detector"):
        monkeypatch.setattr(finetuning, name, devices.spy(name))
    monkeypatch.setattr(finetuning, "as_numpy_function", devices.spy("validation"))
    monkeypatch.setattr(finetuning, "validate_network", lambda *_, **__: (None, []))
    monkeypatch.setattr(
        finetuning, "find_lost_classes", lambda *arguments: devices.spy("lost classes")(*arguments) or {}
    )
    config = finetune_config.model_copy(update={"head_init": "probe"})
    summary = finetuning.finetune(config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    names = ("start_head_as_probe", "save_model", "save_ood_detector", "validation", "lost classes")
    assert devices.found == dict.fromkeys(names, GPU)
    assert summary["device"] == "meta"


def test_pretraining_fits_the_detector_on_the_device_of_the_training(
    pretrain_config: PretrainConfig,
    cohort_index: Index,
    devices: Devices,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def validate(trainer: pl.Trainer, module: Any, *_: Any, **__: Any) -> None:
        module.to_empty(device="cpu")

    monkeypatch.setattr(pl.Trainer, "validate", validate)
    monkeypatch.setattr(pretraining, "_restore_selection", lambda *_: {"step": 0})
    monkeypatch.setattr(pretraining, "_summarise_run", lambda *_: {"checkpoint_selection": {"step": 0}})
    monkeypatch.setattr(pretraining, "check_finite_weights", lambda *_: None)
    for name in ("write_encoder", "save_ood_detector"):
        monkeypatch.setattr(pretraining, name, devices.spy(name))
    for name in ("draw_training_figures", "log_results", "log_encoder"):
        monkeypatch.setattr(pretraining, name, lambda *_, **__: [])
    pretraining.pretrain(pretrain_config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert devices.found == dict.fromkeys(("write_encoder", "save_ood_detector"), GPU)


def test_the_estimate_of_a_run_times_the_detector_on_the_device_of_the_training(
    devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = nn.Linear(1, 1)
    encoder.spec = None  # type: ignore[assignment]
    monkeypatch.setattr(trial_run, "load_encoder", lambda _: encoder)
    monkeypatch.setattr(trial_run, "iterate_record_features", devices.spy("features", result=[0]))
    (tmp_path / trial_run.OOD_FILE).touch()
    cohort: Any = type("Images", (), {"records": lambda self, split: [0]})()
    monkeypatch.setattr(trial_run, "count_reference_images", lambda *_: 1)
    trial_run._time_reference(cohort, tmp_path, GPU)
    assert devices.found == {"features": GPU}


def test_the_device_of_a_run_is_that_of_its_trainer(devices: Devices) -> None:
    assert launch.find_device("cpu") == GPU


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_matrix_products_are_deterministic_before_the_first_trainer(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch reads the variable at the first product on a GPU, and then rejects every product of the training."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    importlib.reload(medim.training)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (given or ":4096:8")
