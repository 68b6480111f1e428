"""How well is a label told by what should not tell it: an image's size, its padding, its intensities?

A network that reaches no more than one of these has, as far as anyone can know, learnt nothing else. Source of the
idea: Geirhos et al. 2020, "Shortcut learning in deep neural networks", arXiv 2004.07780.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold

from medim.data.index.records import ImageRecord
from medim.data.loading.store import StoreEntry
from medim.data.preprocessing.geometry import SNAP_VOXELS, compact_affine
from medim.data.preprocessing.quality import QualityMetrics
from medim.evaluation.probing.classifiers import (
    MIN_CLASS_SUBJECTS,
    N_FOLDS,
    ProbeClassifier,
    ProbePrediction,
    linear_probe,
)
from medim.metrics.bootstrap import Metric, bootstrap_interval
from medim.metrics.classification import classification_metrics, classification_statistics
from medim.types import Array, Volume

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
CHANCE_AUROC = 0.5  # of an AUROC

NuisanceFeature = Literal["size as read", "size as seen", "padding", "intensity as read", "intensity as seen"]


@dataclass(frozen=True)
class TrainTestSplit:
    """Who is learnt from and who is measured on.

    Attributes:
        labels: (N,) class indices of the images.
        train: (N,) bool, the training split; the others are the evaluation split.
        subjects: (N,) whose image it is.
    """

    labels: Array
    train: Array
    subjects: Sequence[str]

    @property
    def test_subjects(self) -> list[str]:
        """Subjects of the evaluation split's images."""
        return [subject for subject, in_train in zip(self.subjects, self.train, strict=True) if not in_train]


@dataclass(frozen=True)
class PredictionResult:
    """What some numbers tell of a label, on the evaluation split.

    Attributes:
        auroc: with its 95 % interval over subjects; 0.5 is chance.
        balanced_accuracy: likewise; 1 / number of classes is chance.
        chance: both levels, by metric.
        above_chance: the interval of the AUROC begins above chance.
        classifier: which of the two did better within the training subjects.
    """

    auroc: Metric
    balanced_accuracy: Metric
    chance: dict[str, float]
    above_chance: bool
    classifier: str


@dataclass(frozen=True)
class Shortcut:
    """What one thing that should not matter tells of the label.

    Attributes:
        name: which.
        features: the numbers that the classifiers were given.
        differs: whether any of them differs between images; where none does, nothing can be told by it.
        told: of the label.
    """

    name: NuisanceFeature
    features: tuple[str, ...]
    differs: bool
    told: PredictionResult


def predict_boosted(
    train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None
) -> ProbePrediction:
    """Gradient-boosted trees for non-linear relations, as a `ProbeClassifier` without hyper-parameter selection."""
    trees = HistGradientBoostingClassifier(max_iter=50, min_samples_leaf=5, random_state=seed)
    return ProbePrediction(trees.fit(train_x, train_y).predict_proba(test_x), {})


CLASSIFIERS: dict[str, ProbeClassifier] = {"logistic regression": linear_probe, "gradient boosting": predict_boosted}


def predict_label(features: Array, split: TrainTestSplit, *, seed: int = 0) -> PredictionResult:
    """Learn to tell labels by features on the training subjects, and measure it on the others.

    Of the two classifiers that one is used which has the smaller log loss in cross-validation within the training
    subjects: nothing is chosen on what is measured.

    Args:
        features: (N, d), finite.
        split: N labels; each class occurs in training, and two or more in the evaluation split.
        seed: of folds and bootstrap.
    """
    train, labels = split.train, split.labels
    subject_index = np.unique(np.asarray(split.subjects)[train], return_inverse=True)[1]
    name = _best_classifier(features[train], labels[train], subject_index, seed)
    prediction = CLASSIFIERS[name](features[train], labels[train], features[~train], seed=seed, groups=subject_index)
    values = classification_metrics(prediction.probabilities, labels[~train])
    statistics = classification_statistics(prediction.probabilities, labels[~train])
    metrics = {
        metric: bootstrap_interval(statistics[metric], split.test_subjects, seed=seed, value=values[metric])
        for metric in ("auroc", "balanced_accuracy")
    }
    chance = {"auroc": CHANCE_AUROC, "balanced_accuracy": 1 / len(np.unique(labels[~train]))}
    low = metrics["auroc"]["ci_low"]
    return PredictionResult(
        **metrics, chance=chance, above_chance=low is not None and low > CHANCE_AUROC, classifier=name
    )


