"""From a preprocessed image to logits, and back onto the image's own grid: numpy alone.

A network is a function of an array. Torch and ONNX Runtime are called by the same lines, so what is measured in
training is what runs in the hospital.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medim.config import validate_section
from medim.data.preprocessing.quality import measure_quality
from medim.data.preprocessing.steps import preprocess, restore_grid
from medim.inference.ood import FeatureRecorder, OODDetector, OODResult, PredictWithFeatures, ood_features
from medim.types import Array, Modality, Step, UserError, Volume

PredictFn = Callable[[Array], Array]  # (N, C, ...) float32 in; (N, K, ...) logits, or (N, K), out
ModelKind = Literal["encoder", "segmenter", "classifier", "multi_label_classifier"]
SIGMA = 0.125  # of the Gaussian that blends windows, over the side of the window (MONAI's and nnU-Net's)


def whole_image(run: PredictFn, image: Array, *, multiple_of: int = 1) -> Array:
    """Run the image at once, padded around the centre with each channel's minimum to what the network's strides divide.

    Args:
        run: the network.
        image: (C, ...).
        multiple_of: the network's coarsest stride.

    Returns:
        (K, ...) on the image's grid, or (K,) where the network has no grid.
    """
    canvas, image_box = _pad_image(image, [-(-n // multiple_of) * multiple_of for n in image.shape[1:]])
    out = run(canvas[None])[0]
    return np.asarray(out[(slice(None), *image_box)] if out.ndim > 1 else out)


def sliding_window(run: PredictFn, image: Array, *, roi: tuple[int, ...], overlap: float = 0.5) -> Array:
    """Run window after window and blend their logits, each weighted by a Gaussian around its centre.

    Places and weights are those of MONAI's `sliding_window_inference(mode="gaussian")`. A window without any contrast
    is skipped: it tells nothing, and normalising by its variance is noise. What no other window covers is background
    (class 0).

    Args:
        run: the network; its output has the grid of its input.
        image: (C, ...).
        roi: size of a window, in voxels.
        overlap: part of a window that the next one covers again, in [0, 1).

    Returns:
        (K, ...) on the image's grid.
    """
    dims = image.ndim - 1
    if len(roi) != dims or not 0 <= overlap < 1:
        raise UserError(
            f"inference: expected a roi of {dims} sides and 0 <= overlap < 1, got {list(roi)} and {overlap}."
        )
    canvas, image_box = _pad_image(image, [max(n, r) for n, r in zip(image.shape[1:], roi, strict=True)])
    weight = _compute_gaussian_weight(roi)
    total: Array | None = None
    weight_sum = np.zeros(canvas.shape[1:], np.float32)
    for start in itertools.product(
        *(_list_window_starts(n, r, overlap) for n, r in zip(canvas.shape[1:], roi, strict=True))
    ):
        box = tuple(slice(a, a + r) for a, r in zip(start, roi, strict=True))
        window = np.ascontiguousarray(canvas[(slice(None), *box)])
        if all(channel.min() == channel.max() for channel in window):
            continue
        logits = run(window[None])[0]
        if logits.shape[1:] != tuple(roi):
            raise UserError(f"inference: expected logits on a grid {roi}, got {logits.shape[1:]}. Use mode whole.")
        if total is None:
            total = np.zeros((len(logits), *canvas.shape[1:]), np.float32)
        total[(slice(None), *box)] += logits * weight
        weight_sum[box] += weight
    if total is None:  # nothing but constant windows; one of them tells the number of classes
        total = np.zeros((len(run(window[None])[0]), *canvas.shape[1:]), np.float32)
    total /= np.where(weight_sum > 0, weight_sum, 1)
    total[0][weight_sum == 0] = 1
    return np.asarray(total[(slice(None), *image_box)])


INFERENCES: dict[str, Callable[..., Array]] = {"whole": whole_image, "sliding": sliding_window}


def run_inference(run: PredictFn, image: Volume, inference: Step) -> Array:
    """Run a network over a preprocessed image.

    Args:
        run: the network.
        image: as `preprocess` returns it.
        inference: `{"mode": "whole", "multiple_of": 8}` or `{"mode": "sliding", "roi": [...], "overlap": 0.5}`.

    Returns:
        (K, *image.shape), or (K,) where the network has no grid.

    Raises:
        UsageError: an unknown mode or option.
    """
    function, options = validate_section(INFERENCES, inference, key="mode", run_args=("run", "image"))
    return function(run, image.array, **options)


def to_label_map(logits: Array, input_volume: Volume, volume: Volume) -> Array:
    """Logits (K, *processed.shape), class 0 being the background, as labels on the grid of the image as read.

    Logits are brought back (linearly) before they are compared, so the borders are those of the image's own grid. What
    preprocessing cut away is background.

    Returns:
        (*volume.shape) uint8.
    """
    native_logits = restore_grid(logits, input_volume, volume, order=1, fill=0.0)
    return np.asarray(native_logits.argmax(axis=0), np.uint8)


def softmax_probabilities(logits: Array) -> Array:
    """Logits (K,) of classes that exclude each other as probabilities summing to 1."""
    odds = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(odds / odds.sum())


def sigmoid_probabilities(logits: Array) -> Array:
    """Logits (K,) of findings, each for itself, as probabilities."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits.astype(np.float64))))


