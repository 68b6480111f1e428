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
INTENSITY_NAMES = (  # of the intensity features, in their order
    "lowest intensity",
    "median intensity",
    "highest intensity",
    "fraction of background voxels",
    "fraction of saturated voxels",
    *(f"percentile {quantile} of the preprocessed intensities" for quantile in QUANTILES),
)
MIN_DEVIATIONS = 3.0  # of a single feature that explains a flag, in standard deviations

PredictWithFeatures = Callable[[Array], tuple[Array, Array]]  # (N, C, ...) to the prediction and OOD features (N, F)
LimitMethod = Literal["conformal", "normal"]
OODFeatures = dict[str, Array]  # values of one image by feature group


@dataclass(frozen=True)
class OODResult:
    """Distance of an image to the training images.

    Attributes:
        score: largest distance divided by its limit; None if the package has no OOD statistics.
        feature_group: feature group with this largest ratio.
        reason: the feature of the group that differs most from the training images; empty if the score is at most 1.
    """

    score: float | None = None
    feature_group: str | None = None
    reason: str = ""

    @property
    def ood(self) -> bool | None:
        """Whether the image is out of distribution."""
        return None if self.score is None else self.score > 1

    def __str__(self) -> str:
        """Describe a flagged image, such as "geometry 19.8 times the limit (largest voxel size 5 times ...)"."""
        score = None if self.score is None else f"{self.score:.3g}"
        return f"{self.feature_group} {score} times the limit ({self.reason})"

    @property
    def columns(self) -> dict[str, float | str | None]:
        """Columns of tables and keys of JSON files."""
        score = None if self.score is None else float(f"{self.score:.4g}")
        return {"ood_score": score, "ood": self.ood, "ood_feature_group": self.feature_group}

    @property
    def columns_with_reason(self) -> dict[str, float | str | None]:
        """Columns of tables for readers: those of `columns`, and the reason."""
        return {**self.columns, "ood_reason": self.reason}


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
        reason = describe_difference(group, features[group], self.gaussians[group]) if scores[group] > 1 else ""
        return OODResult(scores[group], group, reason)

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


def describe_difference(group: str, row: Array, gaussian: GaussianModel) -> str:
    """Describe the feature of an image that differs most from the training images, in standard deviations.

    Args:
        group: feature group.
        row: (d,) features of the image, see `ood_features`.
        gaussian: model of the group.

    Returns:
        Phrase such as "largest voxel size 5.1 times that of the training images".
    """
    deviations = np.nan_to_num((row - gaussian.mean) / gaussian.scale, nan=np.inf)
    place = int(np.abs(deviations).argmax())
    if group == "features":
        return "features of the encoder unlike those of the training images"
    if not np.isfinite(deviations[place]):
        return f"{group} beyond the range of numbers"
    if abs(deviations[place]) < MIN_DEVIATIONS:
        return f"unusual combination of {'voxel size and field of view' if group == 'geometry' else 'intensities'}"
    if group == "geometry":
        ratio = float(np.exp(np.clip(row[place] - gaussian.mean[place], -20, 20)))
        return f"{_name_geometry(place, len(row) // 3)} {ratio:.3g} times that of the training images"
    name = INTENSITY_NAMES[place]
    if "fraction" in name:
        return f"{name} {100 * row[place]:.3g} %, in the training images {100 * gaussian.mean[place]:.3g} % on average"
    return f"{name} {'higher' if deviations[place] > 0 else 'lower'} than in the training images"


def _name_geometry(place: int, n_axes: int) -> str:
    """Name an entry of the geometry features: sorted voxel sizes and extents of the file, extents of the input."""
    kind, axis = divmod(place, n_axes)
    if kind == 2:
        return f"extent of the preprocessed image along axis {axis + 1}"
    order = {2: ("smaller", "larger"), 3: ("smallest", "middle", "largest")}[n_axes]
    return f"{order[axis]} {'voxel size' if kind == 0 else 'side of the field of view'}"


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
