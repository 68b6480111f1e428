"""Fit the out-of-distribution detector of a network to the images of its run, at the end of training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student
from sklearn.covariance import ledoit_wolf
from torch import nn

from medim.console.progress import show_progress
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
from medim.model_spec import ModelSpec
from medim.models.model import Model, as_numpy_function
from medim.models.ood_features import as_numpy_predictor
from medim.types import Array, Step, UserError, Volume

log = logging.getLogger(__name__)
MAX_IMAGES = 256  # largest number of images of the training split, and of the validation split
MIN_TRAINING_SUBJECTS, MIN_HELD_OUT_SUBJECTS = 10, 3  # with fewer, the statistics would describe individual subjects
MIN_DEVIATION = 0.02  # lower bound of the standard deviation of intensities and lengths, about 2 %
MIN_SHRINKAGE = 1e-3  # lower bound of the identity's part in the correlation matrix


def save_ood_detector(folder: Path, network: nn.Module, cohort: Cohort, spec: ModelSpec) -> None:
    """Write the detector to `reference.safetensors`; if it cannot be fitted, delete an old file and log the reason.

    Args:
        folder: folder of the weights.
        network: encoder or model.
        cohort: images; the training split gives the statistics, the validation split the limits.
        spec: spec of the network; see `medim.models.serialization`.
    """
    training = network.training
    try:
        data = _fit_from_cohort(network.eval(), cohort, spec).dump()
    except Exception as error:  # a network may accept views but no whole image; the weights must not be lost with it
        (folder / OOD_FILE).unlink(missing_ok=True)
        log.warning("no out-of-distribution detector was written: %s", error)
    else:
        write_bytes(folder / OOD_FILE, data)
    finally:
        network.train(training)


def rehearse_ood_detector(network: nn.Module, cohort: Cohort, spec: ModelSpec) -> float:
    """Compute the features of one training image, and log if the detector will not be possible for this network.

    Returns:
        Seconds for this image; 0 if it is not possible.
    """
    training, start = network.training, time.perf_counter()
    try:
        next(iterate_record_features(network.eval(), cohort, cohort.records("train")[:1], spec))
    except Exception as error:
        log.warning("there will be no out-of-distribution detector for this network: %s", error)
        return 0.0
    finally:
        network.train(training)
    return time.perf_counter() - start


def estimate_validation_seconds(model: Model, cohort: Cohort, records: Sequence[ImageRecord], spec: ModelSpec) -> float:
    """Estimate the time of the inference on images, from the first window of the first image; 0 if it fails."""
    if not records:
        return 0.0
    training, seconds, run = model.training, 0.0, as_numpy_function(model.eval())

    def time_first(place: int, window: Array) -> None:
        """Measure the time of the first window only."""
        nonlocal seconds
        if place == 0:
            start = time.perf_counter()
            run(window)
            seconds = time.perf_counter() - start

    try:
        image = cohort.store.load_volume(cohort.keys[records[0].image])
        n_windows = len(_map_windows(image, spec.inference, time_first))
    except Exception as error:  # the validation will report it
        log.debug("the validation cannot be timed: %s", error)
        return 0.0
    finally:
        model.train(training)
    return seconds * n_windows * len(records)


def count_detector_images(cohort: Cohort) -> int:
    """Count the images that the detector is fitted to; 0 if there are too few subjects for one."""
    try:
        return sum(map(len, _select_images(cohort)))
    except UserError:
        return 0


def _fit_from_cohort(network: nn.Module, cohort: Cohort, spec: ModelSpec) -> OODDetector:
    train, val = _select_images(cohort)
    log.info("fitting the out-of-distribution detector to %d images", len(train) + len(val))
    rows: list[OODFeatures] = []
    show = show_progress("out-of-distribution detector:")
    for done, row in enumerate(iterate_record_features(network, cohort, (*train, *val), spec), start=1):
        rows.append(row)
        show(done, len(train) + len(val))
    subjects, others = ([record.subject for record in records] for records in (train, val))
    return fit_detector(rows[: len(train)], subjects, rows[len(train) :], others)


def _select_images(cohort: Cohort) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Select the images of the training and of the validation split that the detector is fitted to.

    Raises:
        UserError: there are too few subjects.
    """
    train, val = _select_across_subjects(cohort.records("train")), _select_across_subjects(cohort.records("val"))
    n_subjects = tuple(len({record.subject for record in records}) for records in (train, val))
    if n_subjects[0] < MIN_TRAINING_SUBJECTS or n_subjects[1] < MIN_HELD_OUT_SUBJECTS:
        raise UserError(
            f"it needs {MIN_TRAINING_SUBJECTS} or more training subjects and {MIN_HELD_OUT_SUBJECTS} or more "
            f"validation subjects, got {n_subjects[0]} and {n_subjects[1]}."
        )
    return train, val


