"""Claim: a study detects a planted benefit, and none if pretraining cannot learn from its images.

Blocks of all scans of the built-in cohort are blanked. The task is to predict for each voxel whether it was bright
before blanking, from one labelled scan and few steps. A network that was pretrained to reconstruct hidden blocks can
solve the task; training from scratch is too short to learn the reconstruction. The control is pretrained for the same
number of steps on the same scans with shuffled voxels, a different permutation for each scan, so that hidden voxels
cannot be predicted from visible ones. Finished runs are kept, so the benchmark can be interrupted and restarted.

    OMP_NUM_THREADS=1 python benchmarks/planted_truth.py --out planted-truth
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np

from medim.config import check_config
from medim.data.example.cohort import make_example
from medim.data.index.index import Index, build_index
from medim.evaluation.cases import read_cases
from medim.files import read_json, write_json
from medim.metrics.bootstrap import Scores, compute_scores, draw_resamples, weighted_mean
from medim.study.statistics.intervals import Comparison, compare_to_scratch
from medim.training.finetune.run import finetune
from medim.training.pretrain.run import pretrain
from medim.types import Array

SEEDS, SUBSETS, BUDGET = (0, 1, 2), (0, 1, 2), 1
SUBJECTS, SPACING = 40, 8.0  # mm
BLOCK, HIDDEN = 4, 0.5  # edge length of a block in voxels, and fraction of blanked blocks
ARMS = ("pretrained", "shuffled")
SHARED: dict[str, Any] = {
    "modality": "mri",
    "preprocessing": [{"op": "clip_percentiles"}, {"op": "normalise", "method": "zscore"}],
    "encoder": {"name": "unet", "channels": [8, 16, 32], "norm": "in", "summary_channels": 16},
    "decoder": {"name": "unet", "norm": "in"},
    "views": {"shape": [24, 28, 24]},
    "batch_size": 4,
    "warmup_steps": 5,
}
PRETRAIN: dict[str, Any] = {
    "objectives": [{"name": "reconstruction", "mask_patch_size": BLOCK, "mask_ratio": HIDDEN}],
    "max_steps": 200,
    "lr": 0.004,
}
FINETUNE: dict[str, Any] = {
    "task": "segmentation",
    "head": {"name": "segmentation"},
    "inference": {"mode": "whole", "multiple_of": 4},
    "max_steps": 20,
    "lr": 0.004,
    "pretrained_lr_scale": 0.3,
    "head_init": "probe",
}


def main() -> None:
    """Run all missing runs; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    logging.getLogger("medim").setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(out / 'mlflow.db').resolve()}")
    rows = [describe_comparison(comparison) for comparison in run_planted_study(out)]
    for row in rows:
        print("\t".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    write_json(out / "planted-truth.json", {"comparisons": rows})


def describe_comparison(comparison: Comparison) -> dict[str, Any]:
    """Convert a comparison to the row that is printed and written."""
    gap = comparison.difference
    ends = {"difference": gap.value, "low": gap.low, "high": gap.high, "p_corrected": comparison.p_corrected}
    return {"arm": comparison.arm, **ends, "verdict": comparison.verdict}


def run_planted_study(out: Path) -> list[Comparison]:
    """Compare the Dice of both arms with training from scratch, paired over encoders, label subsets and subjects."""
    if not (out / "source" / "nifti" / "dataset.json").is_file():
        make_example(out / "source", subjects=SUBJECTS, spacing=SPACING, overwrite=True)
    source = out / "source" / "nifti"
    folders = (
        source,
        rewrite_images(source, out / "shuffled", shuffle_voxels),
        rewrite_images(source, out / "task", blank_blocks),
    )
    *unlabelled, task = (build_index(folder, "mri", remember=False) for folder in folders)
    encoders = {}
    for arm, index in zip(ARMS, unlabelled, strict=True):
        for s in SEEDS:
            run = encoders[arm, s] = out / f"encoder-{arm}-{s}"
            if not (run / "summary.json").is_file():
                pretrain(build_planted_config("pretrain"), index, run, seed=s, store=out / "store", resume=True)
    scores = {arm: score_planted_arm(out, arm, task, encoders) for arm in (*ARMS, "scratch")}
    return compare_to_scratch({(arm, str(BUDGET)): (scores[arm], scores["scratch"]) for arm in ARMS})


def score_planted_arm(out: Path, arm: str, index: Index, encoders: dict[tuple[str, int], Path]) -> Scores:
    """Compute the Dice of each run of an arm on resampled subjects."""
    dice_values: dict[tuple[int, int], dict[tuple[str, str], list[float]]] = {}
    for s, t in product(SEEDS, SUBSETS):
        run, encoder = out / f"{arm}-{s}-{t}", encoders.get((arm, s), encoders[ARMS[0], s])
        if not (run / "summary.json").is_file():
            options: dict[str, Any] = {
                "encoder": encoder,
                "from_scratch": arm == "scratch",
                "seed": s,
                "subset_seed": t,
            }
            finetune(
                build_planted_config("finetune"),
                index,
                run,
                labelled=BUDGET,
                store=out / "store",
                resume=True,
                **options,
            )
            shutil.rmtree(run / "checkpoints")
        dice_values[s, t] = {}
        for row in read_cases(run / "cases.parquet"):
            dice_values[s, t].setdefault((row["image"], row["subject"]), []).append(row["dice"])
    resamples = draw_resamples([subject for _, subject in dice_values[0, 0]])
    return compute_scores(
        [[weighted_mean([float(np.mean(v)) for v in dice_values[s, t].values()]) for t in SUBSETS] for s in SEEDS],
        resamples,
    )


def rewrite_images(source: Path, out: Path, change: Callable[[Array, int], tuple[Array, Array]]) -> Path:
    """Copy a Decathlon folder with modified voxels of images and masks; file names do not change."""
    if not (out / "dataset.json").is_file():
        shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("dataset.json", "labels.csv"))
        for number, path in enumerate(sorted((source / "imagesTr").glob("*.nii.gz"))):
            image: Any = nibabel.load(path)
            for folder, array in zip(("imagesTr", "labelsTr"), change(np.asarray(image.dataobj), number), strict=True):
                nibabel.save(nibabel.Nifti1Image(array, image.affine), out / folder / path.name)  # type: ignore[no-untyped-call]
        content = {**read_json(source / "dataset.json"), "labels": {"0": "background", "1": "bright"}}
        write_json(out / "dataset.json", content)
    return out


