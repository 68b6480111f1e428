"""Content of the files of a package."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from medim.data.index.selection import hide_names
from medim.export import onnx
from medim.export.card_answers import check_card_text, read_card_answers
from medim.export.run import ExportGraph, FinishedRun
from medim.files import json_sha256
from medim.inference.ood import FALSE_POSITIVE_RATE, OOD_FILE, OODDetector
from medim.integrity import PackageError
from medim.package.contract import (
    NOT_REPORTED,
    SCHEMA_VERSION,
    Contract,
    OODStatistics,
    ScoreMapSpec,
    parse_contract,
    postprocess_of,
)
from medim.package.dicom_rules import load_dicom_rules
from medim.package.gate import GateResult
from medim.package.golden import GoldenInput, make_phantom
from medim.package.label_codes import read_label_codes
from medim.package.model_card import CardFields, ModelCard, build_model_card
from medim.package.onnx_session import OnnxSession, load_onnx_session
from medim.signing import key_to_hex, load_private_key
from medim.types import UsageError, UserError, Volume

PROVENANCE_VALUE = re.compile(r"[\w.+:-]{0,128}")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Content of a package that the run does not contain, and the handling of the output folder.

    Attributes:
        name: name of the package; None: `<modality>-<kind>`.
        version: semantic version of the package.
        intended_use: intended use for the contract and the model card.
        card: YAML file with values of the model card that the run does not record; see `medim.export.card_answers`.
        licence: licence text of the weights; without it, the package states that no licence was specified.
        private_key: Ed25519 private key (PEM) that signs SHA256SUMS.
        label_codes: codes of the classes: file, or name of a built-in one; see `medim.package.label_codes`.
        dicom_rules: file of rules for DICOM images; None: rules of the modality. See `medim.package.dicom_rules`.
        overwrite: replace an existing package.
    """

    name: str | None = None
    version: str = "0.1.0"
    intended_use: str | None = None
    card: Path | None = None
    licence: Path | None = None
    private_key: Path | None = None
    label_codes: Path | str | None = None
    dicom_rules: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, eq=False)
class ExportedGraph:
    """ONNX file of a graph with its ONNX Runtime session and golden input."""

    graph: ExportGraph
    onnx: bytes
    ort: OnnxSession
    golden: GoldenInput


@dataclass(frozen=True, eq=False)
class PackageBuilder:
    """Builder of a package from a finished run."""

    run: FinishedRun
    contract: Contract
    options: ExportOptions
    card_answers: Mapping[str, CardFields] = field(default_factory=dict)
    gates: dict[str, GateResult] = field(default_factory=dict)

    @cached_property
    def graphs(self) -> dict[str, ExportedGraph]:
        """Exported graphs by file name."""
        return {graph.file: self._export_graph(graph) for graph in self.run.graphs}

    @cached_property
    def goldens(self) -> dict[str, GoldenInput]:
        """Golden inputs by file name."""
        return {exported_graph.graph.golden: exported_graph.golden for exported_graph in self.graphs.values()}

    def build_card(self) -> ModelCard:
        """Build the model card, with the gates measured so far."""
        licence = self.options.licence is not None
        return build_model_card(self.contract, self.gates, self.run.summary, licence=licence, answers=self.card_answers)

    def _export_graph(self, graph: ExportGraph) -> ExportedGraph:
        data = onnx.to_onnx(graph.network, self.run.sizes, graph.signature)
        ort = load_onnx_session(data, graph.signature, name=graph.file, threads=1)
        return ExportedGraph(graph, data, ort, GoldenInput.from_run(self._build_phantom(), graph.run, self.contract))

    def _build_phantom(self) -> Volume:
        """Build a phantom that covers several windows, or has axis lengths that are not multiples of the strides.

        If the network accepts only one size, the phantom has this size.
        """
        contract, sizes = self.contract, self.run.sizes
        if sizes.fixed:
            return make_phantom(sizes.shape, contract.preprocess, contract.in_channels, exact=True)
        roi = contract.inference.get("roi")
        shape = [int(1.25 * n) for n in roi] if roi else [n + 3 for n in sizes.shape]
        return make_phantom(shape, contract.preprocess, contract.in_channels)


def create_builder(run: FinishedRun, options: ExportOptions) -> PackageBuilder:
    """Create the builder of a package with its contract.

    Raises:
        UserError: the run contains data that are not valid in a contract.
        UsageError: the file of `card` is not valid, or answers a field that the run or another option determines.
    """
    intended_use, answers = _read_card_options(options)
    spec, steps = run.spec, list(run.spec.preprocessing)
    first, *others = run.graphs
    content = Contract.model_construct(
        schema_version=SCHEMA_VERSION,
        name=options.name or f"{spec.modality}-{spec.kind}",
        version=options.version,
        kind=spec.kind,
        modality=spec.modality,
        intended_use=intended_use,
        preprocess=tuple(steps),
        preprocess_sha256=json_sha256(steps),
        inference=spec.inference,
        postprocess=postprocess_of(spec.kind),
        signature=first.signature,
        score_map=next((ScoreMapSpec(signature=g.signature, critic=g.network.spec) for g in others), None),
        reference=_describe_ood_statistics(run),
        classes=run.classes,
        labels=read_label_codes(options.label_codes, run.classes, spec.kind, spec.class_values)
        if options.label_codes
        else (),
        dicom_in=load_dicom_rules(spec.modality, options.dicom_rules),
        architecture=spec.to_json(),
        provenance=_check_provenance(spec.provenance.to_json()),
        metrics=_select_numbers(run.summary.get("val")),
        signed_by=key_to_hex(load_private_key(options.private_key).public_key()) if options.private_key else None,
    )
    try:
        contract = parse_contract(content.model_dump_json().encode())
    except PackageError as error:
        raise UserError(f"{run.weights.parent}: the run cannot be exported: {error}") from error
    builder = PackageBuilder(run, contract, options, answers)
    builder.build_card()  # a wrong answer shows before the graphs are exported
    return builder


def _read_card_options(options: ExportOptions) -> tuple[str, dict[str, CardFields]]:
    """Read the intended use, and the other answers to fields of the model card."""
    answers = read_card_answers(options.card) if options.card else {}
    answer = answers.get("Intended use", {}).pop("intended use", None)
    if options.intended_use is None:
        return NOT_REPORTED if answer is None else str(answer), answers
    if answer is not None:
        raise UsageError(f"{options.card}: the intended use is also given by --intended-use. Remove one of them.")
    return check_card_text(options.intended_use, "--intended-use"), answers


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
    """Check that the provenance contains only hashes, versions and numbers, because free text could identify a person.

    The condition of `--where` is allowed without names of images and subjects.

    Raises:
        UserError: a value is free text.
    """
    for key, value in content.items():
        if isinstance(value, Mapping):
            _check_provenance(value)
        elif key == "where" and _is_public_condition(value):
            continue
        elif not PROVENANCE_VALUE.fullmatch(str(value)):
            raise UserError(
                f"provenance.{key}: expected a hash, version or number, got {value!r}. "
                "Free text is not exported, because it could contain private data."
            )
    return dict(content)


def _is_public_condition(value: object) -> bool:
    """Whether a value is a valid condition without names of images and subjects."""
    try:
        return isinstance(value, str) and hide_names(value) == value
    except UsageError:
        return False


def _select_numbers(content: Any) -> dict[str, Any]:
    """Select the numbers of nested metrics, without texts."""
    if not isinstance(content, Mapping):
        return {}
    numbers = {key: _select_numbers(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    return {key: value for key, value in numbers.items() if isinstance(value, int | float | dict)}
