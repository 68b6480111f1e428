"""Sensitivity of the out-of-distribution detector of a hippocampus network: a table of docs/results.md.

For each run, images of the validation subjects are compared with other images: AUROC of the score, and fraction of
flagged images. Validation images are scored with limits from the other validation subjects. Every second validation
image is also transformed. Boxes of the same size in mm are cut at random from whole series. The score is compared with
the AUROC of its features alone, of the encoder's summary alone, and of the distance to the fifth nearest training image
(Sun et al. 2022, "Out-of-Distribution Detection with Deep Nearest Neighbors").

    python pipelines/ood_detection.py --data mri-hippocampus --dicom mri-dicom --out studies/ood
        --runs studies/mri/pretrained-150-0-0 studies/mri/encoder-0 --page docs/results.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from evidence import format_markdown_table, write_section
from sklearn.metrics import roc_auc_score
from torch import nn

from medim.data.index.index import Index, build_index
from medim.data.loading.cohort import open_cohort
from medim.data.preprocessing.quality import measure_quality
from medim.data.preprocessing.steps import preprocess
from medim.files import read_json, write_json
from medim.inference.network import run_inference
from medim.inference.ood import FeatureRecorder, OODDetector, OODFeatures, OODResult, ood_features
from medim.model_spec import ModelSpec
from medim.models.ood_features import as_numpy_predictor
from medim.models.serialization import load_encoder, load_model, locate_weights
from medim.training.fit_ood import fit_detector, fit_gaussian, iterate_record_features
from medim.types import Array, Volume

BOXES = 24  # number of boxes per series
SERIES = {"FLAIR": "boxes of FLAIR", "T2reg": "boxes of T2", "T1post": "other boxes of T1"}


def main() -> None:
    """Measure all runs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dicom", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--page", type=Path, help="page into which the table is written")
    arguments = parser.parse_args()
    index, dicom = (
        build_index(arguments.data, "mri", keep_names=True),
        build_index(arguments.dicom, "mri", keep_names=True),
    )
    results = {}
    for run in arguments.runs:
        kind = locate_weights(run)[1].kind
        file = arguments.out / f"{kind}.json"
        if not file.is_file():
            write_json(file, {"schema_version": 1, **measure_run(run, index, dicom, arguments.out / "store")})
        results[kind] = read_json(file)
    table = "\n\n".join(_format_ood_table(kind, run) for kind, run in results.items())
    print(table)
    if arguments.page:
        write_section(arguments.page, "ood table", table)


def measure_run(run: Path, index: Index, dicom: Index, store: Path) -> dict[str, Any]:
    """Measure false positive rates and AUROCs of the OOD detector of a run."""
    spec = locate_weights(run)[1]
    network = load_encoder(run) if spec.is_encoder else load_model(run)[0]
    steps, split_seed = spec.preprocessing, spec.provenance.split_seed or 0
    cohort = open_cohort(index, index.records, steps, split_seed=split_seed, store=store)
    start = time.perf_counter()
    train, val = cohort.records("train"), cohort.records("val")
    rows, val_rows = (list(iterate_record_features(network, cohort, records, spec)) for records in (train, val))
    subjects, val_subjects = ([record.subject for record in records] for records in (train, val))
    detector = fit_detector(rows, subjects, val_rows, val_subjects)
    seconds = time.perf_counter() - start
    val_results = _score_left_out(rows, subjects, val_rows, val_subjects)
    alarm_subjects = {subject for subject, verdict in zip(val_subjects, val_results, strict=True) if verdict.ood}
    encoder: Any = getattr(network, "encoder", network)
    rival_scores = _build_rival_scores(rows, encoder.summary_channels)
    sets: dict[str, Any] = {}
    for name, volumes in _iter_other_images(index, dicom, [record.image for record in val][::2]):
        other_rows = [_compute_ood_rows(volume, network, spec) for volume in volumes]
        sets[name] = _compare_with_validation(val_results, [detector.score(row) for row in other_rows])
        sets[name] |= {
            rival: _compute_ood_auroc(distance(val_rows), distance(other_rows))
            for rival, distance in rival_scores.items()
        }
        print(spec.kind, name, sets[name], flush=True)
    return {
        "reference": {
            **detector.counts,
            "method": detector.method,
            "bytes": len(detector.dump()),
            "seconds": seconds,
        },
        "false_alarms": {
            "images": float(np.mean([verdict.ood for verdict in val_results])),
            "subjects": len(alarm_subjects),
            "of_the_splits_own_limits": float(np.mean([detector.score(row).ood for row in val_rows])),
        },
        "others": sets,
    }


def _score_left_out(
    rows: Sequence[OODFeatures], subjects: Sequence[str], val_rows: Sequence[OODFeatures], val_subjects: Sequence[str]
) -> list[OODResult]:
    """Score each validation image with limits from the other validation subjects."""
    detectors: dict[str, OODDetector] = {}
    for subject in set(val_subjects):
        indices = [index for index, other in enumerate(val_subjects) if other != subject]
        detectors[subject] = fit_detector(
            rows, subjects, [val_rows[i] for i in indices], [val_subjects[i] for i in indices]
        )
    return [detectors[subject].score(row) for subject, row in zip(val_subjects, val_rows, strict=True)]


def _compute_ood_rows(volume: Volume, network: nn.Module, spec: ModelSpec) -> OODFeatures:
    recorder, image = FeatureRecorder(as_numpy_predictor(network)), preprocess(volume, spec.preprocessing)
    run_inference(recorder, image, spec.inference)
    return ood_features(measure_quality(volume), image, recorder.features)


