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

from medim.data.preprocessing.quality import Figures
from medim.inference.arrays import arrays_of
from medim.types import Array, UserError, Volume

SCHEMA_VERSION = 1
REFERENCE = "reference.npz"  # beside a run's weights, and under models/ in a package
FALSE_ALARMS = 0.05  # part of the images of fresh subjects that get the flag
MOST_WINDOWS = 16  # of an image whose features are looked at
PARTS = ("features", "intensities", "geometry")
NORMAL = ("mean", "scale", "precision", "limit")  # what is stored of a part
COUNTS = ("images", "subjects", "held_out_images", "held_out_subjects")
QUANTILES = (1, 5, 25, 50, 75, 95, 99)

Both = Callable[[Array], tuple[Array, Array]]  # (N, C, ...) in; the answer and what is watched, (N, F), out
Method = Literal["conformal", "normal"]
Rows = dict[str, Array]  # part: its numbers, of one image


@dataclass(frozen=True)
class Verdict:
    """How far an image is from the training images.

    Attributes:
        score: distance over the largest that is still usual; None where the package has no reference.
        by: the part that gave the score.
    """

    score: float | None = None
    by: str | None = None

    @property
    def ood(self) -> bool | None:
        """Whether the image is out of distribution."""
        return None if self.score is None else self.score > 1

    @property
    def columns(self) -> dict[str, Any]:
        """As they stand in tables and in JSON."""
        score = None if self.score is None else float(f"{self.score:.4g}")
        return {"ood_score": score, "ood": self.ood, "ood_by": self.by}


@dataclass(frozen=True, eq=False)
class Normal:
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

    def distance(self, rows: Array) -> Array:
        """Mahalanobis distance of rows (N, d), over sqrt(d)."""
        gap = (rows - self.mean) / self.scale
        return np.asarray(np.sqrt(np.einsum("ni,ij,nj->n", gap, self.precision, gap) / len(self.mean)))


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of the training images; nothing of a single one.

    Attributes:
        parts: by name.
        counts: images and subjects, trained on and held out.
        method: how the limits were set: `conformal` or `normal`.
    """

    parts: Mapping[str, Normal]
    counts: Mapping[str, int]
    method: Method

    def judge(self, rows: Rows) -> Verdict:
        """Score an image.

        Raises:
            UserError: the rows are not of this reference.
        """
        scores = {name: self._score(name, rows) for name in self.parts}
        by = max(scores, key=lambda name: scores[name])
        return Verdict(scores[by], by)

    def _score(self, name: str, rows: Rows) -> float:
        part, row = self.parts[name], rows[name]
        if row.shape != part.mean.shape:
            raise UserError(f"{REFERENCE}: expected {len(part.mean)} {name}, got {len(row)}. Export the run again.")
        score = float(part.distance(row[None])[0]) / part.limit
        return score if np.isfinite(score) else float(np.finfo(np.float32).max)

    def dump(self) -> bytes:
        """As a compressed `.npz`, the same bytes for the same content."""
        arrays: dict[str, Array] = {
            f"{name}.{key}": np.asarray(getattr(part, key), np.float32)
            for name, part in self.parts.items()
            for key in NORMAL
        }
        arrays |= {key: np.asarray(count, np.int64) for key, count in self.counts.items()}
        arrays |= {"schema_version": np.asarray(SCHEMA_VERSION, np.int64), "method": np.asarray(self.method)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def parse(cls, data: bytes) -> Reference:
        """Read what `dump` wrote; nothing is unpickled.

        Raises:
            ValueError: it is not.
        """
        file = arrays_of(data)
        if file["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {file['schema_version']}")
        parts = {name: _normal(*(file[f"{name}.{key}"] for key in NORMAL)) for name in PARTS}
        return cls(parts, {key: int(file[key]) for key in COUNTS}, _method(str(file["method"])))


def _method(text: str) -> Method:
    known: Method
    for known in get_args(Method):
        if text == known:
            return known
    raise ValueError(f"method {text!r}")


def _normal(mean: Array, scale: Array, precision: Array, limit: Array) -> Normal:
    shapes = [array.shape for array in (mean, scale, precision, limit)]
    finite = all(np.isfinite(array).all() for array in (mean, scale, precision, limit))
    if shapes != [(mean.size,), (mean.size,), (mean.size, mean.size), ()] or not finite or min(scale.min(), limit) <= 0:
        raise ValueError("a mean, scale, precision or limit of the wrong shape or value")
    return Normal(mean.astype(float), scale.astype(float), precision.astype(float), float(limit))


class Watch:
    """Runs a network, window by window, and keeps what is watched.

    Args:
        both: the network.
    """

    def __init__(self, both: Both) -> None:
        self._both = both
        self._seen: list[Array] = []

    def __call__(self, image: Array) -> Array:
        """The answer for (N, C, ...)."""
        answer, watched = self._both(image)
        self._seen.extend(watched)
        return answer

    @property
    def watched(self) -> Array:
        """The mean over the windows so far that are `drawn`: (F,)."""
        return np.asarray(np.mean([self._seen[place] for place in drawn(len(self._seen))], axis=0))


def drawn(count: int) -> list[int]:
    """Which of so many windows are looked at, the same in training and for an answer: at most `MOST_WINDOWS`."""
    return sorted(np.random.default_rng(0).permutation(count)[:MOST_WINDOWS].tolist())


def rows_of(figures: Figures, processed: Volume, watched: Array) -> Rows:
    """The numbers of an image, part by part.

    Intensities are free of the scale that a scanner or a file format happens to use. Geometry does not depend on the
    order of the file's axes: its own spacing and extent are sorted, those after preprocessing are as they lie.

    Args:
        figures: of the image as read.
        processed: the image as the network gets it.
        watched: (F,) what the encoder made of it.
    """
    width = (figures.p99 - figures.p1) or 1.0
    ends = (figures.minimum - figures.p1, figures.median - figures.p1, figures.maximum - figures.p99)
    before = [*(np.arcsinh(end / width) for end in ends), figures.empty, figures.saturated]
    after = np.arcsinh(np.percentile(processed.array, QUANTILES))
    native = np.linalg.norm(processed.native_affine[:3, : processed.spatial_dims], axis=0)
    extents = (np.sort(native * processed.native_shape), np.multiply(processed.spacing, processed.shape))
    return {
        "features": np.asarray(watched, np.float64),
        "intensities": np.array([*before, *after]),
        "geometry": np.log(np.concatenate([np.sort(native), *extents])),
    }
