"""Question: how much Dice do crops around foreground add at equal steps, for lesions of 10 mm, from scratch?

The cohort is simulated: cubes of 96 mm at 2 mm with correlated texture, one to three bright spheres of 10 mm diameter
(the lesions, 0.06 % of the voxels each), and six bright rods of 5 mm diameter with the same contrast (vessels, which
belong to the background). Brightness alone therefore does not separate the lesions. A network from random weights
learns from crops of 32 mm, 4 % of an image, with the batch size, learning rate and head of the preset mri-segmentation.
The arms differ in `views.foreground_share` only: 0, and 0.33 as in nnU-Net. Both arms draw the same images and
augmentation seeds, and the same positions for the crops that are not around foreground.

Planned analysis: three seeds (weights and batches) and two subsets of 10 labelled subjects, crossed; splits by subject;
mean Dice of the 20 validation subjects after the last step; paired difference with its 95 % interval over seeds,
subsets and subjects (`medim.study.statistics.intervals`). The schedule was chosen with seed 10 and subset 10, which are
not used here. Finished runs are kept, and an interrupted run is resumed.

    OMP_NUM_THREADS=1 nice python benchmarks/lesion_crops.py --out lesion-crops
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

from medim.config import FinetuneConfig, check_config
from medim.data.index.index import Index, build_index
from medim.evaluation.cases import read_cases
from medim.files import read_json, write_csv, write_json
from medim.metrics.bootstrap import Scores, compute_scores, draw_resamples, weighted_mean
from medim.study.statistics.intervals import Comparison, compare_to_scratch, compute_interval
from medim.training.finetune.run import finetune
from medim.types import Array

SEEDS, SUBSETS, BUDGET = (0, 1, 2), (0, 1), 10
SUBJECTS, SIDE, SPACING = 100, 48, 2.0  # voxels per side, and mm per voxel
LESION_RADIUS, ROD_RADIUS, RODS, CONTRAST = 5.0, 2.5, 6, 3.0  # mm; contrast in standard deviations of the texture
SHARES = {"uniform": 0.0, "foreground": 0.33}
CONFIG: dict[str, Any] = {
    "task": "segmentation",
    "modality": "mri",
    "preprocessing": [{"op": "normalise", "method": "zscore"}],
    "views": {
        "shape": [16, 16, 16],
        "augmentations": [
            {"op": "flip"},
            {"op": "contrast", "probability": 0.3},
            {"op": "intensity_scale", "probability": 0.5},
            {"op": "noise", "probability": 0.2},
        ],
    },
    "encoder": {"name": "unet", "channels": [8, 16, 32], "norm": "in", "summary_channels": 16},
    "decoder": {"name": "unet", "norm": "in"},
    "head": {"name": "segmentation"},
    "inference": {"mode": "sliding", "roi": [16, 16, 16], "overlap": 0.0},
    "max_steps": 600,
    "batch_size": 4,
    "lr": 0.01,
    "warmup_steps": 20,
    "checkpoint_every_steps": 200,
    "head_init": "probe",
}


def main() -> None:
    """Run all missing runs; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--subsets", type=int, nargs="+", default=SUBSETS)
    parser.add_argument("--steps", type=int, default=CONFIG["max_steps"])
    arguments = parser.parse_args()
    out: Path = arguments.out
    logging.getLogger("medim").setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(out / 'mlflow.db').resolve()}")
    content = run_lesion_study(out, seeds=arguments.seeds, subsets=arguments.subsets, steps=arguments.steps)
    write_json(out / "lesion-crops.json", content)
    print(format_tables(content))


