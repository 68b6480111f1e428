"""Which objective for 28x28 X-rays: frozen linear probes of one encoder, pretrained by each for one budget of steps.

Seed 0 for every objective, three seeds for the two best. Encoder, views, schedule and batch are those of the preset
`xray-28`; only the objectives differ. What is finished is kept.

    python pipelines/xray_objectives.py --data pneumoniamnist.npz --out studies/objectives
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

from anchors import folder_of, objectives
from evidence import markdown, once, spread_text, write_section

from medim.config import load
from medim.data.index.index import Index, build_index
from medim.evaluation.probing.label_budget import Budget
from medim.evaluation.probing.probe import probe
from medim.files import read_json
from medim.training.pretrain.run import pretrain

Aurocs = dict[tuple[str, str], float]  # by what the probe sees and the label budget
STEPS, SUBSETS, FRACTIONS, MAPS = 1000, range(5), (0.01, 0.1), {"summary": (), "summary and maps": None}
FIRST = "DIM-L---InfoNCE-0"
BASE = load("pretrain", "xray-28", [f"max_steps={STEPS}"])
ARMS = {name: sections for name, sections in objectives(BASE).items() if name != "SimCLR"}  # it came after the table


def measure(arm: str, seed: int, index: Index, out: Path) -> tuple[dict[str, Any], Aurocs]:
    """An encoder's summary, and its probes' mean AUROC over the label subsets by what they see and the labels."""
    settings = BASE.model_copy(update={"objectives": ARMS[arm]})
    folder = folder_of(out, arm, seed)
    run = once(folder, partial(pretrain, settings, index, seed=seed, store=out / "store"))
    return run, probes(folder, "encoder", index, out)


def probes(run: Path, features: str, index: Index, out: Path) -> Aurocs:
    """Mean AUROC over the label subsets; the untrained encoder and the pixels are probed beside the first run."""
    found: Aurocs = {}
    for seen, maps in MAPS.items():
        at = run / f"probe-{seen.replace(' ', '-')}"
        if not (at / "probe.json").is_file():
            budgets, anchors = [Budget(fraction=fraction) for fraction in FRACTIONS], run.name == FIRST
            options: dict[str, Any] = {"anchors": anchors, "store": out / "store", "overwrite": True}
            probe(run, index, at, maps=maps, budgets=budgets, seeds=SUBSETS, **options)
        rows = read_json(at / "probe.json")["summary"]
        found |= {(seen, row["budget"]): row["auroc"]["mean"] for row in rows if row["features"] == features}
    return found


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    index, out = build_index(arguments.data, "xray"), arguments.out
    found = {arm: [measure(arm, 0, index, out)] for arm in ARMS}
    columns = list(found["DIM(L), InfoNCE"][0][1])
    for arm in sorted(found, key=lambda arm: -found[arm][0][1]["summary", "1%"])[:2]:
        found[arm] += [measure(arm, seed, index, out) for seed in (1, 2)]
    rows = []
    for arm, runs in found.items():
        verdicts = ", ".join(str(run["verdict"]) for run, _ in runs)
        rows.append([arm, *(spread_text([aurocs[c] for _, aurocs in runs]) for c in columns), verdicts])
    for features, name in {"random": "untrained", "pixels": "pixels, PCA"}.items():
        anchors = probes(out / FIRST, features, index, out)
        rows.append([name, *(f"{anchors[c]:.3f}" for c in columns), ""])
    head = ["objective", *(f"{maps}, {budget}" for maps, budget in columns), "verdicts"]
    write_section(arguments.page, "objectives table", markdown(head, rows))
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
