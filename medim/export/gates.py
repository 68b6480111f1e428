"""The gates of a package, in order: which of them run, and on what. Each one's measure stands in `gates`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from medim.data.preprocessing.steps import STEPS
from medim.export import checks, onnx
from medim.export.builder import Draft, Exported
from medim.export.monai_native import preprocessing
from medim.export.offline import failure, without_network
from medim.export.orientation import misplaced
from medim.export.privacy_scan import machine_words
from medim.export.run import FinishedRun
from medim.export.sbom import lock, sbom
from medim.files import sha256
from medim.inference.network import INFERENCES
from medim.models.critics import CRITICS
from medim.models.decoders import DECODERS
from medim.models.encoders import ENCODERS
from medim.models.heads import HEADS
from medim.models.model import build_encoder, build_model
from medim.models.ood_features import Watched, as_watched_run
from medim.models.serialization import load_weights
from medim.objectives import OBJECTIVES
from medim.package.contract import GOLDEN, RESEARCH_ONLY, Contract
from medim.package.gate import Gate, gate, not_run
from medim.package.model_card import FIELDS
from medim.types import Array

PRIVATE = "P9 no path, user or host name in any file"
OFFLINE = "P10 verify and answer without a network"
TWICE = "P11 exported twice, the same bytes"


def of_networks(draft: Draft) -> dict[str, Gate]:
    """P0 to P8, which need the networks: are the graphs what torch computes, are images where they belong?"""
    results = _weights(draft.run)
    for made in draft.graphs.values():
        results |= {made.graph.name + name: gate for name, gate in _graph(made, draft).items()}
    return results | _images(draft)


def of_folder(folder: Path, draft: Draft, places: Sequence[Path], again: Callable[[Path], None]) -> dict[str, Gate]:
    """P9 to P11, which need the whole package as it lies in a folder.

    Args:
        folder: the package.
        draft: what it was made from.
        places: folders whose names must not stand in it.
        again: exports the run once more, into a folder.
    """
    words = machine_words([*places, folder])
    way = without_network()
    return {
        PRIVATE: checks.privacy(folder, words, _vocabulary(draft), {".onnx": onnx.structure}),
        OFFLINE: NO_NAMESPACE if way is None else _offline(folder, way),
        TWICE: _twice(folder, again),
    }


def as_they_must_turn_out() -> dict[str, Gate]:
    """The lines of `of_folder` in report and card, which it reads too and which must therefore be there before."""
    offline = gate(0, 0) if without_network() else NO_NAMESPACE
    return {PRIVATE: gate(0, 0, found={}), OFFLINE: offline, TWICE: gate(0, 0, found=[])}


NO_NAMESPACE = not_run("this machine does not allow `unshare --net`")


def _weights(run: FinishedRun) -> dict[str, Gate]:
    training = sum(module.training for graph in run.graphs for module in graph.network.modules())
    packed = build_encoder(run.spec) if run.spec["kind"] == "encoder" else build_model(run.spec)
    load_weights(packed, run.weights)
    return {
        "P0 network in evaluation mode": gate(training, 0),
        "P1 weights are those of the run": checks.weights(_arrays(packed), _arrays(run.graphs[0].source)),
    }


def _graph(made: Exported, draft: Draft) -> dict[str, Gate]:
    channels, sizes = draft.contract.in_channels, draft.run.sizes
    first = sizes.shape
    outside = [(1, channels + 1, *first), (1, channels, *first, 1)]
    if sizes.fixed or sizes.multiple_of > 1:
        outside.append((1, channels, first[0] + 1, *first[1:]))
    results = {
        "P2 ONNX Runtime against torch, unseen sizes": checks.random_inputs(
            made.ort, made.graph.run, channels, sizes.unseen()
        ),
        "P3 ONNX Runtime against float64 torch, little contrast": checks.little_contrast(
            made.ort, made.graph.exact, channels, sizes.unseen()[0]
        ),
        "P4 sizes outside the contract are refused": checks.refusals(made.ort, outside),
        "P6 phantom, from image to answer": checks.phantom_answer(made.golden, made.ort, draft.contract),
    }
    if isinstance(made.graph.network, Watched):
        torch, ort = as_watched_run(made.graph.source), made.ort
        results["P2 what the guard watches, ONNX Runtime against torch"] = checks.random_inputs(
            lambda image: ort.both(image)[1], lambda image: torch(image)[1], channels, sizes.unseen()
        )
    return results


def _images(draft: Draft) -> dict[str, Gate]:
    return {
        "P5 preprocessing against MONAI": preprocessing(draft.goldens[GOLDEN].volume, draft.contract),
        "P7 markers of a DICOM phantom, in all directions": _flips(draft.contract),
    } | _dicom(draft)


def _dicom(draft: Draft) -> dict[str, Gate]:
    if draft.contract.kind != "segmenter" or not draft.contract.labels:
        return {"P8 DICOM SEG, written and read back": not_run("no label codes: nothing is answered in DICOM")}
    return {f"P8 {name}": gate for name, gate in checks.dicom_answers(draft.goldens[GOLDEN], draft.contract).items()}


def _flips(contract: Contract) -> Gate:
    if contract.spatial_dims == 2:
        return not_run("2D images stay as they are shown")
    wrong, markers = misplaced()
    return gate(wrong, 0, of=markers)


def _offline(folder: Path, way: tuple[str, ...]) -> Gate:
    reason = failure(folder, way)
    return gate(1, 0, found=reason) if reason else gate(0, 0)


def _twice(folder: Path, again: Callable[[Path], None]) -> Gate:
    """How many files differ in a second export."""
    with tempfile.TemporaryDirectory() as place:
        again(Path(place))
        first, second = _contents(folder), _contents(Path(place))
    different = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    return gate(len(different), 0, found=different)


def _contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


def _arrays(network: nn.Module) -> dict[str, Array]:
    return {key: value.numpy() for key, value in network.state_dict().items()}


def _vocabulary(draft: Draft) -> str:
    """Words of every package, whoever made it: somebody whose account is called "image" is not found by them."""
    words: list[Any] = [Contract.model_json_schema(), FIELDS, RESEARCH_ONLY, *STEPS, *INFERENCES]
    words += [*ENCODERS, *DECODERS, *HEADS, *OBJECTIVES, *CRITICS]
    words += [lock().decode(), sbom(draft.contract).decode()]
    return " ".join(map(str, [*words, *(key for graph in draft.run.graphs for key in graph.network.state_dict())]))
