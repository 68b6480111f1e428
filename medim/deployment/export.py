"""`medim export`: a finished run becomes a package, or, where a gate fails, nothing at all."""

from __future__ import annotations

import copy
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

import medim
from medim.data.preprocessing import STEPS
from medim.data.seen import read_seen
from medim.deployment import gates, onnx
from medim.deployment.card import UNKNOWN, card
from medim.deployment.contract import (
    GOLDEN,
    GRAPH,
    NOT_REPORTED,
    POSTPROCESS,
    REPORT,
    RESEARCH_ONLY,
    SCHEMA_VERSION,
    SCORE_MAP,
    SCORE_MAP_GOLDEN,
    WEIGHTS,
    Contract,
    PackageError,
    ScoreMap,
    Signature,
    parse,
)
from medim.deployment.dicom_in import rules_of
from medim.deployment.golden import Golden, phantom
from medim.deployment.inference import INFERENCES, Run
from medim.deployment.labels import read_labels
from medim.deployment.package import Package, load_package, session, write_sums
from medim.deployment.privacy import machine_words
from medim.files import hash_of, read_json, write_bytes, write_json, write_text
from medim.models.critics import CRITICS
from medim.models.decoders import DECODERS
from medim.models.encoders import ENCODERS
from medim.models.heads import HEADS
from medim.models.model import as_run, build_encoder, build_model
from medim.models.saved import find, load_encoder, load_model, load_weights
from medim.objectives import OBJECTIVES
from medim.objectives.score_map import load_score_map
from medim.types import Array, UserError, Volume

SCAN = "no path, user or host name in any file"
PROVENANCE = re.compile(r"[\w.+:-]{0,128}")


@dataclass(frozen=True)
class Graph:
    """A network that becomes a file of the package, with its golden input."""

    name: str  # how its gates begin
    file: str
    golden: str
    network: Any  # image -> logits, (summary, *maps), or scores
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
        return self.network.encoder if isinstance(self.network, onnx.Summarised) else self.network


@dataclass(frozen=True)
class Loaded:
    """A finished run, ready to be exported."""

    graphs: tuple[Graph, ...]  # the answer's first, then the score map's where there is one
    spec: dict[str, Any]
    weights: Path
    sizes: onnx.Sizes

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


