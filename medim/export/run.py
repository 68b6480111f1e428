"""A finished run as `medim export` needs it: its networks, what goes into them and what comes out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medim.data.contamination import TrainingHistory, load_training_history
from medim.export import onnx
from medim.files import read_json
from medim.inference.network import PredictFn
from medim.inference.ood import OOD_FILE
from medim.models.model import as_numpy_function
from medim.models.ood_features import WithOODFeatures
from medim.models.serialization import load_encoder, load_model, locate_weights
from medim.objectives.score_map import load_score_map
from medim.package.contract import GOLDEN, GRAPH, SCORE_MAP, SCORE_MAP_GOLDEN, Signature
from medim.tasks import ENCODER
from medim.types import UserError


@dataclass(frozen=True)
class ExportGraph:
    """A network that becomes a file of the package, with its golden input."""

    name: str  # how its gates begin
    file: str
    golden: str
    network: Any  # image -> (logits, watched), (summary, *maps, watched), or scores
    signature: Signature

    @property
    def run(self) -> PredictFn:
        """The network under torch."""
        return as_numpy_function(self.module)

    @property
    def float64(self) -> PredictFn:
        """The network under torch in float64."""
        return as_numpy_function(_Float64Network(copy.deepcopy(self.module).double()))

    @property
    def module(self) -> nn.Module:
        """The module whose weights the run saved."""
        return self.network.source if isinstance(self.network, WithOODFeatures) else self.network


@dataclass(frozen=True)
class FinishedRun:
    """A run, ready to be exported."""

    folder: Path
    graphs: tuple[ExportGraph, ...]  # the answer's first, then the score map's where there is one
    spec: dict[str, Any]
    weights: Path
    sizes: onnx.InputSizes
    summary: dict[str, Any]  # what the run says of itself; empty where it says nothing
    training_history: TrainingHistory | None  # None where nothing says
    ood_statistics: bytes | None  # statistics for the out-of-distribution guard; None where training wrote none

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; an encoder has none."""
        return () if self.spec["kind"] == ENCODER else tuple(self.spec["classes"])


class _Float64Network(nn.Module):
    """A float64 network behind a float32 input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> Any:
        return self.network(image.double())


def load_finished_run(folder: Path) -> FinishedRun:
    """Load a run's networks and find out which sizes they take.

    Raises:
        UserError: the run is not finished, its weights are not those it recorded, or its statistics are of an earlier
            version of medim.
    """
    weights, spec = locate_weights(folder)
    if spec["kind"] == ENCODER:
        encoder: Any = load_encoder(folder)
        module, score_map = encoder, load_score_map(folder)
    else:
        module = load_model(folder)[0]
        encoder, score_map = module.encoder, None
    network = WithOODFeatures(module).eval()
    strides, channels = tuple(encoder.strides), spec["in_channels"]
    sizes = onnx.probe_input_sizes(network, tuple(spec["input_shape"]), strides, channels)
    signature = onnx.build_signature(network, sizes, channels, strides)
    graphs = [ExportGraph("", GRAPH, GOLDEN, network, signature)]
    if score_map is not None:
        signature = onnx.build_score_signature(signature)
        graphs.append(ExportGraph("score map: ", SCORE_MAP, SCORE_MAP_GOLDEN, score_map, signature))
    summary_file = folder / "summary.json"
    run_summary = read_json(summary_file) if summary_file.is_file() else {}
    return FinishedRun(
        folder,
        tuple(graphs),
        spec,
        weights,
        sizes,
        run_summary,
        load_training_history(folder),
        _read_ood_statistics(weights),
    )


def _read_ood_statistics(weights: Path) -> bytes | None:
    file, old_file = weights.with_name(OOD_FILE), weights.with_name("reference.npz")
    if old_file.is_file() and not file.is_file():
        raise UserError(
            f"{old_file}: made by an earlier version of medim. Train the run again, or delete the file to export "
            "without an out-of-distribution score."
        )
    return file.read_bytes() if file.is_file() else None
