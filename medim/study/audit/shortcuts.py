"""Measure how well image size, padding and intensity statistics predict the label.

If a network is no more accurate than one of these predictions, there is no evidence that it uses other features. Source
of the idea: Geirhos et al. 2020, "Shortcut learning in deep neural networks", arXiv 2004.07780.
"""

from __future__ import annotations

from collections import Counter
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
    ProbeFunction,
    ProbePrediction,
    linear_probe,
)
from medim.metrics import build_statistics
from medim.metrics.bootstrap import MIN_SUBJECTS, MetricEstimate, bootstrap_intervals
from medim.types import Array, Volume

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
CHANCE_AUROC = 0.5  # chance level of the AUROC
MAX_P_VALUE = 0.01  # of one predictor; about five are tested
N_PERMUTATIONS = 199

NuisanceFeature = Literal["raw size", "input size", "padding", "raw intensity", "input intensity", "corners", "file"]


@dataclass(frozen=True)
class TrainTestSplit:
    """Training and evaluation images of a classifier.

    Attributes:
        labels: (N,) class indices of the images.
        train: (N,) bool, True for the training split, False for the evaluation split.
        subjects: (N,) subject of each image.

    Examples:
        >>> split = TrainTestSplit(np.array([0, 1, 1]), np.array([True, False, True]), ["a", "b", "c"])
        >>> split.test_subjects
        ['b']
    """

    labels: Array
    train: Array
    subjects: Sequence[str]

    @property
    def test_subjects(self) -> list[str]:
        """Subjects of the images in the evaluation split."""
        return [subject for subject, in_train in zip(self.subjects, self.train, strict=True) if not in_train]


@dataclass(frozen=True, kw_only=True)
class PredictionResult:
    """Accuracy on the evaluation split of a label prediction from features.

    Attributes:
        auroc: AUROC with its 95 % interval over subjects; chance is 0.5.
        balanced_accuracy: balanced accuracy with its 95 % interval; chance is 1 / number of classes.
        chance: chance levels by metric.
        p_value: share of permutations of the labels of the evaluation split with at least this AUROC.
        above_chance: whether the lower limit of the AUROC is above chance and `p_value` at most `MAX_P_VALUE`.
        classifier: name of the classifier selected by cross-validation within the training subjects.
    """

    auroc: MetricEstimate
    balanced_accuracy: MetricEstimate
    chance: dict[str, float]
    p_value: float
    above_chance: bool
    classifier: str


@dataclass(frozen=True)
class Shortcut:
    """Prediction of the label from an image property that should be irrelevant.

    Attributes:
        name: name of the property.
        features: names of the features of the classifiers.
        varies: whether any feature differs between images; if not, no prediction is possible.
        prediction: prediction result.
    """

    name: NuisanceFeature
    features: tuple[str, ...]
    varies: bool
    prediction: PredictionResult


def build_train_test_split(
    values: Mapping[str, str], names: Sequence[str], records: Sequence[ImageRecord], train_count: int
) -> TrainTestSplit:
    """Build the split of records of which the first `train_count` are for training; `values` has the class of each."""
    labels = np.array([list(names).index(values[record.image]) for record in records], dtype=np.intp)
    return TrainTestSplit(labels, np.arange(len(records)) < train_count, [record.subject for record in records])


def describe_class_shortage(split: TrainTestSplit, names: Sequence[str]) -> str:
    """Describe the lack of subjects that makes training or evaluation impossible; empty if there is none."""
    for part, mask in (("training", split.train), ("evaluation", ~split.train)):
        pairs = {(label, s) for label, s, in_part in zip(split.labels, split.subjects, mask, strict=True) if in_part}
        subject_counts = Counter(names[label] for label, _ in pairs)
        shortages = [f"{subject_counts[name]} with {name}" for name in names if subject_counts[name] < MIN_SUBJECTS]
        if shortages or len(names) < 2:
            shortage = ", ".join(shortages) or "one class"
            return f"the {part} split has {shortage}; {MIN_SUBJECTS} subjects per class are needed"
    return ""


def predict_boosted(
    train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None
) -> ProbePrediction:
    """Predict with gradient-boosted trees, for non-linear relations; a `ProbeFunction` without hyper-parameters."""
    trees = HistGradientBoostingClassifier(max_iter=50, min_samples_leaf=5, random_state=seed)
    return ProbePrediction(trees.fit(train_x, train_y).predict_proba(test_x), {})


CLASSIFIERS: dict[str, ProbeFunction] = {"logistic regression": linear_probe, "gradient boosting": predict_boosted}