def shuffle_voxels(voxels: Array, seed: int) -> tuple[Array, Array]:
    """Permute the voxels of an image; the mask is empty."""
    permutation = np.random.default_rng(seed).permutation(voxels.ravel()).reshape(voxels.shape)
    return permutation, np.zeros(voxels.shape, np.uint8)


def blank_blocks(voxels: Array, seed: int) -> tuple[Array, Array]:
    """Set blocks of an image to its mean; the mask marks voxels that were brighter than the mean."""
    mean = voxels.mean()
    coarse = np.random.default_rng(seed).random([-(-n // BLOCK) for n in voxels.shape]) < HIDDEN
    mask = np.kron(coarse, np.ones([BLOCK] * 3, bool))[tuple(slice(n) for n in voxels.shape)]
    return np.where(mask, mean, voxels).astype(np.float32), (voxels > mean).astype(np.uint8)


def build_planted_config(command: Literal["pretrain", "finetune"]) -> Any:
    """Build the configuration of pretraining or fine-tuning."""
    section = PRETRAIN if command == "pretrain" else FINETUNE
    return check_config(
        command,
        {**SHARED, **section, "checkpoint_every_steps": section["max_steps"]},
        source=f"the {command} of {__file__}",
    )


if __name__ == "__main__":
    main()
