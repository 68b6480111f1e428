"""Load a finished run for `medim export`: networks with their signatures, weights and statistics."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import TypedDict  # pydantic needs this form before Python 3.12

from medim.data.contamination import TrainingHistory, load_training_history
from medim.export import onnx
from medim.inference.ood import OOD_FILE
from medim.migrations import read_checked_json
from medim.model_spec import ModelSpec
from medim.models.model import as_numpy_function
from medim.models.ood_features import WithOODFeatures
from medim.models.serialization import load_encoder, load_model, locate_weights
from medim.objectives.score_map import load_score_map
from medim.output_folder import SUMMARY_FILE, read_record
from medim.package.contract import GOLDEN, GRAPH, SCORE_MAP, SCORE_MAP_GOLDEN, Signature
from medim.types import PredictFn, UserError


@dataclass(frozen=True, kw_only=True)
class ExportGraph:
    """Network to be exported as a graph of the package."""

    name: str  # prefix of the names of its gates
    file: str  # ONNX file in the package
    golden: str  # file of the golden input in the package
    network: Any  # image -> (logits, OOD features), (summary, *maps, OOD features), or scores
    signature: Signature

    @property
    def run(self) -> PredictFn:
        """Network in torch as a function of an array."""
        return as_numpy_function(self.module)

    @property
    def float64(self) -> PredictFn:
        """Network in torch with float64 weights as a function of an array."""
        return as_numpy_function(_Float64Network(copy.deepcopy(self.module).double()))

    @property
    def module(self) -> nn.Module:
        """Module with the weights of the run, without the output of OOD features."""
        return self.network.source if isinstance(self.network, WithOODFeatures) else self.network


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """Content of a finished run for the export."""

    folder: Path
    graphs: tuple[ExportGraph, ...]  # prediction graph, then the graph of the score map if there is one
    spec: ModelSpec
    weights: Path
    sizes: onnx.InputSizes
    summary: Mapping[str, Any]  # content of summary.json; empty if the run has none
    training_history: TrainingHistory | None  # None if the run has no fingerprints
    ood_statistics: bytes | None  # statistics of the out-of-distribution detector; None if the run has none

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; empty for an encoder."""
        return () if self.spec.is_encoder else self.spec.classes


class _Float64Network(nn.Module):
    """Float64 network with a float32 input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> Any:
        return self.network(image.double())


def load_finished_run(folder: Path) -> FinishedRun:
    """Load the networks of a run and determine their input sizes.

    Raises:
        UserError: the run is not finished, its weights differ from the recorded sha256, or its statistics were written
            by an earlier version of medim.
    """
    weights, spec = locate_weights(folder)
    _check_end(folder)
    if spec.is_encoder:
        encoder: Any = load_encoder(folder)
        module, score_map = encoder, load_score_map(folder)
    else:
        module = load_model(folder)[0]
        encoder, score_map = module.encoder, None
    network = WithOODFeatures(module).eval()
    strides, channels = tuple(encoder.strides), spec.in_channels
    sizes = onnx.probe_input_sizes(network, spec.input_shape, strides, channels)
    signature = onnx.build_signature(network, sizes, channels, strides)
    graphs = [ExportGraph(name="", file=GRAPH, golden=GOLDEN, network=network, signature=signature)]
    if score_map is not None:
        signature = onnx.build_score_signature(signature)
        graphs.append(
            ExportGraph(
                name="score map: ", file=SCORE_MAP, golden=SCORE_MAP_GOLDEN, network=score_map, signature=signature
            )
        )
    summary_file = folder / SUMMARY_FILE
    run_summary = _read_run_summary(summary_file) if summary_file.is_file() else {}
    return FinishedRun(
        folder=folder,
        graphs=tuple(graphs),
        spec=spec,
        weights=weights,
        sizes=sizes,
        summary=run_summary,
        training_history=load_training_history(folder),
        ood_statistics=_read_ood_statistics(weights),
    )


def _check_end(folder: Path) -> None:
    """Reject a run that was stopped after its weights were written, and before its summary was.

    Raises:
        UserError: the run is not complete.
    """
    record = read_record(folder)
    if record is not None and record.state != "complete" and not (folder / SUMMARY_FILE).is_file():
        raise UserError(f"{folder}: this run was stopped before its end. Run the same command with --resume first.")


class _RunSummary(TypedDict, total=False):
    command: str
    init: str | None
    n_labelled: int | None
    objectives: dict[str, float] | None
    steps: int | None
    val: Mapping[str, Any] | None


def _read_run_summary(file: Path) -> Mapping[str, Any]:
    return read_checked_json(file, "run", _RunSummary)


def _read_ood_statistics(weights: Path) -> bytes | None:
    file, old_file = weights.with_name(OOD_FILE), weights.with_name("reference.npz")
    if old_file.is_file() and not file.is_file():
        raise UserError(
            f"{old_file}: made by an earlier version of medim. Train the run again and export it, or delete the file "
            "and export without an out-of-distribution score."
        )
    return file.read_bytes() if file.is_file() else None
