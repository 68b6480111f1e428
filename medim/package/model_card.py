"""Model card of a package. Fields without a value are marked as not reported.

`model_card.json` is validated with `ModelCard`; `MODEL_CARD.md` is rendered from it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from medim.data.mask_classes import is_identity
from medim.integrity import PackageError
from medim.package.contract import NOT_REPORTED, Contract
from medim.package.gate import GateResult
from medim.parsing import parse_json
from medim.types import UsageError

CardFields = dict[str, object]  # value of each field of a section; None: not reported
CARD_FILE, CARD_PAGE = "model_card.json", "MODEL_CARD.md"
# Sections and fields with their item of CLAIM 2024 (Tejani et al. 2024, doi 10.1148/ryai.240300). Fields without an
# item are from the CHAI Applied Model Card. An empty field has the value "not reported".
FIELDS: dict[str, dict[str, int | None]] = {
    "Identity": {
        "name": None,
        "version": None,
        "authors": None,
        "contact": None,
        "licence": None,
        "code": 43,
        "funding": 44,
    },
    "Intended use": {
        "intended use": 3,
        "not for": None,
        "users": None,
        "patient population": None,
        "anatomy": None,
        "out-of-scope uses": None,
        "clearance or CE mark": None,
    },
    "Model": {
        "kind": 1,
        "modality": 13,
        "input": 22,
        "classes": 14,
        "encoder": 22,
        "why this encoder": 22,
        "decoder and head": 22,
        "parent encoder (sha256)": 24,
        "weights (sha256)": None,
        "explainability": 31,
    },
    "Data": {
        "prospective or retrospective": 5,
        "sources and sites": 7,
        "dates": 7,
        "inclusion and exclusion": 8,
        "preprocessing": 9,
        "de-identification method": 11,
        "missing data": 12,
        "scanners, vendors and field strengths": 13,
        "reference standard": 14,
        "annotators and their agreement": 18,
        "split": 20,
        "sample size": 21,
        "labelled images": 35,
        "age and sex": 36,
        "index (sha256)": None,
        "consent or ethics approval": None,
    },
    "Training": {
        "software": 23,
        "initial weights": 24,
        "objectives": 25,
        "steps": 25,
        "seed": 25,
        "configuration (sha256)": 25,
        "selection of the model": 26,
        "inference": 25,
    },
    "Evaluation": {
        "on the run's validation split": 32,
        "external test": 33,
        "subgroups (site, scanner, sex, age)": 38,
        "calibration": 37,
        "failure cases": 39,
        "robustness": 30,
    },
    "Oversight": {
        "limitations and known failure modes": 40,
        "human oversight": 41,
        "monitoring": None,
    },
}


class ModelCard(BaseModel):
    """The content of `model_card.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    title: str
    banner: str
    sections: dict[str, CardFields]
    gates: dict[str, GateResult]
    not_reported: int

    @model_validator(mode="after")
    def _check_complete(self) -> ModelCard:
        actual, expected = ({s: set(fields) for s, fields in sections.items()} for sections in (self.sections, FIELDS))
        if actual != expected:
            wrong_fields = {
                f"{s}.{f}"
                for s in actual.keys() | expected.keys()
                for f in actual.get(s, set()) ^ expected.get(s, set())
            }
            raise ValueError(f"missing or unknown fields: {sorted(wrong_fields)}")
        if self.not_reported != _count_not_reported(self.sections):
            raise ValueError(
                f"expected {_count_not_reported(self.sections)} fields not reported, got {self.not_reported}"
            )
        return self

    @property
    def markdown(self) -> str:
        """Model card as Markdown."""
        lines = [f"# {escape_markdown(self.title)}", "", f"> **{escape_markdown(self.banner)}**", ""]
        for section, fields in self.sections.items():
            lines += [f"## {section}", "", "| field | CLAIM 2024 | value |", "| --- | --- | --- |"]
            for name, value in fields.items():
                rows = _flatten_card_metrics(value, name) if isinstance(value, Mapping) else {name: value}
                lines += [
                    f"| {escape_markdown(key)} | {FIELDS[section][name] or ''} | {_format_card_cell(v)} |"
                    for key, v in rows.items()
                ]
            lines.append("")
        lines += ["## Gates at export", "", "| gate | verdict | measured | allowed |", "| --- | --- | --- | --- |"]
        for name, gate in self.gates.items():
            outcome = _format_card_cell(gate.get("why") or gate["measured"])
            lines.append(f"| {name} | {gate['verdict']} | {outcome} | {_format_card_cell(gate.get('allowed', ''))} |")
        return "\n".join([*lines, "", f"{self.not_reported} fields are {NOT_REPORTED}.", ""])


def build_model_card(
    contract: Contract,
    gates: Mapping[str, GateResult],
    summary: Mapping[str, Any],
    *,
    licence: bool = False,
    answers: Mapping[str, CardFields] | None = None,
) -> ModelCard:
    """Build the model card of a package.

    Args:
        contract: contract of the package.
        gates: gate results of the parity report by name.
        summary: content of the run's `summary.json`; empty if the run has none.
        licence: whether the package has a licence for its weights.
        answers: values of fields that the run does not determine, by section and field.

    Raises:
        UsageError: there is an answer to a field that the run determines.
    """
    values: dict[str, CardFields] = {
        "Identity": _describe_identity(contract, licence=licence),
        "Intended use": {"intended use": contract.intended_use, "not for": contract.not_for},
        "Model": _describe_model(contract),
        "Data": _describe_data(contract, summary),
        "Training": _describe_training(contract, summary),
        "Oversight": _describe_oversight(contract),
        "Evaluation": {"on the run's validation split": dict(contract.metrics) or None},
    }
    for section, fields in (answers or {}).items():
        for name, answer in fields.items():
            if _fill_not_reported(values[section].get(name)) != NOT_REPORTED:
                raise UsageError(
                    f"model card: {section}: {name}: the run or another option determines this field "
                    f"({values[section][name]!s}). Remove the answer {answer!r}."
                )
            values[section][name] = answer
    sections = {
        section: {name: _fill_not_reported(values[section].get(name)) for name in fields}
        for section, fields in FIELDS.items()
    }
    return ModelCard(
        title=f"{contract.name} {contract.version}",
        banner=contract.not_for,
        sections=sections,
        gates={name: dict(gate) for name, gate in gates.items()},
        not_reported=_count_not_reported(sections),
    )


def _describe_identity(contract: Contract, *, licence: bool) -> CardFields:
    provenance = contract.provenance
    return {
        "name": contract.name,
        "version": contract.version,
        "licence": "see LICENSE" if licence else None,
        "code": f"medim {provenance['medim']}" if "medim" in provenance else None,
    }


def _describe_model(contract: Contract) -> CardFields:
    spec = contract.spec
    return {
        "kind": contract.kind,
        "modality": contract.modality,
        "input": f"{contract.spatial_dims}D, {contract.in_channels} channel(s)",
        "classes": _list_classes(contract) or "none: the output is a feature vector",
        "encoder": _format_card_section(spec.encoder),
        "decoder and head": ", ".join(_format_card_section(p) for p in (spec.decoder, spec.head) if p) or "none",
        "parent encoder (sha256)": contract.provenance.get("parent"),
        "weights (sha256)": spec.sha256,
        "explainability": "mutual-information map" if contract.score_map else None,
    }


def _list_classes(contract: Contract) -> str:
    """List the classes, with their values where these are not the numbers of the classes."""
    values = contract.spec.class_values
    if is_identity(values):
        return ", ".join(contract.classes)
    return ", ".join(f"{name} (value {value})" for name, value in zip(contract.classes, values, strict=True))


def _describe_data(contract: Contract, summary: Mapping[str, Any]) -> CardFields:
    provenance = contract.provenance
    where = provenance.get("where")
    selection = f"; of the images that satisfy the condition {where} (--where)" if where else ""
    return {
        "preprocessing": "; ".join(_format_card_section(step, "op") for step in contract.preprocess) or "none",
        "split": f"by subject, or predefined by the source{selection}" if "split_seed" in provenance else None,
        "labelled images": summary.get("n_labelled"),
        "index (sha256)": provenance.get("index_hash"),
    }


def _describe_training(contract: Contract, summary: Mapping[str, Any]) -> CardFields:
    provenance, objectives = contract.provenance, summary.get("objectives")
    versions = [f"{name} {provenance[name]}" for name in ("medim", "torch", "lightning") if name in provenance]
    return {
        "software": ", ".join(versions) or None,
        "initial weights": {"scratch": "random", "pretrained": "parent encoder"}.get(summary.get("init", "")),
        "objectives": ", ".join(f"{name} (weight {w})" for name, w in objectives.items()) if objectives else None,
        "steps": summary.get("steps"),
        "seed": provenance.get("seed"),
        "configuration (sha256)": provenance.get("config_hash"),
        "selection of the model": "none: last step of a fixed schedule" if "steps" in summary else None,
        "inference": _format_card_section(contract.inference, "mode"),
    }


def _describe_oversight(contract: Contract) -> CardFields:
    detector = f"out-of-distribution detector: {contract.reference}" if contract.reference else None
    return {"monitoring": detector}


def parse_model_card(data: bytes) -> ModelCard:
    """Read and check `model_card.json`.

    Raises:
        PackageError: the data are not JSON or not a model card.
    """
    try:
        return ModelCard.model_validate(parse_json(data))
    except ValidationError as error:
        reasons = "; ".join(str(e["msg"]) for e in error.errors())
        raise PackageError(
            f"{CARD_FILE}: expected a model card (schema 1), got {reasons}. Export the package again."
        ) from None
    except ValueError as error:
        raise PackageError(f"{CARD_FILE}: expected JSON ({error}). Copy the package again.") from None


def _fill_not_reported(value: object) -> object:
    return NOT_REPORTED if value in (None, "") else value


def _count_not_reported(sections: Mapping[str, Mapping[str, object]]) -> int:
    return sum(value == NOT_REPORTED for fields in sections.values() for value in fields.values())


def _format_card_section(section: Mapping[str, object], key: str = "name") -> str:
    options = ", ".join(f"{name} {value}" for name, value in section.items() if name != key)
    return str(section[key]) + (f" ({options})" if options else "")


def _flatten_card_metrics(metrics: Mapping[str, object], prefix: str) -> CardFields:
    """Flatten nested metrics to one level with names such as `a.b`."""
    out: CardFields = {}
    for name, value in metrics.items():
        key = f"{prefix}: {name}" if ":" not in prefix else f"{prefix}.{name}"
        out |= _flatten_card_metrics(value, key) if isinstance(value, Mapping) else {key: value}
    return out


def _format_card_cell(value: object) -> str:
    if value == NOT_REPORTED:
        return f"**{NOT_REPORTED}**"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape_markdown(text)


def escape_markdown(text: str) -> str:
    r"""Escape HTML, and the characters of Markdown that may change the table or a link.

    Examples:
        >>> escape_markdown("<script>|`x`")
        '&lt;script&gt;\\|\\`x\\`'
    """
    return re.sub(r"([\\`|\[\]])", r"\\\1", html.escape(" ".join(text.splitlines()), quote=False))