def fit_detector(
    rows: Sequence[OODFeatures], subjects: Sequence[str], held_out: Sequence[OODFeatures], others: Sequence[str]
) -> OODDetector:
    """Fit the detector to training images, with limits from validation images.

    Args:
        rows: features of the training images; see `medim.inference.ood.ood_features`.
        subjects: subject of each training image.
        held_out: features of images of other subjects; their distances determine the limits.
        others: subject of each validation image.
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
    """Estimate mean, standard deviations and inverse correlation of rows (N, d), with Ledoit-Wolf shrinkage (2004).

    Args:
        rows: features of the training images.
        floor: lower bound of the standard deviation, for features that hardly differ between the images.
    """
    mean = rows.mean(axis=0)
    spread = rows.std(axis=0)
    scale = np.maximum(spread, max(floor, 1e-6, 1e-3 * float(np.median(spread))))
    unit = (rows - mean) / scale
    estimate, shrinkage = ledoit_wolf(unit, assume_centered=True)
    # 1 also for features with the floor as standard deviation, plus what keeps the matrix invertible
    np.fill_diagonal(estimate, 1.0 + max(0.0, MIN_SHRINKAGE - shrinkage))
    return GaussianModel(mean, scale, np.linalg.inv(estimate), 1.0)


def conformal_thresholds(scores: Array, subjects: Sequence[str]) -> tuple[Array, LimitMethod]:
    """Compute limits that an image of a new subject exceeds with a probability of at most `FALSE_POSITIVE_RATE`.

    With enough subjects, the limit is the conformal quantile for repeated measures (Lee, Barber and Willett 2023,
    "Distribution-free inference with hierarchical data") of the largest standardised score; it assumes nothing about
    the distribution. It does not exist for fewer than 19 subjects; then prediction limits of normal distributions are
    used (Hahn and Meeker 1991, "Statistical Intervals"), with the probability divided by the number of parts
    (Bonferroni).

    Args:
        scores: (N, parts) log distances of validation images.
        subjects: subject of each image; each subject has the same weight, regardless of the number of images.

    Returns:
        (parts,) limits, and the method.
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
    """Compute weights (N,) with sum 1 and the same total for every subject."""
    _, place, counts = np.unique(np.asarray(subjects), return_inverse=True, return_counts=True)
    return np.asarray(1 / counts[place] / len(counts))


def iterate_record_features(
    network: nn.Module, cohort: Cohort, records: Sequence[ImageRecord], spec: ModelSpec
) -> Iterator[OODFeatures]:
    """Yield the features that the detector uses for each image, from the store.

    Args:
        network: encoder or model in evaluation mode.
        cohort: cohort with the store of the images.
        records: images.
        spec: spec of the network.
    """
    encoder = network.encoder if isinstance(network, Model) else network
    predictor, figures = as_numpy_predictor(encoder), cohort.quality_metrics()
    for record in records:
        image = cohort.store.load_volume(cohort.keys[record.image])
        yield ood_features(figures[record.image], image, window_features(predictor, image, spec.inference))


def window_features(predictor: PredictWithFeatures, image: Volume, inference: Step) -> Array:
    """Compute the features that `medim.inference.ood.FeatureRecorder` records for an image, on sampled windows only.

    Args:
        predictor: the network.
        image: preprocessed image.
        inference: see `medim.inference.network.run_inference`.
    """
    sample_places = set(sampled_windows(len(_map_windows(image, inference, lambda place, window: None))))
    outputs = _map_windows(
        image, inference, lambda place, window: predictor(window)[1][0] if place in sample_places else None
    )
    return np.asarray(np.mean([features for features in outputs if features is not None], axis=0))


def _map_windows(image: Volume, inference: Step, function: Callable[[int, Array], Any]) -> list[Any]:
    """Call `function` with number and voxels of each window of an image, and collect the results."""
    results: list[Any] = []

    def predict_blank(window: Array) -> Array:
        results.append(function(len(results), window))
        return np.zeros((len(window), 1, *window.shape[2:]), np.float32)

    run_inference(predict_blank, image, inference)
    return results


def _select_across_subjects(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Select at most `MAX_IMAGES` images: one image of every subject before the second image of any."""
    turns: dict[str, int] = {}
    ranking = []
    for place, record in enumerate(records):
        turns[record.subject] = turns.get(record.subject, 0) + 1
        ranking.append((turns[record.subject], place, record))
    return [record for *_, record in sorted(ranking, key=lambda item: item[:2])[:MAX_IMAGES]]