def _build_rival_scores(
    rows: Sequence[OODFeatures], summary: int
) -> dict[str, Callable[[Sequence[OODFeatures]], list[float]]]:
    """Build alternative scores: distances of images to the training images."""
    train = np.stack([row["features"] for row in rows])
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)

    def build_mahalanobis(count: int) -> Callable[[Sequence[OODFeatures]], list[float]]:
        gaussian = fit_gaussian(train[:, :count], 0)
        return lambda images: [float(gaussian.mahalanobis_distance(row["features"][None, :count])[0]) for row in images]

    def measure_neighbour_distance(images: Sequence[OODFeatures]) -> list[float]:
        return [
            float(np.sort(np.linalg.norm(unit - x / np.linalg.norm(x), axis=1))[4]) for x in map(_get_features, images)
        ]

    return {
        "features alone": build_mahalanobis(train.shape[1]),
        "summary alone": build_mahalanobis(summary),
        "neighbours": measure_neighbour_distance,
    }


def _get_features(row: OODFeatures) -> Array:
    return row["features"]


def _compare_with_validation(val_results: Sequence[OODResult], other_results: Sequence[OODResult]) -> dict[str, Any]:
    scores = [[float(verdict.score or 0) for verdict in verdicts] for verdicts in (val_results, other_results)]
    return {
        "images": len(other_results),
        "auroc": _compute_ood_auroc(*scores),
        "flagged": float(np.mean([verdict.ood for verdict in other_results])),
        "median_score": float(np.median(scores[1])),
    }


def _compute_ood_auroc(val_scores: Sequence[float], other_scores: Sequence[float]) -> float:
    return float(roc_auc_score([0] * len(val_scores) + [1] * len(other_scores), [*val_scores, *other_scores]))


def _iter_other_images(index: Index, dicom: Index, images: Sequence[str]) -> Iterator[tuple[str, list[Volume]]]:
    """Iterate over sets of images that differ from the training images, with a name for each set."""
    volumes = [index.open(record) for record in index.records if record.image in set(images)]
    rng = np.random.default_rng(0)
    sizes = [np.multiply(volume.shape, volume.spacing) for volume in volumes]
    for record in dicom.records:
        for part, name in SERIES.items():
            if part in record.image:
                yield name, _cut_boxes(dicom.open(record), sizes, rng)
    for name, move in _build_moves(rng).items():
        yield name, [move(volume) for volume in volumes]
    crops = [dicom.open(record) for record in dicom.records if "HCropVolume" in record.image]
    yield "T1 hippocampus crops of another hospital", crops


def _build_moves(rng: np.random.Generator) -> dict[str, Callable[[Volume], Volume]]:
    """Build the transformations of validation images by name."""
    moves: dict[str, Callable[[Volume], Volume]] = {
        "unmoved, to compare": lambda v: v,
        "noise": lambda v: v.with_array(rng.normal(v.array.mean(), v.array.std(), v.array.shape).astype(np.float32)),
        "inverted": lambda v: v.with_array(v.array.max() - v.array),
    }
    for axis, name in enumerate(("left and right", "front and back", "up and down"), start=1):
        moves[f"flipped {name}"] = partial(_flip_volume, axis)
    moves["two axes exchanged"] = lambda v: v.with_array(v.array.transpose(0, 1, 3, 2).copy())
    for factor in ((0.5,) * 3, (0.8,) * 3, (1.25,) * 3, (1.5,) * 3, (1.0, 1.0, 2.0)):
        text = " x ".join(f"{f:g}" for f in factor) if len(set(factor)) > 1 else f"{factor[0]:g}"
        moves[f"header says spacing x {text}"] = partial(_scale_spacing, factor)
    return moves


def _flip_volume(axis: int, volume: Volume) -> Volume:
    return volume.with_array(np.flip(volume.array, axis).copy())


def _scale_spacing(factor: Sequence[float], volume: Volume) -> Volume:
    affine = volume.affine @ np.diag([*factor, 1.0])
    return Volume(volume.array, affine, affine, volume.native_shape)


def _cut_boxes(volume: Volume, sizes: Sequence[Array], rng: np.random.Generator) -> list[Volume]:
    """Cut random boxes from a series; at least half of each box is inside the head."""
    bright = volume.array > 0.15 * np.percentile(volume.array, 99)
    boxes: list[Volume] = []
    while len(boxes) < BOXES:
        shape = np.minimum(np.rint(sizes[len(boxes) % len(sizes)] / volume.spacing), volume.shape).astype(int)
        start = rng.integers(0, np.subtract(volume.shape, shape) + 1)
        box = (slice(None), *(slice(a, a + n) for a, n in zip(start, shape, strict=True)))
        if bright[box].mean() < 0.5:
            continue
        affine = volume.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        boxes.append(Volume(volume.array[box].copy(), affine, affine, tuple(shape.tolist())))
    return boxes


def _format_ood_table(kind: str, run: dict[str, Any]) -> str:
    head = [kind, "images", "AUROC", "features alone", "summary alone", "neighbours", "flagged"]
    rows = []
    for name, other in run["others"].items():
        aurocs = [f"{other[key]:.3f}" for key in ("auroc", "features alone", "summary alone", "neighbours")]
        rows.append([name, str(other["images"]), *aurocs, f"{100 * other['flagged']:.0f} %"])
    count, alarms = run["reference"]["held_out_images"], run["false_alarms"]["images"]
    rows.append(["*validation images, limits from the others*", str(count), "", "", "", "", f"{100 * alarms:.1f} %"])
    return format_markdown_table(head, rows)


if __name__ == "__main__":
    main()
