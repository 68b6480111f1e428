"""Benefit of pretraining for hippocampus segmentation: a table of docs/results.md.

Three encoders are pretrained without labels. For each label budget and three label subsets, they are fine-tuned, and
the same network is trained from scratch with the same schedule. All are evaluated on the validation subjects. Finished
runs are kept, so the study can be interrupted and restarted.

    python pipelines/mri_hippocampus.py --data mri-hippocampus --out studies/mri --page docs/results.md
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from statistics import median

from evidence import (
    draw_losses,
    evaluate_statistic,
    format_difference,
    format_markdown_table,
    format_spread,
    read_dice,
    read_series,
    run_once,
    write_section,
)

from medim.config import load_config
from medim.data.index.index import build_index
from medim.study.statistics.intervals import paired_difference
from medim.training.finetune.run import finetune
from medim.training.pretrain.run import pretrain

SEEDS = SUBSETS = (0, 1, 2)
STEPS = {1: 300, 2: 300, 10: 300, 150: 600}  # label budget in volumes: training steps of both arms
ONE_PAIR = (150,)  # budgets with one encoder and one label subset
ARMS = ("from scratch", "pretrained")


def main() -> None:
    """Run all missing runs, and write table and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--only-run", action="store_true", help="do not write the page")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    index, out, store = build_index(arguments.data, "mri", keep_names=True), arguments.out, arguments.out / "store"

    settings = load_config("pretrain", "mri-crop")
    encoders = {seed: out / f"encoder-{seed}" for seed in SEEDS}
    summaries = [run_once(run, partial(pretrain, settings, index, seed=s, store=store)) for s, run in encoders.items()]

    rows, seconds = [], [summary["seconds"] for summary in summaries]
    for labelled, steps in STEPS.items():
        seeds, subsets = (SEEDS[:1], SUBSETS[:1]) if labelled in ONE_PAIR else (SEEDS, SUBSETS)
        schedule = load_config("finetune", "mri-crop-segmentation", [f"max_steps={steps}", "eval_steps=[20, 40, 80]"])
        grid = [(arm, s, t) for arm in ARMS for s in seeds for t in subsets]
        cells = {(arm, s, t): out / f"{arm.replace(' ', '-')}-{labelled}-{s}-{t}" for arm, s, t in grid}
        for (arm, s, t), run in cells.items():
            options = {"encoder": encoders[s], "from_scratch": arm == "from scratch", "seed": s, "subset_seed": t}
            summary = run_once(run, partial(finetune, schedule, index, labelled=labelled, store=store, **options))
            seconds.append(summary["seconds"])
        dice_scores = {cell: read_dice(run) for cell, run in cells.items()}
        subjects = next(iter(dice_scores.values()))[1]
        theirs, ours = ([[dice_scores[arm, s, t][0] for t in subsets] for s in seeds] for arm in ARMS)
        arm_scores = [
            [evaluate_statistic(dice_scores[arm, s, t][0], len(subjects)) for s in seeds for t in subsets]
            for arm in ARMS
        ]
        early_dice = {cell: dict(read_series(run)["held out val/dice"]) for cell, run in cells.items()}
        pairs = [(early_dice["pretrained", s, t], early_dice["from scratch", s, t]) for s in seeds for t in subsets]
        early_gains = [sum(a[n] - b[n] for a, b in pairs) / len(pairs) for n in (20, 40, 80)]
        pair_gains = [b - a for a, b in zip(*arm_scores, strict=True)]
        up_count = f"{sum(gain > 0 for gain in pair_gains)} of {len(pair_gains)}"
        difference = format_difference(paired_difference(ours, theirs, subjects))
        gain_text = " / ".join(f"{gain:+.3f}" for gain in early_gains)
        median_gain = f"{median(pair_gains):+.3f}"
        rows.append(
            [str(labelled), str(steps), *map(format_spread, arm_scores), difference, median_gain, up_count, gain_text]
        )
    head = ["volumes", "steps", *ARMS, "difference", "median pair", "pairs up", "difference at step 20 / 40 / 80"]
    slowest = max(summary["seconds"] for summary in summaries) / 60
    hours = f"{len(seconds)} runs, {sum(seconds) / 3600:.1f} hours; the slowest pretraining took {slowest:.0f} minutes."
    print(table := format_markdown_table(head, rows) + f"\n\n{hours}")
    if not arguments.only_run:
        write_section(arguments.page, "mri table", table)
        draw_losses(arguments.page.parent / "figures" / "mri-crop.svg", list(encoders.values()))


if __name__ == "__main__":
    main()
