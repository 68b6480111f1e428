"""The model card: what is known about a package, and in as many words what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medim.deployment.contract import NOT_REPORTED, Contract

UNKNOWN = {  # what a run does not record; sections and fields follow CLAIM 2024 and the CHAI Applied Model Card
    "Intended use": ("users", "patient population", "anatomy", "out-of-scope uses"),
    "Regulatory status": ("clearance or CE mark",),
    "Data": (
        "sources and sites",
        "scanners, vendors and field strengths",
        "dates",
        "inclusion and exclusion",
        "age and sex",
        "de-identification method",
        "consent or ethics approval",
        "reference standard and annotators",
    ),
    "Evaluation": (
        "external test",
        "subgroups (site, scanner, sex, age)",
        "calibration",
        "failure cases",
        "robustness",
    ),
    "Oversight": ("limitations and known failure modes", "human oversight", "monitoring", "contact"),
}


def card(contract: Contract, gates: Mapping[str, Mapping[str, Any]]) -> str:
    """The card as Markdown.

    Args:
        contract: of the package.
        gates: the parity report's, by name.
    """
    spec, made = contract.architecture, contract.provenance
    parts = [spec.get(part) for part in ("encoder", "decoder", "head")]
    known: dict[str, dict[str, Any]] = {
        "Intended use": {"intended use": contract.intended_use, "not for": contract.not_for},
        "Model": {
            "kind": contract.kind,
            "modality": contract.modality,
            "dimensions": f"{contract.spatial_dims}D, {contract.in_channels} channel(s)",
            "architecture": ", ".join(part["name"] + _options(part) for part in parts if part),
            "classes": ", ".join(contract.classes) or None,
            "parent encoder (sha256)": made.get("parent"),
            "weights (sha256)": spec.get("sha256"),
        },
        "Data": {"index (sha256)": made.get("index_hash")},
        "Training": {
            "configuration (sha256)": made.get("config_hash"),
            "seed": made.get("seed"),
            "medim": made.get("medim"),
            "preprocessing": "; ".join(step["op"] + _options(step) for step in contract.preprocess),
            "inference": contract.inference["mode"] + _options(contract.inference),
        },
        "Oversight": {"out-of-distribution guard": str(contract.reference) if contract.reference else None},
        "Evaluation": _flat(contract.metrics) or {"on the run's validation split": None},
    }
    lines = [f"# {contract.name} {contract.version}", "", f"> **{contract.not_for}**", ""]
    missing = 0
    for section in [*known, *(s for s in UNKNOWN if s not in known)]:
        fields = {**known.get(section, {}), **dict.fromkeys(UNKNOWN.get(section, ()))}
        missing += sum(value in (None, "", NOT_REPORTED) for value in fields.values())
        lines += [f"## {section}", "", "| field | value |", "| --- | --- |"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in fields.items()]
        lines.append("")
    lines += ["## Gates passed at export", "", "| gate | verdict | measured | allowed |", "| --- | --- | --- | --- |"]
    for name, gate in gates.items():
        lines.append(f"| {name} | {gate['verdict']} | {_cell(gate.get('measured'))} | {_cell(gate.get('allowed'))} |")
    lines += ["", f"{missing} fields are {NOT_REPORTED}.", ""]
    return "\n".join(lines)


def _options(section: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in section.items() if key not in ("name", "op", "mode"))
    return f" ({options})" if options else ""


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics as one level of `a.b` names."""
    out: dict[str, Any] = {}
    for name, value in metrics.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def _cell(value: Any) -> str:
    if value in (None, "", NOT_REPORTED):
        return f"**{NOT_REPORTED}**"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
