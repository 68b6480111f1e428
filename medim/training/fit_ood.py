"""Statistics of a run's images for the out-of-distribution guard, written beside the weights when training ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student
from torch import nn

from medim.data.index.index import ImageRecord
from medim.data.loading.cohort import Cohort
from medim.files import write_bytes
from medim.inference.network import run_inference
from medim.inference.ood import (
    COUNT_NAMES,
    FALSE_POSITIVE_RATE,
    FEATURE_GROUPS,
    OOD_FILE,
    GaussianModel,
    LimitMethod,
    OODDetector,
    OODFeatures,
    PredictWithFeatures,
    ood_features,
    sampled_windows,
)
from medim.models.model import Model
from medim.models.ood_features import as_numpy_predictor
from medim.types import Array, Step, UserError, Volume

log = logging.getLogger(__name__)
MAX_IMAGES = 256  # that are looked at, of the training and of the validation split
MIN_TRAINING_SUBJECTS, MIN_HELD_OUT_SUBJECTS = 10, 3  # fewer say little of others, and much of themselves
MIN_DEVIATION = 0.02  # smallest deviation of an intensity or a length that counts, about 2 %


def save_ood_detector(folder: Path, network: nn.Module, cohort: Cohort, spec: dict[str, Any]) -> None:
    """Write `reference.npz`, or remove an old one and say why there is none.

    Args:
        folder: where the weights lie.
        network: an encoder or model.
        cohort: the training split gives the statistics, the validation split the limits.
        spec: the network's; see `medim.models.serialization`.
    """
    training = network.training
    try:
        data = _fit_from_cohort(network.eval(), cohort, spec).dump()
    except (UserError, RuntimeError, ValueError) as error:  # of torch where a network takes views but no whole image
        (folder / OOD_FILE).unlink(missing_ok=True)
        log.warning("no out-of-distribution guard: %s", error)
    else:
        write_bytes(folder / OOD_FILE, data)
    finally:
        network.train(training)


def _fit_from_cohort(network: nn.Module, cohort: Cohort, spec: dict[str, Any]) -> OODDetector:
    train, val = _select_across_subjects(cohort.records("train")), _select_across_subjects(cohort.records("val"))
    subjects, others = ([record.subject for record in records] for records in (train, val))
    n_subjects = len(set(subjects)), len(set(others))
    if n_subjects[0] < MIN_TRAINING_SUBJECTS or n_subjects[1] < MIN_HELD_OUT_SUBJECTS:
        raise UserError(
            f"expected {MIN_TRAINING_SUBJECTS} subjects or more to train on and {MIN_HELD_OUT_SUBJECTS} held out, "
            f"got {n_subjects[0]} and {n_subjects[1]}."
        )
    rows, held_out = (list(iterate_record_features(network, cohort, records, spec)) for records in (train, val))
    return fit_detector(rows, subjects, held_out, others)


def fit_detector(
    rows: Sequence[OODFeatures], subjects: Sequence[str], held_out: Sequence[OODFeatures], others: Sequence[str]
) -> OODDetector:
    """The statistics of training images, with limits from held-out ones.

    Args:
        rows: of the training images; see `medim.inference.ood.ood_features`.
        subjects: whose they are.
        held_out: of images of other subjects, whose distances set the limits.
        others: whose those are.
    """
    shapes = {
        part: fit_gaussian(np.stack([row[part] for row in rows]), MIN_DEVIATION if part != "features" else 0)
        for part in FEATURE_GROUPS
    }
    logs = np.stack(
        [
            np.log(np.maximum(shapes[part].mahalanobis_distance(np.stack([row[part] for row in held_out])), 1e-9))
            for part in FEATURE_GROUPS
        ],
        axis=1,
    )
    limits, method = conformal_thresholds(logs, others)
    parts = {
        part: GaussianModel(shape.mean, shape.scale, shape.precision, max(1.0, float(np.exp(limits[i]))))
        for i, (part, shape) in enumerate(shapes.items())
    }
    counts = (len(rows), len(set(subjects)), len(held_out), len(set(others)))
    return OODDetector(parts, dict(zip(COUNT_NAMES, counts, strict=True)), method)


def fit_gaussian(rows: Array, floor: float) -> GaussianModel:
    """Mean, deviations and the inverse of the correlation of rows (N, d), shrunk as Ledoit and Wolf (2004) say.

    Args:
        rows: of the training images.
        floor: smallest deviation, for numbers that hardly differ between the images.
    """
    mean = rows.mean(axis=0)
    spread = rows.std(axis=0)
    scale = np.maximum(spread, max(floor, 1e-6, 1e-3 * float(np.median(spread))))
    unit = (rows - mean) / scale
    count, d = unit.shape
    covariance = unit.T @ unit / count
    np.fill_diagonal(covariance, 1.0)  # also where the floor took the place of a smaller deviation
    level = np.trace(covariance) / d
    dispersion = float(((covariance - level * np.eye(d)) ** 2).sum())
    noise = float(((unit**2).sum(axis=1) ** 2).sum() / count**2 - (covariance**2).sum() / count)
    shrinkage = float(np.clip(noise / dispersion, 0, 1)) if dispersion > 1e-12 else 1.0
    estimate = (1 - shrinkage) * covariance + max(shrinkage * level, 1e-3) * np.eye(d)
    return GaussianModel(mean, scale, np.linalg.inv(estimate), 1.0)


def conformal_thresholds(scores: Array, subjects: Sequence[str]) -> tuple[Array, LimitMethod]:
    """Limits of which an image of a fresh subject exceeds any with probability `FALSE_POSITIVE_RATE`, or less.

    With enough subjects the conformal quantile for repeated measures (Lee, Barber and Willett 2023, "Distribution-free
    inference with hierarchical data") of the largest standardised score, which assumes nothing of their distribution.
    With fewer than 19 there is none; prediction limits of normal distributions take its place (Hahn and Meeker 1991,
    "Statistical Intervals"), with the probability divided among the parts (Bonferroni).

    Args:
        scores: (N, parts) log distances of held-out images.
        subjects: whose they are; each subject counts once, however many images it has.

    Returns:
        (parts,) limits, and how they came about.
    """
    count, parts = len(set(subjects)), scores.shape[1]
    weights = _compute_subject_weights(subjects)
    mean = weights @ scores
    deviation = np.sqrt(np.maximum(weights @ (scores - mean) ** 2 * count / (count - 1), 1e-12))
    largest = ((scores - mean) / deviation).max(axis=1)
    order = np.argsort(largest, kind="stable")
    place = int(np.searchsorted(np.cumsum(weights[order]) * count / (count + 1), 1 - FALSE_POSITIVE_RATE - 1e-9))
    if place < len(order):
        return mean + largest[order[place]] * deviation, "conformal"
    margin = float(student.ppf(1 - FALSE_POSITIVE_RATE / parts, count - 1)) * np.sqrt(1 + 1 / count)
    return mean + margin * deviation, "normal"


def _compute_subject_weights(subjects: Sequence[str]) -> Array:
    """(N,) summing to 1, the same for every subject."""
    _, place, counts = np.unique(np.asarray(subjects), return_inverse=True, return_counts=True)
    return np.asarray(1 / counts[place] / len(counts))


def iterate_record_features(
    network: nn.Module, cohort: Cohort, records: Sequence[ImageRecord], spec: dict[str, Any]
) -> Iterator[OODFeatures]:
    """What the guard would see of each image, from the store.

    Args:
        network: an encoder or model in evaluation mode.
        cohort: where the images lie.
        records: which.
        spec: the network's.
    """
    encoder = network.encoder if isinstance(network, Model) else network
    predictor, figures = as_numpy_predictor(encoder), cohort.quality_metrics()
    for record in records:
        image = cohort.store.load_volume(cohort.keys[record.image])
        yield ood_features(figures[record.image], image, window_features(predictor, image, spec["inference"]))


def window_features(predictor: PredictWithFeatures, image: Volume, inference: Step) -> Array:
    """What `medim.inference.ood.FeatureRecorder` would keep of an image; windows that it leaves out are not run.

    Args:
        predictor: the network.
        image: preprocessed.
        inference: see `medim.inference.network.run_inference`.
    """
    sample_places = set(sampled_windows(len(_map_windows(image, inference, lambda place, window: None))))
    outputs = _map_windows(
        image, inference, lambda place, window: predictor(window)[1][0] if place in sample_places else None
    )
    return np.asarray(np.mean([features for features in outputs if features is not None], axis=0))


def _map_windows(image: Volume, inference: Step, function: Callable[[int, Array], Any]) -> list[Any]:
    """What `function` gives for each window of an image, by number and voxels; no answer is made of them."""
    results: list[Any] = []

    def predict_blank(window: Array) -> Array:
        results.append(function(len(results), window))
        return np.zeros((len(window), 1, *window.shape[2:]), np.float32)

    run_inference(predict_blank, image, inference)
    return results


def _select_across_subjects(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """At most `MAX_IMAGES`: one image of every subject before any second one."""
    turns: dict[str, int] = {}
    ranking = []
    for place, record in enumerate(records):
        turns[record.subject] = turns.get(record.subject, 0) + 1
        ranking.append((turns[record.subject], place, record))
    return [record for *_, record in sorted(ranking, key=lambda item: item[:2])[:MAX_IMAGES]]
