"""Classification of hippocampus volume, with a field of view that does not reveal the size.

The label is the volume of the mask, above or below the median of the training subjects. Crops of this data set are cut
to the size of the hippocampus, so that the image size alone predicts the label. The audit before and after `centre`
measures this shortcut. A study then compares three encoders, pretrained without labels, with training from scratch at
each label budget. Finished runs are kept, so the study can be interrupted and restarted.

    python pipelines/mri_volume.py --data mri-hippocampus --out studies/mri-volume
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

import numpy as np
from evidence import format_markdown_table, run_once

from medim.config import load_config
from medim.data.index.index import Index, build_index
from medim.data.loading.cohort import open_cohort
from medim.data.loading.splits import assign_splits
from medim.evaluation.probing.label_budget import Budget
from medim.files import write_csv
from medim.study.audit.audit import Audit, audit, write_audit
from medim.study.design import read_arms
from medim.study.prepare import StudyOptions
from medim.study.run import study
from medim.training.pretrain.run import pretrain

BUDGETS, SEEDS, SUBSETS = (10, 40, 150), (0, 1, 2), 3
CLASSES = ("larger", "smaller")


def main() -> None:
    """Derive the labels, audit both fields of view, and run all missing runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoders", type=Path, nargs="+", help="default: pretrain three encoders of mri-crop")
    parser.add_argument(
        "--config", default="mri-crop-classification", help="fine-tuning preset with `centre` that fits the encoders"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only-audit", action="store_true", help="audit without training")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, schedule = arguments.out, load_config("finetune", arguments.config)
    index = build_index(
        arguments.data, "mri", labels=label_by_volume(arguments.data, out / "labels.csv"), keep_names=True
    )
    crop_steps = [step for step in schedule.preprocessing if step["op"] != "centre"]
    crops = audit_images(index, crop_steps, load_config("finetune", "mri-crop-segmentation").views.shape, out)
    common = audit_images(index, schedule.preprocessing, schedule.views.shape, out)
    write_audit(out, common)
    pairs = zip(crops.shortcuts, common.shortcuts, strict=True)
    rows = [
        [before.name, *(f"{entry.prediction.auroc['value']:.3f}" for entry in (before, after))]
        for before, after in pairs
    ]
    print(format_markdown_table(["AUROC of", "crops as they are", "one field of view"], rows))
    if arguments.only_audit:
        return

    settings, store = load_config("pretrain", "mri-crop"), out / "store"
    encoders = arguments.encoders or [out / f"encoder-{seed}" for seed in SEEDS]
    for seed, run in enumerate(encoders):
        run_once(run, partial(pretrain, settings, index, seed=seed, store=store))
    arms, budgets = read_arms([f"dim={','.join(map(str, encoders))}"]), [Budget(labelled=n) for n in BUDGETS]
    options = StudyOptions(seeds=SUBSETS, jobs=arguments.jobs, resume=True, store=store)
    study("classification", schedule, index, arms, budgets, out / "study", options)


def label_by_volume(data: Path, path: Path) -> Path:
    """Write label and split of each image; the label is the mask volume compared with the training median."""
    index = build_index(data, "mri", keep_names=True)
    splits = assign_splits(index, seed=0)
    masks = {record.image: index.open_mask(record) for record in index.records if record.mask}
    ml = {k: np.count_nonzero(m.array) * abs(np.linalg.det(m.affine[:3, :3])) / 1000 for k, m in masks.items()}
    median = np.median([volume for image, volume in ml.items() if splits[image] == "train"])
    rows = [(image, CLASSES[int(volume <= median)], splits[image]) for image, volume in ml.items()]
    write_csv(path, ("image", "label", "split"), rows)
    return path


def audit_images(index: Index, steps: list[dict[str, object]], window: tuple[int, ...], out: Path) -> Audit:
    """Audit the images after preprocessing."""
    cohort = open_cohort(index, index.records, steps, split_seed=0, store=out / "store")
    return audit(cohort, kind="classifier", classes=CLASSES, window=window)


if __name__ == "__main__":
    main()