def run_lesion_study(
    out: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    subsets: Sequence[int] = SUBSETS,
    steps: int = CONFIG["max_steps"],
    subjects: int = SUBJECTS,
) -> dict[str, Any]:
    """Train all missing runs, and compare the Dice of both arms, paired over seeds, label subsets and subjects."""
    index = build_index(write_cohort(out / "source", subjects), "mri", remember=False)
    cells = list(product(seeds, subsets))
    for (s, t), arm in product(cells, SHARES):
        train_cell(out, arm, index, seed=s, subset=t, steps=steps)
    scores = {arm: score_arm(out, arm, seeds, subsets) for arm in SHARES}
    [comparison] = compare_to_scratch({("foreground", str(BUDGET)): (scores["foreground"], scores["uniform"])})
    return {
        "steps": steps,
        "arms": [describe_arm(out, arm, scores[arm], cells) for arm in SHARES],
        "comparison": describe_comparison(comparison, scores),
    }


def train_cell(out: Path, arm: str, index: Index, *, seed: int, subset: int, steps: int) -> None:
    """Train and measure one run, unless it is complete."""
    run = locate_run(out, arm, seed, subset)
    if (run / "summary.json").is_file():
        return
    finetune(
        build_lesion_config(SHARES[arm], steps),
        index,
        run,
        labelled=BUDGET,
        seed=seed,
        subset_seed=subset,
        store=out / "store",
        resume=True,
        fit_ood_detector=False,
    )
    shutil.rmtree(run / "checkpoints")


def locate_run(out: Path, arm: str, seed: int, subset: int) -> Path:
    """Build the path of the folder of a run."""
    return out / f"{arm}-{seed}-{subset}"


def build_lesion_config(share: float, steps: int = CONFIG["max_steps"]) -> FinetuneConfig:
    """Build the configuration of an arm."""
    views = {**CONFIG["views"], "foreground_share": share}
    schedule = {"max_steps": steps, "warmup_steps": min(CONFIG["warmup_steps"], steps)}
    config = check_config("finetune", {**CONFIG, "views": views, **schedule}, source=f"the configuration of {__file__}")
    assert isinstance(config, FinetuneConfig)
    return config


def read_column(run: Path, column: str) -> dict[str, float]:
    """Read a column of the results of each validation subject."""
    return {row["subject"]: float(row[column]) for row in read_cases(run / "cases.parquet")}


def score_arm(out: Path, arm: str, seeds: Sequence[int], subsets: Sequence[int]) -> Scores:
    """Compute the mean Dice of each run of an arm on resampled subjects."""
    values = [[read_column(locate_run(out, arm, s, t), "dice") for t in subsets] for s in seeds]
    return compute_scores(
        [[weighted_mean(list(dice.values())) for dice in row] for row in values], draw_resamples(list(values[0][0]))
    )


