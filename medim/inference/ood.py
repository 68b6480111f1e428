"""Out-of-distribution (OOD) detection from statistics of the training images; no training image is stored.

Three feature groups are compared: features of the encoder (*features*), voxel intensities before and after
preprocessing (*intensities*), spacing and size (*geometry*). The distance of a group is the Mahalanobis distance to the
training images (Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
Attacks"), with one class and Ledoit-Wolf shrinkage (2004) of the covariance. Each distance is divided by its limit: the
distance that 95 % of the images of new subjects do not exceed, estimated on held-out subjects. The score of an image is
the largest of the three ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from medim.data.preprocessing.quality import QualityMetrics
from medim.types import Array, UserError, Volume

SCHEMA_VERSION = 2
OOD_FILE = "reference.safetensors"  # in the folder of a run's weights, and in models/ of a package
FALSE_POSITIVE_RATE = 0.05  # fraction of the images of new subjects that are flagged
MAX_WINDOWS = 16  # per image, for the mean of the encoder features
FEATURE_GROUPS = ("features", "intensities", "geometry")
GAUSSIAN_FIELDS = ("mean", "scale", "precision", "limit")  # arrays stored per feature group
COUNT_NAMES = ("images", "subjects", "held_out_images", "held_out_subjects")
QUANTILES = (1, 5, 25, 50, 75, 95, 99)

PredictWithFeatures = Callable[[Array], tuple[Array, Array]]  # (N, C, ...) to the prediction and OOD features (N, F)
LimitMethod = Literal["conformal", "normal"]
OODFeatures = dict[str, Array]  # values of one image by feature group


@dataclass(frozen=True)
class OODResult:
    """Distance of an image to the training images.

    Attributes:
        score: largest distance divided by its limit; None if the package has no OOD statistics.
        feature_group: feature group with this largest ratio.
    """

    score: float | None = None
    feature_group: str | None = None

    @property
    def ood(self) -> bool | None:
        """Whether the image is out of distribution."""
        return None if self.score is None else self.score > 1

    @property
    def columns(self) -> dict[str, float | str | None]:
        """Columns of tables and keys of JSON files."""
        score = None if self.score is None else float(f"{self.score:.4g}")
        return {"ood_score": score, "ood": self.ood, "ood_feature_group": self.feature_group}


@dataclass(frozen=True, eq=False)
class GaussianModel:
    """Gaussian distribution of the training images in one feature group.

    Attributes:
        mean: (d,).
        scale: (d,) standard deviations, never 0.
        precision: (d, d) inverse covariance of the standardised features.
        limit: largest distance of an in-distribution image.
    """

    mean: Array
    scale: Array
    precision: Array
    limit: float

    def mahalanobis_distance(self, rows: Array) -> Array:
        """Compute the Mahalanobis distance of rows (N, d), divided by sqrt(d)."""
        gap = (rows - self.mean) / self.scale
        return np.asarray(np.sqrt(np.einsum("ni,ij,nj->n", gap, self.precision, gap) / len(self.mean)))


@dataclass(frozen=True, eq=False)
class OODDetector:
    """Out-of-distribution detector: statistics of all training images, no data of a single image.

    Attributes:
        gaussians: model by feature group.
        counts: numbers of images and subjects in the training set and in the held-out set.
        method: estimation of the limits: `conformal` or `normal`.
    """

    gaussians: Mapping[str, GaussianModel]
    counts: Mapping[str, int]
    method: LimitMethod

    def score(self, features: OODFeatures) -> OODResult:
        """Score an image.

        Raises:
            UserError: the number of features differs from that of the detector.
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
        """Serialise to safetensors, text as UTF-8 codes; the bytes are deterministic."""
        arrays: dict[str, Array] = {
            f"{name}.{key}": np.asarray(getattr(gaussian, key), np.float32)
            for name, gaussian in self.gaussians.items()
            for key in GAUSSIAN_FIELDS
        }
        arrays |= {key: np.asarray(count, np.int64) for key, count in self.counts.items()}
        arrays["schema_version"] = np.asarray(SCHEMA_VERSION, np.int64)
        arrays["method"] = np.frombuffer(self.method.encode(), np.uint8)
        return safetensors.numpy.save(arrays)

    @classmethod
    def parse(cls, data: bytes) -> OODDetector:
        """Read the bytes that `dump` returns, without unpickling.

        Raises:
            ValueError: the arrays or the schema version are invalid.
        """
        try:
            file = safetensors.numpy.load(data)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        if file["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {file['schema_version']}")
        gaussians = {
            name: _parse_gaussian(*(file[f"{name}.{key}"] for key in GAUSSIAN_FIELDS)) for name in FEATURE_GROUPS
        }
        return cls(gaussians, {key: int(file[key]) for key in COUNT_NAMES}, _parse_limit_method(file["method"]))


def _parse_limit_method(codes: Array) -> LimitMethod:
    method: LimitMethod
    text = codes.tobytes().decode()
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
    """Network that records the OOD features of each window it processes.

    Args:
        predict_with_features: network with OOD features as its second output.
    """

    def __init__(self, predict_with_features: PredictWithFeatures) -> None:
        self._predict_with_features = predict_with_features
        self._window_features: list[Array] = []

    def __call__(self, image: Array) -> Array:
        """Predict a batch (N, C, ...) and record its OOD features."""
        answer, features = self._predict_with_features(image)
        self._window_features.extend(features)
        return answer

    @property
    def features(self) -> Array:
        """Mean feature vector (F,) over the `sampled_windows` of the windows processed so far."""
        return np.asarray(
            np.mean([self._window_features[window] for window in sampled_windows(len(self._window_features))], axis=0)
        )


def sampled_windows(count: int) -> list[int]:
    """Sample at most `MAX_WINDOWS` window indices; training and prediction use the same sample.

    Args:
        count: number of windows of the image.

    Returns:
        Sorted indices in [0, count).
    """
    return sorted(np.random.default_rng(0).permutation(count)[:MAX_WINDOWS].tolist())


def ood_features(figures: QualityMetrics, input_volume: Volume, encoder_features: Array) -> OODFeatures:
    """Compute the values of an image by feature group.

    Intensities are independent of the intensity scale of the scanner or file format. Geometry is independent of the
    axis order of the file: native spacing and extent are sorted, those after preprocessing are not.

    Args:
        figures: quality metrics of the image before preprocessing.
        input_volume: preprocessed image.
        encoder_features: (F,) features of the encoder.
    """
    intensity_range = (figures.p99 - figures.p1) or 1.0
    extremes = (figures.minimum - figures.p1, figures.median - figures.p1, figures.maximum - figures.p99)
    native_intensities = [
        *(np.arcsinh(extreme / intensity_range) for extreme in extremes),
        figures.background_fraction,
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
