"""A finished run as `medim export` needs it: its networks, what goes into them and what comes out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medim.data.contamination import Seen, read_seen
from medim.export import onnx
from medim.files import read_json
from medim.inference.network import Run
from medim.inference.ood import REFERENCE
from medim.models.model import as_run
from medim.models.ood_features import Watched
from medim.models.serialization import find, load_encoder, load_model
from medim.objectives.score_map import load_score_map
from medim.package.contract import GOLDEN, GRAPH, SCORE_MAP, SCORE_MAP_GOLDEN, Signature


@dataclass(frozen=True)
class Graph:
    """A network that becomes a file of the package, with its golden input."""

    name: str  # how its gates begin
    file: str
    golden: str
    network: Any  # image -> (logits, watched), (summary, *maps, watched), or scores
    signature: Signature

    @property
    def run(self) -> Run:
        """The network under torch."""
        return as_run(self.source)

    @property
    def exact(self) -> Run:
        """The network under torch in float64."""
        return as_run(_Double(copy.deepcopy(self.source).double()))

    @property
    def source(self) -> nn.Module:
        """The module whose weights the run saved."""
        return self.network.source if isinstance(self.network, Watched) else self.network


@dataclass(frozen=True)
class FinishedRun:
    """A run, ready to be exported."""

    folder: Path
    graphs: tuple[Graph, ...]  # the answer's first, then the score map's where there is one
    spec: dict[str, Any]
    weights: Path
    sizes: onnx.Sizes
    summary: dict[str, Any]  # what the run says of itself; empty where it says nothing
    seen: Seen | None  # None where nothing says
    reference: bytes | None  # statistics for the out-of-distribution guard; None where training wrote none

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; an encoder has none."""
        return () if self.spec["kind"] == "encoder" else tuple(self.spec["classes"])


class _Double(nn.Module):
    """A float64 network behind a float32 input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> Any:
        return self.network(image.double())


def load_run(folder: Path) -> FinishedRun:
    """Load a run's networks and find out which sizes they take.

    Raises:
        UserError: the run is not finished, or its weights are not those it recorded.
    """
    weights, spec = find(folder)
    if spec["kind"] == "encoder":
        encoder: Any = load_encoder(folder)
        source, score_map = encoder, load_score_map(folder)
    else:
        source = load_model(folder)[0]
        encoder, score_map = source.encoder, None
    network = Watched(source).eval()
    strides, channels = tuple(encoder.strides), spec["in_channels"]
    sizes = onnx.sizes_of(network, tuple(spec["input_shape"]), strides, channels)
    signature = onnx.signature_of(network, sizes, channels, strides)
    graphs = [Graph("", GRAPH, GOLDEN, network, signature)]
    if score_map is not None:
        signature = onnx.score_signature(signature)
        graphs.append(Graph("score map: ", SCORE_MAP, SCORE_MAP_GOLDEN, score_map, signature))
    summary = folder / "summary.json"
    told = read_json(summary) if summary.is_file() else {}
    return FinishedRun(folder, tuple(graphs), spec, weights, sizes, told, read_seen(folder), _reference(weights))


def _reference(weights: Path) -> bytes | None:
    file = weights.with_name(REFERENCE)
    return file.read_bytes() if file.is_file() else None
