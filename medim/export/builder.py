"""A package in the making: what each of its files is made from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from medim.export import onnx
from medim.export.run import ExportGraph, FinishedRun
from medim.files import json_sha256
from medim.inference.ood import FALSE_POSITIVE_RATE, OOD_FILE, OODDetector
from medim.package.contract import (
    NOT_REPORTED,
    SCHEMA_VERSION,
    Contract,
    OODStatistics,
    PackageError,
    ScoreMapSpec,
    parse_contract,
    postprocess_of,
)
from medim.package.dicom_rules import load_dicom_rules
from medim.package.gate import GateResult
from medim.package.golden import GoldenInput, make_phantom
from medim.package.label_codes import read_label_codes
from medim.package.onnx_session import OnnxSession, load_onnx_session
from medim.package.signing import key_to_hex, load_private_key
from medim.types import UserError, Volume

PROVENANCE_VALUE = re.compile(r"[\w.+:-]{0,128}")


@dataclass(frozen=True)
class ExportOptions:
    """What the person who exports decides."""

    name: str | None = None  # default: <modality>-<kind>
    version: str = "0.1.0"
    intended_use: str = NOT_REPORTED
    licence: Path | None = None  # of the weights
    sign: Path | None = None  # an Ed25519 private key
    labels_schema: Path | str | None = None  # codes of the classes: a file, or the name of a shipped one
    dicom_in: Path | None = None  # rules for DICOM images; default: the modality's


@dataclass(frozen=True, eq=False)
class ExportedGraph:
    """A graph as the package holds it, and as ONNX Runtime runs it."""

    graph: ExportGraph
    onnx: bytes
    ort: OnnxSession
    golden: GoldenInput


@dataclass(frozen=True, eq=False)
class PackageBuilder:
    """A run on its way to a package."""

    run: FinishedRun
    contract: Contract
    options: ExportOptions
    gates: dict[str, GateResult] = field(default_factory=dict)

    @cached_property
    def graphs(self) -> dict[str, ExportedGraph]:
        """Every graph by the name of its file."""
        return {graph.file: self._export_graph(graph) for graph in self.run.graphs}

    @cached_property
    def goldens(self) -> dict[str, GoldenInput]:
        """Every golden input by the name of its file."""
        return {exported_graph.graph.golden: exported_graph.golden for exported_graph in self.graphs.values()}

    def _export_graph(self, graph: ExportGraph) -> ExportedGraph:
        data = onnx.to_onnx(graph.network, self.run.sizes, graph.signature)
        ort = load_onnx_session(data, graph.signature, name=graph.file, threads=1)
        return ExportedGraph(graph, data, ort, GoldenInput.from_run(self._build_phantom(), graph.run, self.contract))

    def _build_phantom(self) -> Volume:
        """A phantom of several windows, or of sides that the strides do not divide, or the one size that fits."""
        contract, sizes = self.contract, self.run.sizes
        if sizes.fixed:
            return make_phantom(sizes.shape, contract.preprocess, contract.in_channels, exact=True)
        roi = contract.inference.get("roi")
        shape = [int(1.25 * n) for n in roi] if roi else [n + 3 for n in sizes.shape]
        return make_phantom(shape, contract.preprocess, contract.in_channels)


def create_builder(run: FinishedRun, options: ExportOptions) -> PackageBuilder:
    """Begin a package.

    Raises:
        UserError: the run recorded something that a contract cannot hold.
    """
    spec, steps = run.spec, list(run.spec["preprocessing"])
    first, *others = run.graphs
    content = Contract.model_construct(
        schema_version=SCHEMA_VERSION,
        name=options.name or f"{spec['modality']}-{spec['kind']}",
        version=options.version,
        kind=spec["kind"],
        modality=spec["modality"],
        intended_use=options.intended_use,
        preprocess=tuple(steps),
        preprocess_sha256=json_sha256(steps),
        inference=spec["inference"],
        postprocess=postprocess_of(spec["kind"]),
        signature=first.signature,
        score_map=next((ScoreMapSpec(signature=g.signature, critic=g.network.spec) for g in others), None),
        reference=_describe_ood_statistics(run),
        classes=run.classes,
        labels=read_label_codes(options.labels_schema, run.classes, spec["kind"]) if options.labels_schema else (),
        dicom_in=load_dicom_rules(spec["modality"], options.dicom_in),
        architecture=spec,
        provenance=_check_provenance(spec.get("provenance") or {}),
        metrics=_select_numbers(run.summary.get("val")),
        signed_by=key_to_hex(load_private_key(options.sign).public_key()) if options.sign else None,
    )
    try:
        return PackageBuilder(run, parse_contract(content.model_dump_json().encode()), options)
    except PackageError as error:
        raise UserError(f"{run.weights.parent}: the run cannot be packed: {error}") from error


def _describe_ood_statistics(run: FinishedRun) -> OODStatistics | None:
    if run.ood_statistics is None:
        return None
    try:
        detector = OODDetector.parse(run.ood_statistics)
    except (ValueError, KeyError) as error:
        raise UserError(f"{run.weights.parent / OOD_FILE}: cannot be read ({error}). Copy the run again.") from error
    return OODStatistics(
        sha256=hashlib.sha256(run.ood_statistics).hexdigest(),
        **detector.counts,
        method=detector.method,
        false_alarms=FALSE_POSITIVE_RATE,
    )


def _check_provenance(content: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes, versions and numbers pass; free text, which could hold a path or a name, is refused."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            _check_provenance(value)
        elif not PROVENANCE_VALUE.fullmatch(str(value)):
            raise UserError(
                f"provenance.{key}: expected a hash, version or number, got {value!r}, which "
                "must not leave this machine."
            )
    return dict(content)


def _select_numbers(content: Any) -> dict[str, Any]:
    """The numbers of nested figures, without the remarks beside them."""
    if not isinstance(content, Mapping):
        return {}
    numbers = {key: _select_numbers(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    return {key: value for key, value in numbers.items() if isinstance(value, int | float | dict)}
