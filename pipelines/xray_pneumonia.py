"""Benefit of pretraining for pneumonia classification in 28x28 X-rays: a table of docs/results.md.

Three encoders are pretrained without labels. For each label budget and five label subsets, they are fine-tuned, and the
same network is trained from scratch with the same schedule. Linear probes of the frozen encoders are compared with
probes of an untrained encoder and of the pixels, on the same labels. All metrics are of the validation split, which has
no child of the training split only with `--keys` (folder of subjects.csv and resplit.csv). Finished runs are kept.

    python pipelines/xray_pneumonia.py --data pneumoniamnist.npz --keys keys --out studies/xray --page docs/results.md
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from evidence import (
    compute_auroc,
    evaluate_statistic,
    format_difference,
    format_markdown_table,
    format_spread,
    read_probe_auroc,
    run_once,
    write_section,
)

from medim.config import load_config
from medim.data.index.index import build_index
from medim.evaluation.cases import read_cases
from medim.evaluation.probing.label_budget import Budget
from medim.evaluation.probing.probe import ProbeOptions, probe
from medim.metrics.metric import Statistic
from medim.study.statistics.intervals import paired_difference
from medim.training.finetune.run import finetune
from medim.training.pretrain.run import pretrain

SEEDS, SUBSETS = (0, 1, 2), (0, 1, 2, 3, 4)
FRACTIONS = (0.01, 0.1, 1.0)
TWIN, OURS = "from scratch", "fine-tuned"
HEADS = {TWIN: "random", OURS: "probe"}  # best head initialisation of each arm on other label subsets
PROBES = {"encoder": "frozen, linear probe", "random": "untrained, linear probe", "pixels": "pixels, PCA, linear"}


def main() -> None:
    """Run all missing runs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keys", type=Path, help="folder of subjects.csv and resplit.csv")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--only-run", action="store_true", help="do not write the page")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    subjects, split = (arguments.keys and arguments.keys / name for name in ("subjects.csv", "resplit.csv"))
    index, out = build_index(arguments.data, "xray", subjects=subjects, labels=split, keep_names=True), arguments.out
    store, settings = out / "store", load_config("pretrain", "xray-28")
    schedules = {
        arm: load_config("finetune", "xray-28-classification", [f"head_init={head}"]) for arm, head in HEADS.items()
    }

    encoders = [out / f"encoder-{seed}" for seed in SEEDS]
    runs = [run_once(encoders[s], partial(pretrain, settings, index, seed=s, store=store)) for s in SEEDS]
    slowest = max(run["seconds"] for run in runs) / 60
    for s in SEEDS:
        if not (out / f"probe-{s}" / "probe.json").is_file():
            options = ProbeOptions(
                budgets=[Budget(fraction=fraction) for fraction in FRACTIONS],
                seeds=SUBSETS,
                baselines=s == SEEDS[0],  # untrained encoder and pixels do not depend on the pretraining seed
                store=store,
                overwrite=True,
            )
            probe(encoders[s], index, out / f"probe-{s}", options)

    values, differences = [], []
    for fraction in FRACTIONS:
        seeds, subsets = (SEEDS, SUBSETS) if fraction < 1 else (SEEDS[:1], SUBSETS[:1])
        statistics: dict[str, list[list[Statistic]]] = {TWIN: [], OURS: []}
        for arm, s in product(statistics, seeds):
            arm_options = {"encoder": encoders[s], "from_scratch": arm == TWIN, "label_fraction": fraction, "seed": s}
            folders = [out / f"{arm.replace(' ', '-')}-{fraction}-{s}-{t}" for t in subsets]
            cells: list[dict[str, Any]] = [{**arm_options, "subset_seed": t, "store": store} for t in subsets]
            runs += [
                run_once(cell_folder, partial(finetune, schedules[arm], index, **cell_options))
                for cell_folder, cell_options in zip(folders, cells, strict=True)
            ]
            statistics[arm].append([compute_auroc(read_cases(folder / "cases.parquet")) for folder in folders])
        for features, arm in PROBES.items():
            encoder_seeds = seeds if features == "encoder" else [SEEDS[0]] * len(seeds)
            statistics[arm] = [
                [read_probe_auroc(out / f"probe-{s}", features, fraction, t) for t in subsets] for s in encoder_seeds
            ]
        subjects = [row["subject"] for row in read_cases(folders[0] / "cases.parquet")[::2]]
        scores = {
            arm: [evaluate_statistic(c, len(subjects)) for row in grid for c in row] for arm, grid in statistics.items()
        }
        budget = f"{100 * fraction:g} % ({runs[-1]['labelled']} images)"
        values.append([budget, *map(format_spread, scores.values())])
        for arm in (OURS, PROBES["encoder"]):
            others = [other for other in statistics if other not in (OURS, PROBES["encoder"])]
            comparisons = [paired_difference(statistics[arm], statistics[other], subjects) for other in others]
            up_count = sum(a > b for a, b in zip(scores[arm], scores[TWIN], strict=True))
            differences.append([budget, arm, *map(format_difference, comparisons), f"{up_count} of {len(scores[arm])}"])
    hours = sum(run["seconds"] for run in runs) / 3600
    head = ["labels", "arm", *(f"against {other}" for other in others), "pairs above the twin"]
    tables = f"{format_markdown_table(['labels', *statistics], values)}\n\n{format_markdown_table(head, differences)}"
    text = f"{tables}\n\n{len(runs)} runs, {hours:.1f} hours; the slowest pretraining took {slowest:.0f} minutes."
    print(text)
    if not arguments.only_run:
        write_section(arguments.page, "xray table", text)


if __name__ == "__main__":
    main()
