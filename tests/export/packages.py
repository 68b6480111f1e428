"""Runs as training leaves them, tiny and with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from medim.config import build_from_section
from medim.models.model import build_encoder, build_model
from medim.models.serialization import save_model
from medim.objectives import OBJECTIVES
from medim.objectives.objective import encoder_info
from tests.specs import make_spec

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
        "inference": {"mode": "whole"},
        "classes": [],
    },
}

CRITIC = {"name": "encode_and_dot", "width": 16, "summary_norm": "none"}
OBJECTIVE = {"name": "local_dim", "batch_norm_summary": True, "critic": CRITIC}


def make_run(folder: Path, kind: str, **changes: Any) -> Path:
    """A run as training leaves it, with random weights, norms and biases."""
    torch.manual_seed(0)
    hashes = {"config_hash": "ab" * 6, "index_hash": "cd" * 32, "seed": 0, "medim": "0.1.0", "parent": None}
    spec = {"kind": kind, "in_channels": 1, **SPECS[kind], "provenance": hashes, **changes}
    network: nn.Module = build_encoder(make_spec(spec)) if kind == "encoder" else build_model(make_spec(spec))
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
        if kind == "classifier" and parameter.shape[0] == 2:
            nn.init.normal_(parameter)
    name = "encoder" if kind == "encoder" else "model"
    save_model(folder / name, name, network, make_spec(spec))
    return folder


def make_run_with_critic(folder: Path, **changes: Any) -> Path:
    """An encoder's run that kept the local critic it was trained with."""
    make_run(folder, "encoder", **changes)
    spec = {"in_channels": 1, **SPECS["encoder"], **changes}
    shapes: dict[str, Any] = {"spatial_dims": spec["spatial_dims"], "input_shape": tuple(spec["input_shape"])}
    objective = build_from_section(
        OBJECTIVES, OBJECTIVE, **encoder_info(build_encoder(make_spec(spec)), None, in_channels=1, **shapes)
    )
    objective.train()._standardise(torch.randn(64, 8) + 1)  # type: ignore[operator]  # statistics that are not 0 and 1
    save_model(folder / "encoder", "critic", objective, {"kind": "critic", "objective": OBJECTIVE})
    return folder