def measure_shortcut(
    name: NuisanceFeature, rows: Sequence[Mapping[str, float]], split: TrainTestSplit, *, seed: int = 0
) -> Shortcut:
    """What some numbers of each image tell of its label; see `predict_label`."""
    features = np.array([list(row.values()) for row in rows], dtype=np.float64)
    differs = bool((features != features[0]).any())
    return Shortcut(name, tuple(rows[0]), differs, predict_label(features, split, seed=seed))


def raw_size(record: ImageRecord) -> dict[str, float]:
    """Shape, spacing and field of view of an image as its header has them."""
    return _describe_size(record.shape, record.spacing)


def input_size(entry: StoreEntry) -> dict[str, float]:
    """Shape, spacing and field of view of what preprocessing makes of an image."""
    spacing = np.linalg.norm(entry.affine[:3, : len(entry.shape)], axis=0)
    return _describe_size(entry.shape, [float(mm) for mm in spacing])


def measure_padding(entry: StoreEntry, window: Sequence[int] | None = None) -> dict[str, float]:
    """How far an image is padded on each side, in voxels, and the share of padding in all: its border shows its size.

    Counted along the lines through the middle of the grid, which is exact where its axes run along the image's own.

    Args:
        entry: a preprocessed image.
        window: shape in voxels that training cuts or pads images to around the middle (`views.shape`).
    """
    dims, shape = len(entry.shape), np.array(entry.shape)
    to_native = np.linalg.solve(compact_affine(entry.native_affine, dims), compact_affine(entry.affine, dims))
    middle, limits = (shape - 1) / 2, np.array(entry.native_shape) - 0.5 + SNAP_VOXELS
    features, share_inside = {}, 1.0
    for axis, count in enumerate(shape):
        line = np.tile(middle, (count, 1))
        line[:, axis] = np.arange(count)
        native = line @ to_native[:dims, :dims].T + to_native[:dims, dims]
        inside_indices = np.flatnonzero(((native >= -0.5 - SNAP_VOXELS) & (native <= limits)).all(axis=1))
        before, after = (
            (int(inside_indices[0]), int(count - 1 - inside_indices[-1])) if len(inside_indices) else (int(count), 0)
        )
        extra = max(window[axis] - int(count), 0) if window else 0
        features[f"before axis {axis}"] = float(before + extra // 2)
        features[f"after axis {axis}"] = float(after + extra - extra // 2)
        share_inside *= len(inside_indices) / (count + extra)
    return {**features, "share": 1 - share_inside}


def raw_intensity(figures: QualityMetrics) -> dict[str, float]:
    """Range and percentiles of an image as it was read, on a scale that bears maxima of any size."""
    names = ("minimum", "p1", "median", "p99", "maximum", "levels")
    return {name: float(np.arcsinh(getattr(figures, name))) for name in names}


def input_intensity(volume: Volume) -> dict[str, float]:
    """Mean, spread and percentiles of what preprocessing makes of an image."""
    values = volume.array
    levels = np.percentile(values, PERCENTILES)
    percentiles = {f"p{percent}": float(level) for percent, level in zip(PERCENTILES, levels, strict=True)}
    return {"mean": float(values.mean(dtype=np.float64)), "std": float(values.std(dtype=np.float64)), **percentiles}


def _describe_size(shape: Sequence[int], spacing: Sequence[float]) -> dict[str, float]:
    voxels = {f"voxels axis {axis}": float(n) for axis, n in enumerate(shape)}
    spacings = {f"spacing axis {axis}": float(mm) for axis, mm in enumerate(spacing)}
    extent = {f"mm axis {axis}": n * mm for axis, (n, mm) in enumerate(zip(shape, spacing, strict=True))}
    return {**voxels, **spacings, **extent, "content": float(np.prod(list(extent.values())))}


def _best_classifier(x: Array, y: Array, subject_index: Array, seed: int) -> str:
    """The classifier with the smaller cross-validated log loss; the first where a class has too few subjects."""
    names = list(CLASSIFIERS)
    classes = np.unique(y)
    folds = min(N_FOLDS, *(len(np.unique(subject_index[y == c])) for c in classes))
    if folds < MIN_CLASS_SUBJECTS or not (x != x[0]).any():
        return names[0]
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, subject_index)
    usable_folds = [(fit, test) for fit, test in parts if len(test) and len(np.unique(y[fit])) == len(classes)]

    def compute_log_loss(name: str) -> float:
        """Summed log loss in nats of the held-out images, over the folds whose fitted part has every class."""
        total = 0.0
        for fit, test in usable_folds:
            prediction = CLASSIFIERS[name](x[fit], y[fit], x[test], seed=seed, groups=subject_index[fit])
            total += len(test) * float(log_loss(y[test], prediction.probabilities, labels=classes))
        return total

    return min(names, key=compute_log_loss) if usable_folds else names[0]
