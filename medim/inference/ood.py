"""Is an image like those that a network was trained on? Statistics of the training images answer, without any image.

Three parts are looked at: what the encoder makes of the image (*features*), the levels of its voxels before and after
preprocessing (*intensities*), spacing and size (*geometry*). The distance of a part is Mahalanobis' from the training
images (Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
Attacks"), with one class and the covariance shrunk by Ledoit and Wolf (2004). It is divided by the distance that an
image of a fresh subject keeps to 19 times in 20, as held-out subjects tell; the largest of the three is the score.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from medim.data.preprocessing.quality import QualityMetrics
from medim.inference.arrays import read_npz_arrays
from medim.types import Array, UserError, Volume

SCHEMA_VERSION = 1
OOD_FILE = "reference.npz"  # beside a run's weights, and under models/ in a package
FALSE_POSITIVE_RATE = 0.05  # part of the images of fresh subjects that get the flag
MAX_WINDOWS = 16  # of an image whose features are looked at
FEATURE_GROUPS = ("features", "intensities", "geometry")
GAUSSIAN_FIELDS = ("mean", "scale", "precision", "limit")  # what is stored of a part
COUNT_NAMES = ("images", "subjects", "held_out_images", "held_out_subjects")
QUANTILES = (1, 5, 25, 50, 75, 95, 99)

PredictWithFeatures = Callable[
    [Array], tuple[Array, Array]
]  # (N, C, ...) in; the answer and what is watched, (N, F), out
LimitMethod = Literal["conformal", "normal"]
OODFeatures = dict[str, Array]  # part: its numbers, of one image


@dataclass(frozen=True)
class OODResult:
    """How far an image is from the training images.

    Attributes:
        score: distance over the largest that is still usual; None where the package has no reference.
        feature_group: the part that gave the score.
    """

    score: float | None = None
    feature_group: str | None = None

    @property
    def ood(self) -> bool | None:
        """Whether the image is out of distribution."""
        return None if self.score is None else self.score > 1

    @property
    def columns(self) -> dict[str, Any]:
        """As they stand in tables and in JSON."""
        score = None if self.score is None else float(f"{self.score:.4g}")
        return {"ood_score": score, "ood": self.ood, "ood_by": self.feature_group}


@dataclass(frozen=True, eq=False)
class GaussianModel:
    """Where the training images lie in one part.

    Attributes:
        mean: (d,).
        scale: (d,) standard deviations, never 0.
        precision: (d, d), the inverse of the covariance of what is scaled so.
        limit: the largest distance that is still usual.
    """

    mean: Array
    scale: Array
    precision: Array
    limit: float

    def mahalanobis_distance(self, rows: Array) -> Array:
        """Mahalanobis distance of rows (N, d), over sqrt(d)."""
        gap = (rows - self.mean) / self.scale
        return np.asarray(np.sqrt(np.einsum("ni,ij,nj->n", gap, self.precision, gap) / len(self.mean)))


@dataclass(frozen=True, eq=False)
class OODDetector:
    """Statistics of the training images; nothing of a single one.

    Attributes:
        gaussians: by name.
        counts: images and subjects, trained on and held out.
        method: how the limits were set: `conformal` or `normal`.
    """

    gaussians: Mapping[str, GaussianModel]
    counts: Mapping[str, int]
    method: LimitMethod

    def score(self, features: OODFeatures) -> OODResult:
        """Score an image.

        Raises:
            UserError: the rows are not of this reference.
        """
        scores = {name: self._score_group(name, features) for name in self.gaussians}
        group = max(scores, key=lambda name: scores[name])
        return OODResult(scores[group], group)

    def _score_group(self, name: str, features: OODFeatures) -> float:
        gaussian, row = self.gaussians[name], features[name]
        if row.shape != gaussian.mean.shape:
            raise UserError(f"{OOD_FILE}: expected {len(gaussian.mean)} {name}, got {len(row)}. Export the run again.")
        score = float(gaussian.mahalanobis_distance(row[None])[0]) / gaussian.limit
        return score if np.isfinite(score) else float(np.finfo(np.float32).max)

    def dump(self) -> bytes:
        """As a compressed `.npz`, the same bytes for the same content."""
        arrays: dict[str, Array] = {
            f"{name}.{key}": np.asarray(getattr(gaussian, key), np.float32)
            for name, gaussian in self.gaussians.items()
            for key in GAUSSIAN_FIELDS
        }
        arrays |= {key: np.asarray(count, np.int64) for key, count in self.counts.items()}
        arrays |= {"schema_version": np.asarray(SCHEMA_VERSION, np.int64), "method": np.asarray(self.method)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def parse(cls, data: bytes) -> OODDetector:
        """Read what `dump` wrote; nothing is unpickled.

        Raises:
            ValueError: it is not.
        """
        file = read_npz_arrays(data)
        if file["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {file['schema_version']}")
        gaussians = {
            name: _parse_gaussian(*(file[f"{name}.{key}"] for key in GAUSSIAN_FIELDS)) for name in FEATURE_GROUPS
        }
        return cls(gaussians, {key: int(file[key]) for key in COUNT_NAMES}, _parse_limit_method(str(file["method"])))


def _parse_limit_method(text: str) -> LimitMethod:
    method: LimitMethod
    for method in get_args(LimitMethod):
        if text == method:
            return method
    raise ValueError(f"method {text!r}")


def _parse_gaussian(mean: Array, scale: Array, precision: Array, limit: Array) -> GaussianModel:
    shapes = [array.shape for array in (mean, scale, precision, limit)]
    finite = all(np.isfinite(array).all() for array in (mean, scale, precision, limit))
    if shapes != [(mean.size,), (mean.size,), (mean.size, mean.size), ()] or not finite or min(scale.min(), limit) <= 0:
        raise ValueError("a mean, scale, precision or limit of the wrong shape or value")
    return GaussianModel(mean.astype(float), scale.astype(float), precision.astype(float), float(limit))


class FeatureRecorder:
    """Runs a network, window by window, and keeps what is watched.

    Args:
        predict_with_features: the network.
    """

    def __init__(self, predict_with_features: PredictWithFeatures) -> None:
        self._predict_with_features = predict_with_features
        self._window_features: list[Array] = []

    def __call__(self, image: Array) -> Array:
        """The answer for (N, C, ...)."""
        answer, features = self._predict_with_features(image)
        self._window_features.extend(features)
        return answer

    @property
    def features(self) -> Array:
        """The mean over the windows so far that are `sampled_windows`: (F,)."""
        return np.asarray(
            np.mean([self._window_features[window] for window in sampled_windows(len(self._window_features))], axis=0)
        )


def sampled_windows(count: int) -> list[int]:
    """Which of so many windows are looked at, the same in training and for an answer: at most `MAX_WINDOWS`."""
    return sorted(np.random.default_rng(0).permutation(count)[:MAX_WINDOWS].tolist())


def ood_features(figures: QualityMetrics, input_volume: Volume, encoder_features: Array) -> OODFeatures:
    """The numbers of an image, part by part.

    Intensities are free of the scale that a scanner or a file format happens to use. Geometry does not depend on the
    order of the file's axes: its own spacing and extent are sorted, those after preprocessing are as they lie.

    Args:
        figures: of the image as read.
        input_volume: the image as the network gets it.
        encoder_features: (F,) what the encoder made of it.
    """
    intensity_range = (figures.p99 - figures.p1) or 1.0
    extremes = (figures.minimum - figures.p1, figures.median - figures.p1, figures.maximum - figures.p99)
    native_intensities = [
        *(np.arcsinh(extreme / intensity_range) for extreme in extremes),
        figures.empty,
        figures.saturated,
    ]
    input_intensities = np.arcsinh(np.percentile(input_volume.array, QUANTILES))
    native_spacing = np.linalg.norm(input_volume.native_affine[:3, : input_volume.spatial_dims], axis=0)
    extents = (
        np.sort(native_spacing * input_volume.native_shape),
        np.multiply(input_volume.spacing, input_volume.shape),
    )
    return {
        "features": np.asarray(encoder_features, np.float64),
        "intensities": np.array([*native_intensities, *input_intensities]),
        "geometry": np.log(np.concatenate([np.sort(native_spacing), *extents])),
    }
