"""Twins of the hippocampus study that lost a class, with more steps or another loss: a table of docs/results.md.

Seed 0 and label subset 0, with 1 and 10 volumes, in both arms. Finished runs are kept, so the script can be interrupted
and restarted; an interrupted run continues from its checkpoint.

    python pipelines/lost_class.py --data mri-hippocampus --out studies/lost-class --page docs/results.md
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

from evidence import evaluate_statistic, format_markdown_table, read_dice, run_once, write_section

from medim.config import load_config
from medim.data.index.index import build_index
from medim.evaluation.cases import read_cases
from medim.reports.page import format_recall
from medim.tasks import TASKS
from medim.training.finetune.lost_classes import LOST_RECALL
from medim.training.finetune.run import finetune
from medim.training.pretrain.run import pretrain

SEED = SUBSET = 0
ARMS = ("from scratch", "pretrained")
BUDGETS = (1, 10)  # labelled volumes
STEPS = (300, 600)  # of the published study, and twice as many
LOSSES = {  # options of the head for the from-scratch arm with the published steps
    "Dice of each image": "head.dice=image",
    "balanced class weights": "head.class_weights=balanced",
}
CLASSES = ("Anterior", "Posterior")
Cell = tuple[str, int, int, str]  # arm, labelled volumes, steps, entry of LOSSES or empty


def main() -> None:
    """Run all missing runs, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="page whose table is replaced; none: the table is only printed")
    parser.add_argument("--only-table", action="store_true", help="start no run; the table has the finished ones")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cells: list[Cell] = [(arm, labelled, steps, "") for arm in ARMS for steps in STEPS for labelled in BUDGETS]
    cells += [(ARMS[0], labelled, STEPS[0], loss) for labelled in reversed(BUDGETS) for loss in LOSSES]
    cells.sort(key=lambda cell: cell[0] != ARMS[0])  # the pretrained arm last
    runs = {cell: arguments.out / "-".join(map(str, filter(None, cell))).replace(" ", "-") for cell in cells}
    if not arguments.only_table:
        run_missing(arguments.data, arguments.out, runs)
    finished = {cell: run for cell, run in runs.items() if (run / "summary.json").is_file()}
    rows = [
        [str(labelled), arm, str(steps), loss or "as published", *describe_run(run)]
        for (arm, labelled, steps, loss), run in sorted(
            finished.items(), key=lambda item: (item[0][1], cells.index(item[0]))
        )
    ]
    head = ["volumes", "arm", "steps", "loss", "Dice", *(f"Dice, {name.lower()}" for name in CLASSES), "lost class"]
    print(table := format_markdown_table(head, rows))
    if arguments.page:
        write_section(arguments.page, "lost class table", table)


def run_missing(data: Path, out: Path, runs: dict[Cell, Path]) -> None:
    """Run what is not finished: the from-scratch arm, the encoder, and the pretrained arm."""
    index, store, encoder = build_index(data, "mri", keep_names=True), out / "store", out / f"encoder-{SEED}"
    for (arm, labelled, steps, loss), run in runs.items():
        initial_weights = {}
        if arm == "pretrained":
            run_once(encoder, partial(pretrain, load_config("pretrain", "mri-crop"), index, seed=SEED, store=store))
            initial_weights["encoder"] = encoder
        assignments = [f"max_steps={steps}", *([LOSSES[loss]] if loss else [])]
        config = load_config("finetune", "mri-crop-segmentation", assignments)
        start = partial(finetune, config, index, labelled=labelled, seed=SEED, subset_seed=SUBSET, store=store)
        run_once(run, partial(start, fit_ood_detector=False, **initial_weights))


def describe_run(run: Path) -> list[str]:
    """Format the mean Dice of the validation cases, that of each class, and the class that is lost."""
    statistic, subjects = read_dice(run)
    rows = read_cases(run / "cases.parquet")
    dice = [[row["dice"] for row in rows if row["class"] == name] for name in CLASSES]
    recalls = TASKS["segmentation"].measure_recalls(rows, CLASSES)
    lost = [
        f"{name.lower()} ({format_recall(recall)} of its voxels found)"
        for name, recall in recalls.items()
        if recall < LOST_RECALL
    ]
    means = [evaluate_statistic(statistic, len(subjects)), *(sum(values) / len(values) for values in dice)]
    return [*(f"{mean:.3f}" for mean in means), ", ".join(lost)]


if __name__ == "__main__":
    main()