def compute_score_map(run: PredictFn, volume: Volume, preprocessing: Sequence[Step], inference: Step) -> Array:
    """Scores of a mutual-information map on the grid of an image as a reader gave it.

    Args:
        run: image to scores (N, 1, ...) on the image's grid.
        volume: as read.
        preprocessing: the steps the encoder was trained with.
        inference: see `run_inference`.

    Returns:
        (*volume.shape) float32, interpolated linearly; NaN where preprocessing cut the image away.
    """
    input_volume = preprocess(volume, preprocessing)
    scores = restore_grid(run_inference(run, input_volume, inference), input_volume, volume, order=1, fill=float("nan"))
    return np.asarray(scores[0])


@dataclass(frozen=True, eq=False)
class Predictor:
    """A network with all that is needed to use it on an image, whatever runs it (torch or ONNX Runtime).

    Attributes:
        run: the network itself.
        kind: what it answers.
        modality: what it reads.
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        classes: names; a segmenter's without the background.
        preprocessing: deterministic steps, first to last.
        inference: see `run_inference`.
        score_map: of an encoder with its local critic: image to scores (N, 1, ...) on the image's grid.
        predict_with_features: the network with what the guard watches.
        ood_detector: what the guard compares with.
    """

    run: PredictFn
    kind: ModelKind
    modality: Modality
    spatial_dims: int
    in_channels: int
    classes: tuple[str, ...]
    preprocessing: tuple[Step, ...]
    inference: Step
    score_map: PredictFn | None = None
    predict_with_features: PredictWithFeatures | None = None
    ood_detector: OODDetector | None = None

    def __call__(self, volume: Volume) -> Array:
        """Labels (*volume.shape) uint8 of a segmenter, probabilities (K,) of classifiers, summary (d,) of an encoder.

        Raises:
            UserError: the image has another number of dimensions or channels than the network was trained on.
        """
        return self._compute_answer(self.run, volume, self._preprocess_volume(volume))

    def predict_with_ood(self, volume: Volume) -> tuple[Array, OODResult]:
        """The answer, and whether the image is like those the network was trained on; see `medim.inference.ood`."""
        if self.predict_with_features is None or self.ood_detector is None:
            return self(volume), OODResult()
        recorder, input_volume = FeatureRecorder(self.predict_with_features), self._preprocess_volume(volume)
        answer = self._compute_answer(recorder, volume, input_volume)
        return answer, self.ood_detector.score(ood_features(measure_quality(volume), input_volume, recorder.features))

    def predict_score_map(self, volume: Volume) -> Array:
        """The mutual-information map of an image, (*volume.shape) float32; see `compute_score_map`.

        Raises:
            UserError: no critic came with the network, or the image does not fit it.
        """
        run = self.require_score_map()
        self._check_volume(volume)
        return compute_score_map(run, volume, self.preprocessing, self.inference)

    def require_score_map(self) -> PredictFn:
        """What draws the map; UserError where no critic came with the network."""
        if self.score_map is None:
            raise UserError(
                f"map: expected an encoder with the local critic it was trained with, got a {self.kind} without. "
                "Pretrain with the objective local_dim (and export that run), or leave --mi-map-dir out."
            )
        return self.score_map

    def _compute_answer(self, run: PredictFn, volume: Volume, input_volume: Volume) -> Array:
        logits = run_inference(run, input_volume, self.inference)
        return (
            to_label_map(logits, input_volume, volume) if self.kind == "segmenter" else _ACTIVATIONS[self.kind](logits)
        )

    def _preprocess_volume(self, volume: Volume) -> Volume:
        self._check_volume(volume)
        return preprocess(volume, self.preprocessing)

    def _check_volume(self, volume: Volume) -> None:
        if (volume.spatial_dims, len(volume.array)) != (self.spatial_dims, self.in_channels):
            raise UserError(
                f"expected a {self.spatial_dims}D image of {self.in_channels} channel(s), got "
                f"{volume.spatial_dims}D of {len(volume.array)}. Use a package made for such images."
            )


_ACTIVATIONS: dict[ModelKind, Callable[[Array], Array]] = {
    "encoder": np.asarray,
    "classifier": softmax_probabilities,
    "multi_label_classifier": sigmoid_probabilities,
}


def _pad_image(image: Array, shape: Sequence[int]) -> tuple[Array, tuple[slice, ...]]:
    """The image in the middle of a larger grid, and the box where it lies."""
    before = [(target - size) // 2 for target, size in zip(shape, image.shape[1:], strict=True)]
    image_box = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    if tuple(shape) == image.shape[1:]:
        return image, image_box
    minimum = image.min(axis=tuple(range(1, image.ndim)), keepdims=True)
    out = np.broadcast_to(minimum, (len(image), *shape)).copy()
    out[(slice(None), *image_box)] = image
    return out, image_box


def _list_window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis; the last one ends with the image."""
    step = window if size == window else max(int(window * (1 - overlap)), 1)
    count = -(-(size - window) // step) + 1
    return [min(i * step, size - window) for i in range(count)]


def _compute_gaussian_weight(roi: Sequence[int]) -> Array:
    """(*roi) float32, at most 1 and never 0."""
    weight = np.ones(tuple(roi))
    for axis, side in enumerate(roi):
        offsets = np.arange(side) - (side - 1) / 2
        profile = np.exp(-0.5 * (offsets / (SIGMA * side)) ** 2)
        weight *= profile.reshape([-1 if a == axis else 1 for a in range(len(roi))])
    return np.maximum(weight, 1e-3).astype(np.float32)
