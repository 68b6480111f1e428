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

from medim.data.index.records import Record
from medim.data.loading.store import Entry
from medim.data.preprocessing.geometry import SNAP, compact
from medim.data.preprocessing.quality import Figures
from medim.evaluation.probing.classifiers import FEWEST, FOLDS, Answer, Protocol, linear
from medim.metrics.bootstrap import Metric, bootstrap
from medim.metrics.classification import classification_metrics, classification_statistics
from medim.types import Array, Volume

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
CHANCE = 0.5  # of an AUROC

Clue = Literal["size as read", "size as seen", "padding", "intensity as read", "intensity as seen"]


@dataclass(frozen=True)
class Sides:
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
    def measured(self) -> list[str]:
        """Subjects of the evaluation split's images."""
        return [subject for subject, trained in zip(self.subjects, self.train, strict=True) if not trained]


@dataclass(frozen=True)
class Told:
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

    name: Clue
    features: tuple[str, ...]
    differs: bool
    told: Told


def boosted(train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None) -> Answer:
    """Gradient-boosted trees, for what is no straight line: a `Protocol` like those of probes; nothing is chosen."""
    trees = HistGradientBoostingClassifier(max_iter=50, min_samples_leaf=5, random_state=seed)
    return Answer(trees.fit(train_x, train_y).predict_proba(test_x), {})


CLASSIFIERS: dict[str, Protocol] = {"logistic regression": linear, "gradient boosting": boosted}


def told(features: Array, sides: Sides, *, seed: int = 0) -> Told:
    """Learn to tell labels by features on the training subjects, and measure it on the others.

    Of the two classifiers that one is used which has the smaller log loss in cross-validation within the training
    subjects: nothing is chosen on what is measured.

    Args:
        features: (N, d), finite.
        sides: N labels; each class occurs in training, and two or more in the evaluation split.
        seed: of folds and bootstrap.
    """
    train, labels = sides.train, sides.labels
    whose = np.unique(np.asarray(sides.subjects)[train], return_inverse=True)[1]
    name = _better(features[train], labels[train], whose, seed)
    answer = CLASSIFIERS[name](features[train], labels[train], features[~train], seed=seed, groups=whose)
    values = classification_metrics(answer.probabilities, labels[~train])
    statistics = classification_statistics(answer.probabilities, labels[~train])
    found = {
        metric: bootstrap(statistics[metric], sides.measured, seed=seed, value=values[metric])
        for metric in ("auroc", "balanced_accuracy")
    }
    chance = {"auroc": CHANCE, "balanced_accuracy": 1 / len(np.unique(labels[~train]))}
    low = found["auroc"]["ci_low"]
    return Told(**found, chance=chance, above_chance=low is not None and low > CHANCE, classifier=name)


def shortcut(name: Clue, rows: Sequence[Mapping[str, float]], sides: Sides, *, seed: int = 0) -> Shortcut:
    """What some numbers of each image tell of its label; see `told`."""
    features = np.array([list(row.values()) for row in rows], dtype=np.float64)
    differs = bool((features != features[0]).any())
    return Shortcut(name, tuple(rows[0]), differs, told(features, sides, seed=seed))


def size_as_read(record: Record) -> dict[str, float]:
    """Shape, spacing and field of view of an image as its header has them."""
    return _size(record.shape, record.spacing)


def size_as_seen(entry: Entry) -> dict[str, float]:
    """Shape, spacing and field of view of what preprocessing makes of an image."""
    spacing = np.linalg.norm(entry.affine[:3, : len(entry.shape)], axis=0)
    return _size(entry.shape, [float(mm) for mm in spacing])


def padding(entry: Entry, window: Sequence[int] | None = None) -> dict[str, float]:
    """How far an image is padded on each side, in voxels, and the share of padding in all: its border shows its size.

    Counted along the lines through the middle of the grid, which is exact where its axes run along the image's own.

    Args:
        entry: a preprocessed image.
        window: shape in voxels that training cuts or pads images to around the middle (`views.shape`).
    """
    dims, shape = len(entry.shape), np.array(entry.shape)
    to_native = np.linalg.solve(compact(entry.native_affine, dims), compact(entry.affine, dims))
    middle, limits = (shape - 1) / 2, np.array(entry.native_shape) - 0.5 + SNAP
    found, inside = {}, 1.0
    for axis, count in enumerate(shape):
        line = np.tile(middle, (count, 1))
        line[:, axis] = np.arange(count)
        native = line @ to_native[:dims, :dims].T + to_native[:dims, dims]
        held = np.flatnonzero(((native >= -0.5 - SNAP) & (native <= limits)).all(axis=1))
        before, after = (int(held[0]), int(count - 1 - held[-1])) if len(held) else (int(count), 0)
        more = max(window[axis] - int(count), 0) if window else 0
        found[f"before axis {axis}"] = float(before + more // 2)
        found[f"after axis {axis}"] = float(after + more - more // 2)
        inside *= len(held) / (count + more)
    return {**found, "share": 1 - inside}


def intensity_as_read(figures: Figures) -> dict[str, float]:
    """Range and percentiles of an image as it was read, on a scale that bears maxima of any size."""
    names = ("minimum", "p1", "median", "p99", "maximum", "levels")
    return {name: float(np.arcsinh(getattr(figures, name))) for name in names}


def intensity_as_seen(volume: Volume) -> dict[str, float]:
    """Mean, spread and percentiles of what preprocessing makes of an image."""
    values = volume.array
    marks = np.percentile(values, PERCENTILES)
    found = {f"p{place}": float(mark) for place, mark in zip(PERCENTILES, marks, strict=True)}
    return {"mean": float(values.mean(dtype=np.float64)), "std": float(values.std(dtype=np.float64)), **found}


def _size(shape: Sequence[int], spacing: Sequence[float]) -> dict[str, float]:
    sides = {f"voxels axis {axis}": float(n) for axis, n in enumerate(shape)}
    steps = {f"spacing axis {axis}": float(mm) for axis, mm in enumerate(spacing)}
    extent = {f"mm axis {axis}": n * mm for axis, (n, mm) in enumerate(zip(shape, spacing, strict=True))}
    return {**sides, **steps, **extent, "content": float(np.prod(list(extent.values())))}


def _better(x: Array, y: Array, whose: Array, seed: int) -> str:
    """The classifier with the smaller cross-validated log loss; the first where a class has too few subjects."""
    names = list(CLASSIFIERS)
    classes = np.unique(y)
    folds = min(FOLDS, *(len(np.unique(whose[y == c])) for c in classes))
    if folds < FEWEST or not (x != x[0]).any():
        return names[0]
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, whose)
    whole = [(fit, test) for fit, test in parts if len(test) and len(np.unique(y[fit])) == len(classes)]

    def loss(name: str) -> float:
        """Summed log loss in nats of the held-out images, over the folds whose fitted part has every class."""
        total = 0.0
        for fit, test in whole:
            answer = CLASSIFIERS[name](x[fit], y[fit], x[test], seed=seed, groups=whose[fit])
            total += len(test) * float(log_loss(y[test], answer.probabilities, labels=classes))
        return total

    return min(names, key=loss) if whole else names[0]
