"""From a package to a section of the report."""

from __future__ import annotations

from pathlib import Path

from medim.files import read_json
from medim.reports.page import Banner, Section, Table, many, size, told


def package(folder: Path, anchor: str) -> Section:
    """A package: what it is for, what it takes and gives, and the gates it passed at export."""
    contract = read_json(folder / "medim.json")
    report = folder / "parity" / "report.json"
    gates = read_json(report).get("gates", {}) if report.is_file() else {}
    rows = [
        (name.replace("_", " "), str(gate.get("verdict")), told(gate.get("measured")), told(gate.get("allowed")))
        for name, gate in gates.items()
        if isinstance(gate, dict)
    ]
    passed = bool(rows) and all(row[1] == "pass" for row in rows)
    headline = f"{contract.get('name')} {contract.get('version')}, {contract.get('kind')}"
    files = [path for path in folder.rglob("*") if path.is_file()]
    facts = [
        ("Name", f"{contract.get('name')} {contract.get('version')}"),
        ("Kind", told(contract.get("kind"))),
        ("Modality", told(contract.get("modality"))),
        ("Classes", told(contract.get("classes"))),
        ("Intended use", told(contract.get("intended_use"))),
        ("Size", size(sum(path.stat().st_size for path in files))),
    ]
    text = (
        f"{many(len(rows), 'gate')} passed at export."
        if passed
        else "No report of a passed export was found. Run medim verify."
    )
    return Section(
        anchor=anchor,
        title=f"Package: {folder.name}",
        banner=Banner("good" if passed else "care", headline, f"{text} {contract.get('not_for') or ''}".strip()),
        facts=facts,
        tables=[Table("Gates at export", ("Gate", "Verdict", "Measured", "Allowed"), rows, wide=True)] if rows else [],
        details=[("Preprocessing", "\n".join(told(step) for step in contract.get("preprocess", ())))],
    )
