"""Comparison of objectives for 28x28 X-rays by linear probes of frozen encoders after the same number of steps.

All objectives are trained with seed 0, the two best with three seeds. Encoder, views, schedule and batch are those of
the preset `xray-28`; only the objectives differ. Finished runs are kept.

    python pipelines/xray_objectives.py --data pneumoniamnist.npz --out studies/objectives
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from anchors import build_arms, get_run_folder
from evidence import format_markdown_table, format_spread, run_once, write_section

from medim.config import load_config
from medim.data.index.index import Index, build_index
from medim.evaluation.probing.label_budget import Budget
from medim.evaluation.probing.probe import ProbeOptions, probe
from medim.files import read_json
from medim.training.pretrain.run import pretrain

Aurocs = dict[tuple[str, str], float]  # by input of the probe and label budget
STEPS, SUBSETS, FRACTIONS, MAPS = 1000, range(5), (0.01, 0.1), {"summary": (), "summary and maps": None}
FIRST_RUN = "DIM-L---InfoNCE-0"
# The published figures were measured with a selection by labels of training subjects.
BASE = load_config("pretrain", "xray-28", [f"max_steps={STEPS}", "checkpoint_selection=probe"])
ARMS = {name: sections for name, sections in build_arms(BASE).items() if name != "SimCLR"}  # not part of the table


def measure_arm(arm: str, seed: int, index: Index, out: Path) -> tuple[Mapping[str, Any], Aurocs]:
    """Pretrain an encoder; return its summary, and the mean AUROC of its probes by input and label budget."""
    settings = BASE.model_copy(update={"objectives": ARMS[arm]})
    folder = get_run_folder(out, arm, seed)
    run = run_once(folder, partial(pretrain, settings, index, seed=seed, store=out / "store"))
    return run, read_probe_aurocs(folder, "encoder", index, out)


def read_probe_aurocs(run: Path, features: str, index: Index, out: Path) -> Aurocs:
    """Read the mean AUROC over label subsets; untrained encoder and pixels are probed only with the first run."""
    aurocs: Aurocs = {}
    for source, levels in MAPS.items():
        probe_folder = run / f"probe-{source.replace(' ', '-')}"
        if not (probe_folder / "probe.json").is_file():
            options = ProbeOptions(
                levels=levels,
                budgets=[Budget(fraction=fraction) for fraction in FRACTIONS],
                seeds=SUBSETS,
                baselines=run.name == FIRST_RUN,
                store=out / "store",
                overwrite=True,
            )
            probe(run, index, probe_folder, options)
        rows = read_json(probe_folder / "probe.json")["summary"]
        aurocs |= {(source, row["budget"]): row["auroc"]["mean"] for row in rows if row["features"] == features}
    return aurocs


def main() -> None:
    """Run all missing runs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    index, out = build_index(arguments.data, "xray", keep_names=True), arguments.out
    results = {arm: [measure_arm(arm, 0, index, out)] for arm in ARMS}
    columns = list(results["DIM(L), InfoNCE"][0][1])
    for arm in sorted(results, key=lambda arm: -results[arm][0][1]["summary", "1%"])[:2]:
        results[arm] += [measure_arm(arm, seed, index, out) for seed in (1, 2)]
    rows = []
    for arm, runs in results.items():
        verdicts = ", ".join(str(run["verdict"]) for run, _ in runs)
        rows.append([arm, *(format_spread([aurocs[c] for _, aurocs in runs]) for c in columns), verdicts])
    for features, name in {"random": "untrained", "pixels": "pixels, PCA"}.items():
        anchors = read_probe_aurocs(out / FIRST_RUN, features, index, out)
        rows.append([name, *(f"{anchors[c]:.3f}" for c in columns), ""])
    head = ["objective", *(f"{maps}, {budget}" for maps, budget in columns), "verdicts"]
    write_section(arguments.page, "objectives table", format_markdown_table(head, rows))
    print(format_markdown_table(head, rows))


if __name__ == "__main__":
    main()
