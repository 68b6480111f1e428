"""Report section of a package."""

from __future__ import annotations

from pathlib import Path

from medim.migrations import read_checked_json
from medim.reports.content import GateReportContent, PackageContent
from medim.reports.page import Banner, ReportSection, ReportTable, format_bytes, format_value, pluralise


def build_package_section(folder: Path, anchor: str) -> ReportSection:
    """Build the section of a package: intended use, input and output, and the acceptance gates of the export."""
    contract = read_checked_json(folder / "medim.json", None, PackageContent)
    report_path = folder / "parity" / "report.json"
    gates = read_checked_json(report_path, None, GateReportContent).get("gates", {}) if report_path.is_file() else {}
    rows = [
        (
            name.replace("_", " "),
            str(gate.get("verdict")),
            format_value(gate.get("measured")),
            format_value(gate.get("allowed")),
        )
        for name, gate in gates.items()
    ]
    all_gates_pass = bool(rows) and all(row[1] == "pass" for row in rows)
    headline = f"{contract.get('name')} {contract.get('version')}, {contract.get('kind')}"
    files = [path for path in folder.rglob("*") if path.is_file()]
    facts = [
        ("Name", f"{contract.get('name')} {contract.get('version')}"),
        ("Kind", format_value(contract.get("kind"))),
        ("Modality", format_value(contract.get("modality"))),
        ("Classes", format_value(contract.get("classes"))),
        ("Intended use", format_value(contract.get("intended_use"))),
        ("Size", format_bytes(sum(path.stat().st_size for path in files))),
    ]
    text = (
        f"{pluralise(len(rows), 'gate')} passed at export."
        if all_gates_pass
        else "There is no report of a successful export. Run medim verify."
    )
    return ReportSection(
        anchor=anchor,
        title=f"Package: {folder.name}",
        banner=Banner(
            "good" if all_gates_pass else "care", headline, f"{text} {contract.get('not_for') or ''}".strip()
        ),
        facts=facts,
        tables=[ReportTable("Gates at export", ("Gate", "Verdict", "Measured", "Allowed"), rows, wide=True)]
        if rows
        else [],
        details=[("Preprocessing", "\n".join(format_value(step) for step in contract.get("preprocess", ())))],
    )
