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
from medim.export.run import FinishedRun, Graph
from medim.files import hash_of
from medim.inference.ood import FALSE_ALARMS, REFERENCE, Reference
from medim.package.contract import (
    NOT_REPORTED,
    POSTPROCESS,
    SCHEMA_VERSION,
    Contract,
    PackageError,
    ScoreMap,
    TrainingImages,
    parse,
)
from medim.package.dicom_rules import rules_of
from medim.package.gate import Gate
from medim.package.golden import Golden, phantom
from medim.package.label_codes import read_labels
from medim.package.onnx_session import Session, session
from medim.package.signing import as_hex, private_key
from medim.types import UserError, Volume

PROVENANCE = re.compile(r"[\w.+:-]{0,128}")


@dataclass(frozen=True)
class Options:
    """What the person who exports decides."""

    name: str | None = None  # default: <modality>-<kind>
    version: str = "0.1.0"
    intended_use: str = NOT_REPORTED
    licence: Path | None = None  # of the weights
    sign: Path | None = None  # an Ed25519 private key
    labels_schema: Path | str | None = None  # codes of the classes: a file, or the name of a shipped one
    dicom_in: Path | None = None  # rules for DICOM images; default: the modality's


@dataclass(frozen=True, eq=False)
class Exported:
    """A graph as the package holds it, and as ONNX Runtime runs it."""

    graph: Graph
    onnx: bytes
    ort: Session
    golden: Golden


@dataclass(frozen=True, eq=False)
class Draft:
    """A run on its way to a package."""

    run: FinishedRun
    contract: Contract
    options: Options
    gates: dict[str, Gate] = field(default_factory=dict)

    @cached_property
    def graphs(self) -> dict[str, Exported]:
        """Every graph by the name of its file."""
        return {graph.file: self._export(graph) for graph in self.run.graphs}

    @cached_property
    def goldens(self) -> dict[str, Golden]:
        """Every golden input by the name of its file."""
        return {made.graph.golden: made.golden for made in self.graphs.values()}

    def _export(self, graph: Graph) -> Exported:
        data = onnx.to_onnx(graph.network, self.run.sizes, graph.signature)
        ort = session(data, graph.signature, name=graph.file, threads=1)
        return Exported(graph, data, ort, Golden.make(self._phantom(), graph.run, self.contract))

    def _phantom(self) -> Volume:
        """A phantom of several windows, or of sides that the strides do not divide, or the one size that fits."""
        contract, sizes = self.contract, self.run.sizes
        if sizes.fixed:
            return phantom(sizes.shape, contract.preprocess, contract.in_channels, exact=True)
        roi = contract.inference.get("roi")
        shape = [int(1.25 * n) for n in roi] if roi else [n + 3 for n in sizes.shape]
        return phantom(shape, contract.preprocess, contract.in_channels)


def draft(run: FinishedRun, options: Options) -> Draft:
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
        preprocess_sha256=hash_of(steps),
        inference=spec["inference"],
        postprocess=POSTPROCESS[spec["kind"]],
        signature=first.signature,
        score_map=next((ScoreMap(signature=g.signature, critic=g.network.spec) for g in others), None),
        reference=_reference(run),
        classes=run.classes,
        labels=read_labels(options.labels_schema, run.classes, spec["kind"]) if options.labels_schema else (),
        dicom_in=rules_of(spec["modality"], options.dicom_in),
        architecture=spec,
        provenance=_provenance(spec.get("provenance") or {}),
        metrics=_numbers(run.summary.get("val")),
        signed_by=as_hex(private_key(options.sign).public_key()) if options.sign else None,
    )
    try:
        return Draft(run, parse(content.model_dump_json().encode()), options)
    except PackageError as error:
        raise UserError(f"{run.weights.parent}: the run cannot be packed: {error}") from error


def _reference(run: FinishedRun) -> TrainingImages | None:
    if run.reference is None:
        return None
    try:
        found = Reference.parse(run.reference)
    except (ValueError, KeyError) as error:
        raise UserError(f"{run.weights.parent / REFERENCE}: cannot be read ({error}). Copy the run again.") from error
    return TrainingImages(
        sha256=hashlib.sha256(run.reference).hexdigest(),
        **found.counts,
        method=found.method,
        false_alarms=FALSE_ALARMS,
    )


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


def _numbers(content: Any) -> dict[str, Any]:
    """The numbers of nested figures, without the remarks beside them."""
    if not isinstance(content, Mapping):
        return {}
    kept = {key: _numbers(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    return {key: value for key, value in kept.items() if isinstance(value, int | float | dict)}
