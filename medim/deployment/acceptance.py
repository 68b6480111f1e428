"""The gates of a package, in order: which of them run, and on what. Each one's measure stands in `gates`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from medim.data.preprocessing import STEPS
from medim.deployment import gates, onnx
from medim.deployment.card import UNKNOWN
from medim.deployment.contract import RESEARCH_ONLY, Contract
from medim.deployment.draft import Draft, Exported
from medim.deployment.finished_run import FinishedRun, Graph
from medim.deployment.inference import INFERENCES
from medim.deployment.privacy import machine_words
from medim.models.critics import CRITICS
from medim.models.decoders import DECODERS
from medim.models.encoders import ENCODERS
from medim.models.heads import HEADS
from medim.models.model import build_encoder, build_model
from medim.models.saved import load_weights
from medim.models.watched import Watched, as_watched_run
from medim.objectives import OBJECTIVES
from medim.types import Array

SCAN = "no path, user or host name in any file"


def of_networks(draft: Draft) -> dict[str, gates.Gate]:
    """Gates that need the networks: are the graphs what torch computes?"""
    results = _weights(draft.run)
    for made in draft.graphs.values():
        results |= {made.graph.name + name: gate for name, gate in _graph(made, draft).items()}
    return results


def of_folder(folder: Path, draft: Draft, places: Sequence[Path]) -> dict[str, gates.Gate]:
    """Gates that need the whole package as it lies in a folder.

    Args:
        folder: the package.
        draft: what it was made from.
        places: folders whose names must not stand in it.
    """
    words = machine_words([*places, folder])
    return {SCAN: gates.privacy(folder, words, _vocabulary(draft.run.graphs), {".onnx": onnx.structure})}


def as_they_must_turn_out() -> dict[str, gates.Gate]:
    """The lines of `of_folder` in report and card, which it reads too and which must therefore be there before."""
    return {SCAN: gates.gate(0, 0)}


def _weights(run: FinishedRun) -> dict[str, gates.Gate]:
    training = sum(module.training for graph in run.graphs for module in graph.network.modules())
    packed = build_encoder(run.spec) if run.spec["kind"] == "encoder" else build_model(run.spec)
    load_weights(packed, run.weights)
    return {
        "network in evaluation mode": gates.gate(training, 0),
        "weights are those of the run": gates.weights(_arrays(packed), _arrays(run.graphs[0].source)),
    }


def _graph(made: Exported, draft: Draft) -> dict[str, gates.Gate]:
    channels, sizes = draft.contract.in_channels, draft.run.sizes
    first = sizes.shape
    outside = [(1, channels + 1, *first), (1, channels, *first, 1)]
    if sizes.fixed or sizes.multiple_of > 1:
        outside.append((1, channels, first[0] + 1, *first[1:]))
    results = {
        "ONNX Runtime against torch, unseen sizes": gates.random_inputs(
            made.ort, made.graph.run, channels, sizes.unseen()
        ),
        "ONNX Runtime against float64 torch, little contrast": gates.little_contrast(
            made.ort, made.graph.exact, channels, sizes.unseen()[0]
        ),
        "sizes outside the contract are refused": gates.refusals(made.ort, outside),
        "phantom, from image to answer": gates.phantom_answer(made.golden, made.ort, draft.contract),
    }
    if isinstance(made.graph.network, Watched):
        torch, ort = as_watched_run(made.graph.source), made.ort
        results["what the guard watches, ONNX Runtime against torch"] = gates.random_inputs(
            lambda image: ort.both(image)[1], lambda image: torch(image)[1], channels, sizes.unseen()
        )
    return results


def _arrays(network: nn.Module) -> dict[str, Array]:
    return {key: value.numpy() for key, value in network.state_dict().items()}


def _vocabulary(graphs: Sequence[Graph]) -> str:
    """Words of every package, whoever made it: somebody whose account is called "image" is not found by them."""
    words: list[Any] = [Contract.model_json_schema(), UNKNOWN, RESEARCH_ONLY, *STEPS, *INFERENCES]
    words += [*ENCODERS, *DECODERS, *HEADS, *OBJECTIVES, *CRITICS]
    return " ".join(map(str, [*words, *(key for graph in graphs for key in graph.network.state_dict())]))
