"""Audit of the real images: the tables of docs/evidence/lookalikes.md.

Each set is audited by `medim audit` with its known subjects. The search does not use them except to exclude pairs of
one subject from the distribution of strangers, so pairs of one subject are true, and pairs of two subjects are false
or errors of the subjects.

    python pipelines/audit_sets.py --data shared/data --out studies/audit --page docs/evidence/lookalikes.md
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

from evidence import format_markdown_table, write_section

from medim.data.index.index import Index, build_index
from medim.data.lookalikes import FALSE_PAIRS
from medim.data.parallel import count_cpus
from medim.files import read_json, write_json
from medim.study.audit.source import SourceAudit, audit_source
from medim.types import Modality

SETS: dict[str, Modality] = {  # folder: modality
    "mri-left-atrium-twins": "mri",
    "mri-left-atrium": "mri",
    "mri-acdc": "mri",
    "mri-hippocampus": "mri",
    "xray-kermany": "xray",
    "xray-nih": "xray",
    "xray-pneumonia": "xray",
}


def main() -> None:
    """Audit all missing sets and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, default=Path("docs/evidence/lookalikes.md"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = [measure_set(arguments.data, name, arguments.out / f"{name}.json") for name in SETS]
    head = ["set", "images", "pairs", "correlation of look-alikes", "of one subject", "of two subjects"]
    head += ["in two splits", "seconds"]
    write_section(arguments.page, "look-alikes", format_markdown_table(head, [row["pairs"] for row in rows]))
    head = ["set", "raw size", "raw intensity", "corners", "file"]
    shortcuts = [row["shortcuts"] for row in rows if row["shortcuts"]]
    write_section(arguments.page, "properties", format_markdown_table(head, shortcuts))


def measure_set(data: Path, name: str, cache: Path) -> dict[str, Any]:
    """Audit a set, and format its rows; finished sets are read from `cache`."""
    if cache.is_file():
        return dict(read_json(cache))
    start = time.perf_counter()
    index = build_index(data / name, SETS[name], keep_names=True)
    result = audit_source(index, false_pairs=FALSE_PAIRS, jobs=count_cpus())
    row = {"pairs": _format_pairs(name, index, result, time.perf_counter() - start), "shortcuts": []}
    if result.shortcuts:
        row["shortcuts"] = [name, *(_format_shortcut(shortcut) for shortcut in result.shortcuts)]
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_json(cache, row)
    return row


def _format_pairs(name: str, index: Index, result: SourceAudit, seconds: float) -> list[str]:
    counts = Counter(record.subject for record in index.records)
    n_known = sum(count * (count - 1) // 2 for count in counts.values())
    n_strangers = len(result.strangers)
    return [
        name,
        f"{result.images:,}",
        f"{result.search.n_compared:,}",
        f"{result.search.threshold:.3f}",
        f"{len(result.pairs) - n_strangers} of {n_known:,}",
        str(n_strangers),
        str(len(result.leaks)),
        f"{seconds:.0f}",
    ]


def _format_shortcut(shortcut: Any) -> str:
    auroc, is_above = shortcut.prediction.auroc, shortcut.prediction.above_chance
    if not shortcut.varies:
        return "the same"
    text = f"{auroc['value']:.2f} [{auroc['ci_low']:.2f}, {auroc['ci_high']:.2f}]"
    return f"**{text}**" if is_above else text


if __name__ == "__main__":
    main()