def describe_arm(out: Path, arm: str, scores: Scores, cells: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Describe an arm: mean Dice with its interval, range of the runs, cases without any overlap, and volumes."""
    interval = compute_interval(scores, (0.0, 1.0))
    runs = [locate_run(out, arm, s, t) for s, t in cells]
    columns = {
        name: np.array([list(read_column(run, name).values()) for run in runs])
        for name in ("dice", "truth_ml", "predicted_ml")
    }
    run_means = columns["dice"].mean(axis=1)
    return {
        "arm": arm,
        "dice": interval.value,
        "low": interval.low,
        "high": interval.high,
        "lowest_run": float(run_means.min()),
        "highest_run": float(run_means.max()),
        "cases_at_zero": float((columns["dice"] == 0).mean()),
        "truth_ml": float(columns["truth_ml"].mean()),
        "predicted_ml": float(columns["predicted_ml"].mean()),
        "seconds": float(np.mean([read_json(run / "summary.json")["seconds"] for run in runs])),
    }


def describe_comparison(comparison: Comparison, scores: dict[str, Scores]) -> dict[str, Any]:
    """Describe the paired difference of the arms."""
    gap = comparison.difference
    pairs = scores["foreground"].values[..., 0] - scores["uniform"].values[..., 0]
    return {
        "difference": gap.value,
        "low": gap.low,
        "high": gap.high,
        "p": comparison.p,
        "verdict": comparison.verdict,
        "pairs_up": f"{int((pairs > 0).sum())} of {pairs.size}",
    }


def format_tables(content: dict[str, Any]) -> str:
    """Format the results as the Markdown of docs/results.md."""
    lines = ["| crops | Dice | lowest and highest run | cases without overlap | predicted and true volume |"]
    lines.append("| --- | --- | --- | --- | --- |")
    lines += [
        f"| {row['arm']} | {row['dice']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | {row['lowest_run']:.3f}, "
        f"{row['highest_run']:.3f} | {100 * row['cases_at_zero']:.0f} % | {row['predicted_ml']:.2f}, "
        f"{row['truth_ml']:.2f} ml |"
        for row in content["arms"]
    ]
    gap = content["comparison"]
    lines += ["", f"Difference **{gap['difference']:+.3f}** [{gap['low']:+.3f}, {gap['high']:+.3f}], "]
    lines[-1] += f"p = {gap['p']:.2g}, {gap['pairs_up']} pairs up: {gap['verdict']}."
    return "\n".join(lines)


def write_cohort(folder: Path, subjects: int) -> Path:
    """Write the cohort in the layout of the Medical Segmentation Decathlon, one image per subject."""
    if (folder / "dataset.json").is_file():
        return folder
    names = [f"lesion_{number:03d}.nii.gz" for number in range(subjects)]
    for number, name in enumerate(names):
        for part, array in zip(("imagesTr", "labelsTr"), simulate_lesions(number), strict=True):
            (folder / part).mkdir(parents=True, exist_ok=True)
            affine = np.diag([SPACING, SPACING, SPACING, 1.0])
            nibabel.save(nibabel.Nifti1Image(array, affine), folder / part / name)  # type: ignore[no-untyped-call]
    write_csv(folder / "subjects.csv", ("image", "subject"), [(name, f"EX-{i:03d}") for i, name in enumerate(names)])
    content = {
        "name": "lesions",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "lesion"},
        "numTraining": subjects,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
    }
    write_json(folder / "dataset.json", content)
    return folder


def simulate_lesions(number: int) -> tuple[Array, Array]:
    """Simulate one subject.

    Args:
        number: number of the subject, the random seed.

    Returns:
        Image, int16, and mask, uint8 (1: lesion); (48, 48, 48) each.
    """
    rng = np.random.default_rng([2026, number])
    shape = (SIDE,) * 3
    points = np.stack(np.meshgrid(*[SPACING * np.arange(SIDE)] * 3, indexing="ij"))  # mm
    textures = [scale_to_unit(ndimage.gaussian_filter(rng.standard_normal(shape), s)) for s in (1.0, 2.5, 6.0)]
    image = scale_to_unit(np.sum(textures, axis=0)) + 0.3 * rng.standard_normal(shape)
    margin, extent = LESION_RADIUS + SPACING, SPACING * (SIDE - 1)
    mask = np.zeros(shape, bool)
    for _ in range(rng.integers(1, 4)):
        centre = rng.uniform(margin, extent - margin, 3)
        mask |= ((points - centre.reshape(3, 1, 1, 1)) ** 2).sum(0) < LESION_RADIUS**2
    rods = np.zeros(shape, bool)
    for _ in range(RODS):
        direction = rng.standard_normal(3)
        direction /= np.linalg.norm(direction)
        offsets = points - rng.uniform(0, extent, 3).reshape(3, 1, 1, 1)
        along = np.tensordot(direction, offsets, axes=1)
        rods |= ((offsets**2).sum(0) - along**2 < ROD_RADIUS**2) & (np.abs(along) < rng.uniform(15, 40))
    image = image + CONTRAST * rng.uniform(0.8, 1.2) * ndimage.gaussian_filter((mask | rods).astype(float), 0.4)
    return np.rint(rng.uniform(80, 120) * (image + 10)).astype(np.int16), mask.astype(np.uint8)


def scale_to_unit(values: Array) -> Array:
    """Scale to mean 0 and standard deviation 1."""
    return np.asarray((values - values.mean()) / values.std())


if __name__ == "__main__":
    main()