def predict_label(features: Array, split: TrainTestSplit, *, seed: int = 0) -> PredictionResult:
    """Train a classifier of labels on the training subjects, and evaluate it on the others.

    The classifier is the one of the two with the smaller log loss in cross-validation within the training subjects; the
    evaluation split is not used for this choice.

    Args:
        features: (N, d), finite.
        split: N labels; each class occurs in training, and two or more in the evaluation split.
        seed: random seed of folds and bootstrap.
    """
    train, labels = split.train, split.labels
    subject_index = np.unique(np.asarray(split.subjects)[train], return_inverse=True)[1]
    name = _best_classifier(features[train], labels[train], subject_index, seed)
    prediction = CLASSIFIERS[name](features[train], labels[train], features[~train], seed=seed, groups=subject_index)
    statistics = build_statistics("classification", prediction.predictions, labels[~train])
    names = ("auroc", "balanced_accuracy")
    metrics = bootstrap_intervals({name: statistics[name] for name in names}, split.test_subjects, seed=seed)
    chance = {"auroc": CHANCE_AUROC, "balanced_accuracy": 1 / len(np.unique(labels[~train]))}
    low = metrics["auroc"]["ci_low"]
    p_value = _permute_labels(prediction.predictions, labels[~train], split.test_subjects, seed)
    above_chance = low is not None and low > CHANCE_AUROC and p_value <= MAX_P_VALUE
    return PredictionResult(**metrics, chance=chance, p_value=p_value, above_chance=above_chance, classifier=name)


def _permute_labels(predictions: Array, labels: Array, subjects: Sequence[str], seed: int) -> float:
    """Compute the p-value of an AUROC by permutation of the labels: of subjects with one label each, else of images."""
    _, first, owners = np.unique(np.asarray(subjects), return_index=True, return_inverse=True)
    has_one_label = bool((labels == labels[first][owners]).all())
    rng, weights = np.random.default_rng(seed), np.ones((1, len(labels)))

    def compute_auroc(permuted: Array) -> float:
        """Compute the AUROC of the predictions for these labels."""
        return float(build_statistics("classification", predictions, permuted)["auroc"](weights)[0])

    observed = compute_auroc(labels)
    n_larger = sum(
        compute_auroc(rng.permutation(labels[first])[owners] if has_one_label else rng.permutation(labels)) >= observed
        for _ in range(N_PERMUTATIONS)
    )
    return (n_larger + 1) / (N_PERMUTATIONS + 1)


def measure_shortcut(
    name: NuisanceFeature, rows: Sequence[Mapping[str, float]], split: TrainTestSplit, *, seed: int = 0
) -> Shortcut:
    """Measure how well features of each image predict its label; see `predict_label`.

    Examples:
        >>> labels = np.arange(40) % 2
        >>> split = TrainTestSplit(labels, np.arange(40) < 20, [str(number) for number in range(40)])
        >>> shortcut = measure_shortcut("raw size", [{"rows": 100.0 + 20 * label} for label in labels], split)
        >>> shortcut.prediction.auroc["value"], shortcut.prediction.above_chance
        (1.0, True)
    """
    features = np.array([list(row.values()) for row in rows], dtype=np.float64)
    varies = bool((features != features[0]).any())
    return Shortcut(name, tuple(rows[0]), varies, predict_label(features, split, seed=seed))


def raw_size(record: ImageRecord) -> dict[str, float]:
    """Compute shape, spacing and field of view of an image from its header."""
    return _describe_size(record.shape, record.spacing)


def input_size(entry: StoreEntry) -> dict[str, float]:
    """Compute shape, spacing and field of view of a preprocessed image."""
    spacing = np.linalg.norm(entry.affine[:3, : len(entry.shape)], axis=0)
    return _describe_size(entry.shape, [float(mm) for mm in spacing])


def measure_padding(entry: StoreEntry, window: Sequence[int] | None = None) -> dict[str, float]:
    """Measure the padding on each side in voxels and the padded fraction, which reveal the original image size.

    The padding is measured along the lines through the middle of the grid. This is exact if the axes of the grid are
    parallel to those of the original image.

    Args:
        entry: entry of a preprocessed image.
        window: shape in voxels to which training crops or pads images around the middle (`views.shape`).
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
    """Compute range and percentiles of an image before preprocessing, on an arcsinh scale for maxima of any size."""
    names = ("minimum", "p1", "median", "p99", "maximum", "n_unique_values")
    return {name: float(np.arcsinh(getattr(figures, name))) for name in names}


def input_intensity(volume: Volume) -> dict[str, float]:
    """Compute mean, standard deviation and percentiles of a preprocessed image."""
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
    """Select the classifier with the smaller cross-validated log loss; the first if a class has too few subjects."""
    names = list(CLASSIFIERS)
    classes = np.unique(y)
    folds = min(N_FOLDS, *(len(np.unique(subject_index[y == c])) for c in classes))
    if folds < MIN_CLASS_SUBJECTS or not (x != x[0]).any():
        return names[0]
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, subject_index)
    usable_folds = [(fit, test) for fit, test in parts if len(test) and len(np.unique(y[fit])) == len(classes)]

    def compute_log_loss(name: str) -> float:
        """Sum the log loss in nats of the validation images, over the folds with every class in the training part."""
        total = 0.0
        for fit, test in usable_folds:
            prediction = CLASSIFIERS[name](x[fit], y[fit], x[test], seed=seed, groups=subject_index[fit])
            total += len(test) * float(log_loss(y[test], prediction.predictions, labels=classes))
        return total

    return min(names, key=compute_log_loss) if usable_folds else names[0]