def export(
    run: Path,
    out: Path,
    *,
    name: str | None = None,
    version: str = "0.1.0",
    intended_use: str = NOT_REPORTED,
    labels_schema: Path | str | None = None,
    dicom_in: Path | None = None,
    overwrite: bool = False,
) -> Package:
    """Make a package of a run.

    The folder is built beside `out` and renamed, so `out` is whole or absent; exporting twice gives the same bytes.

    Args:
        run: a run with `encoder/` or `model/`.
        out: the package's folder.
        name: of the package; default `<modality>-<kind>`.
        version: semantic version of the package.
        intended_use: a sentence for the contract and the card.
        labels_schema: codes of the classes, a file or the name of a shipped one; see `medim.deployment.labels`.
        dicom_in: file of rules for DICOM images; default those of the modality. See `medim.deployment.dicom_in`.
        overwrite: replace what lies at `out`.

    Raises:
        UserError: `run` is not finished, `out` is taken, or a gate failed.
    """
    run, out = Path(run), Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise UserError(f"{out}: expected an empty or new folder. Use --overwrite to replace it, or another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        with _one_thread():
            fields = {"name": name, "version": version, "intended_use": intended_use}
            _build(run, folder, out, labels_schema, dicom_in, **fields)
        folder.chmod(0o755)
        if out.is_dir():
            shutil.rmtree(out)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return load_package(out)


def _build(
    run: Path, folder: Path, out: Path, labels_schema: Path | str | None, dicom_in: Path | None, **fields: Any
) -> None:
    loaded = _load(run)
    spec = loaded.spec
    fields["name"] = fields["name"] or f"{spec['modality']}-{spec['kind']}"
    if labels_schema is not None:
        fields["labels"] = read_labels(labels_schema, loaded.classes, spec["kind"])
    fields["dicom_in"] = rules_of(spec["modality"], dicom_in)
    contract = _contract(loaded, metrics=_metrics(run), **fields)
    write_bytes(folder / WEIGHTS, loaded.weights.read_bytes())
    if seen := read_seen(run):
        seen.write(folder)
    results = _gates_of_weights(loaded, folder / WEIGHTS)
    for graph in loaded.graphs:
        results |= _write_graph(folder, graph, loaded.sizes, contract)
    write_json(folder / "medim.json", contract.model_dump(mode="json"))
    # The scan reads report and card too, so both are written with its line as it must turn out.
    results[SCAN] = gates.gate(0, 0)
    write_json(folder / REPORT, {"schema_version": SCHEMA_VERSION, "gates": results, "versions": _versions()})
    write_text(folder / "MODEL_CARD.md", card(contract, results))
    words = machine_words([run, out, folder])
    results[SCAN] = gates.privacy(folder, words, _vocabulary(loaded.graphs), {".onnx": onnx.structure})
    failed = {name: result for name, result in results.items() if result["verdict"] != "pass"}
    if failed:
        reasons = "; ".join(f"{name}: {result}" for name, result in failed.items())
        raise UserError(f"{run}: not exported, because a gate failed. {reasons}")
    write_sums(folder)


def _load(path: Path) -> Loaded:
    weights, spec = find(Path(path))
    if spec["kind"] == "encoder":
        encoder: Any = load_encoder(path)
        network: nn.Module = onnx.Summarised(encoder).eval()
        score_map = load_score_map(path)
    else:
        network = load_model(Path(path))[0]
        encoder, score_map = network.encoder, None
    strides, channels = tuple(encoder.strides), spec["in_channels"]
    sizes = onnx.sizes_of(network, tuple(spec["input_shape"]), strides, channels)
    signature = onnx.signature_of(network, sizes, channels, strides)
    graphs = [Graph("", GRAPH, GOLDEN, network, signature)]
    if score_map is not None:
        signature = onnx.score_signature(signature)
        graphs.append(Graph("score map: ", SCORE_MAP, SCORE_MAP_GOLDEN, score_map, signature))
    return Loaded(tuple(graphs), spec, weights, sizes)


def _write_graph(folder: Path, graph: Graph, sizes: onnx.Sizes, contract: Contract) -> dict[str, gates.Gate]:
    """Write a network and its golden input; its gates."""
    data = onnx.to_onnx(graph.network, sizes, graph.signature)
    write_bytes(folder / graph.file, data)
    ort = session(data, graph.signature, name=graph.file, threads=1)
    golden = Golden.make(_phantom(contract, sizes), graph.run, contract)
    write_bytes(folder / graph.golden, golden.dump())
    return {graph.name + name: gate for name, gate in _gates(graph, sizes, contract, ort, golden).items()}


def _phantom(contract: Contract, sizes: onnx.Sizes) -> Volume:
    """A phantom that becomes several windows, or sides that the strides do not divide, or the one size that fits."""
    channels = contract.in_channels
    if sizes.fixed:
        return phantom(sizes.shape, contract.preprocess, channels, exact=True)
    roi = contract.inference.get("roi")
    shape = [int(1.25 * n) for n in roi] if roi else [n + 3 for n in sizes.shape]
    return phantom(shape, contract.preprocess, channels)


def _contract(loaded: Loaded, **fields: Any) -> Contract:
    spec = loaded.spec
    first, *others = loaded.graphs
    steps = list(spec["preprocessing"])
    draft = Contract.model_construct(
        schema_version=SCHEMA_VERSION,
        kind=spec["kind"],
        modality=spec["modality"],
        preprocess=tuple(steps),
        preprocess_sha256=hash_of(steps),
        inference=spec["inference"],
        postprocess=POSTPROCESS[spec["kind"]],
        signature=first.signature,
        score_map=next((ScoreMap(signature=g.signature, critic=g.network.spec) for g in others), None),
        classes=loaded.classes,
        architecture=spec,
        provenance=_provenance(spec.get("provenance") or {}),
        **fields,
    )
    try:
        return parse(draft.model_dump_json().encode())
    except PackageError as error:
        raise UserError(f"{loaded.weights.parent}: the run cannot be packed: {error}") from error


def _provenance(content: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes, versions and numbers pass; free text, which could hold a path or a name, is refused."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            _provenance(value)
        elif not PROVENANCE.fullmatch(str(value)):
            raise UserError(
                f"provenance.{key}: expected a hash, version or number, got {value!r}, which "
                "must not leave this machine."
            )
    return dict(content)


def _metrics(run: Path) -> dict[str, Any]:
    """The figures of a run on its validation split, where it has any."""
    summary = run / "summary.json"
    content = read_json(summary).get("val") if summary.is_file() else None
    return _numbers(content) if isinstance(content, Mapping) else {}


def _numbers(content: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: _numbers(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    return {key: value for key, value in kept.items() if isinstance(value, int | float | dict)}


def _gates_of_weights(loaded: Loaded, packed: Path) -> dict[str, gates.Gate]:
    training = sum(module.training for graph in loaded.graphs for module in graph.network.modules())
    run = _arrays(loaded.graphs[0].source)
    return {
        "network in evaluation mode": gates.gate(training, 0),
        "weights are those of the run": gates.weights(_arrays(_fresh(loaded.spec, packed)), run),
    }


def _gates(graph: Graph, sizes: onnx.Sizes, contract: Contract, ort: Run, golden: Golden) -> dict[str, gates.Gate]:
    """Gates of a graph: is it what torch computes?"""
    channels, first = contract.in_channels, sizes.shape
    outside = [(1, channels + 1, *first), (1, channels, *first, 1)]
    if sizes.fixed or sizes.multiple_of > 1:
        outside.append((1, channels, first[0] + 1, *first[1:]))
    return {
        "ONNX Runtime against torch, unseen sizes": gates.random_inputs(ort, graph.run, channels, sizes.unseen()),
        "ONNX Runtime against float64 torch, little contrast": gates.little_contrast(
            ort, graph.exact, channels, sizes.unseen()[0]
        ),
        "sizes outside the contract are refused": gates.refusals(ort, outside),
        "phantom, from image to answer": gates.phantom_answer(golden, ort, contract),
    }


def _fresh(spec: dict[str, Any], weights: Path) -> nn.Module:
    network: nn.Module = build_encoder(spec) if spec["kind"] == "encoder" else build_model(spec)
    load_weights(network, weights)
    return network


def _arrays(network: nn.Module) -> dict[str, Array]:
    return {key: value.numpy() for key, value in network.state_dict().items()}


def _vocabulary(graphs: Sequence[Graph]) -> str:
    """Words of every package, whoever made it: somebody whose account is called "image" is not found by them."""
    words: list[Any] = [Contract.model_json_schema(), UNKNOWN, RESEARCH_ONLY, *STEPS, *INFERENCES]
    words += [*ENCODERS, *DECODERS, *HEADS, *OBJECTIVES, *CRITICS]
    return " ".join(map(str, [*words, *(key for graph in graphs for key in graph.network.state_dict())]))


def _versions() -> dict[str, str]:
    return {
        "medim": medim.__version__,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, so that sums are added in one order and the export does not depend on the machine's load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
