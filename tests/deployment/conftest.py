from __future__ import annotations

import getpass
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medim.deployment.export import export
from medim.deployment.package import Package
from medim.models.model import build_encoder, build_model
from medim.models.saved import save

PLANTED = "Mustermann_Erika"  # a name in the path of every run and package here
STEPS_3D = [
    {"op": "orthogonalise_affine"},
    {"op": "ras"},
    {"op": "resample", "spacing": [1.0, 1.0, 1.5]},
    {"op": "normalise"},
]
SPECS: dict[str, dict[str, Any]] = {
    "segmenter": {
        "modality": "mri",
        "encoder": {"name": "unet", "channels": [4, 8]},
        "decoder": {"name": "unet"},
        "head": {"name": "segmentation"},
        "out_channels": 3,
        "spatial_dims": 3,
        "input_shape": [16, 24, 16],
        "preprocessing": STEPS_3D,
        "inference": {"mode": "sliding", "roi": [16, 24, 16], "overlap": 0.5},
        "classes": ["anterior", "posterior"],
    },
    "classifier": {
        "modality": "xray",
        "encoder": {"name": "convnet", "channels": [4, 8], "hidden": 16, "summary_channels": 8},
        "decoder": None,
        "head": {"name": "classification"},
        "out_channels": 2,
        "spatial_dims": 2,
        "input_shape": [28, 28],
        "preprocessing": [{"op": "resize", "shape": [28, 28]}, {"op": "normalise"}],
        "inference": {"mode": "whole"},
        "classes": ["normal", "pneumonia"],
    },
    "encoder": {
        "modality": "xray",
        "encoder": {"name": "unet", "channels": [4, 8], "norm": "gn", "summary_channels": 8},
        "spatial_dims": 2,
        "input_shape": [32, 32],
        "preprocessing": [{"op": "normalise"}],
        "inference": {"mode": "whole", "multiple_of": 2},
        "classes": [],
    },
}


def make_run(folder: Path, kind: str, **changes: Any) -> Path:
    """A run as training leaves it, with random weights, norms and biases."""
    torch.manual_seed(0)
    hashes = {"config_hash": "ab" * 6, "index_hash": "cd" * 32, "seed": 0, "medim": "0.1.0", "parent": None}
    spec = {"kind": kind, "in_channels": 1, **SPECS[kind], "provenance": hashes, **changes}
    network: nn.Module = build_encoder(spec) if kind == "encoder" else build_model(spec)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
        if kind == "classifier" and parameter.shape[0] == 2:
            nn.init.normal_(parameter)
    name = "encoder" if kind == "encoder" else "model"
    save(folder / name, name, network, spec)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / PLANTED
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def secrets(place: Path) -> list[bytes]:
    """What must stand in no output."""
    names = [PLANTED, "Mustermann", str(place), str(Path.cwd()), socket.gethostname(), getpass.getuser()]
    return [name.encode() for name in names if name not in ("root", "user", "localhost")]


@pytest.fixture(scope="session")
def runs(place: Path) -> dict[str, Path]:
    return {kind: make_run(place / "runs" / kind, kind) for kind in SPECS}


@pytest.fixture(scope="session")
def packages(place: Path, runs: dict[str, Path]) -> dict[str, Package]:
    return {kind: export(run, place / "packages" / kind) for kind, run in runs.items()}
