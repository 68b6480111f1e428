"""Preprocess an image, run a network and restore the result to the grid of the image; only numpy is required.

A network is a function of an array. The same code runs torch and ONNX Runtime, so evaluation during training and
inference in the hospital are identical.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medim.config import Size, validate_section
from medim.data.preprocessing.quality import measure_quality
from medim.data.preprocessing.steps import preprocess, restore_grid
from medim.data.readers import ReadError
from medim.inference.ood import FeatureRecorder, OODDetector, OODResult, PredictWithFeatures, ood_features
from medim.inference.sliding_window import pad_image, sliding_window
from medim.tasks import ENCODER, find_task_of_kind
from medim.tasks.task import Task
from medim.types import Array, Modality, PredictFn, Step, UserError, Volume


def whole_image(run: PredictFn, image: Array, *, multiple_of: Size = 1) -> Array:
    """Run the network on the whole image.

    The image is centred and padded with the minimum of each channel to a multiple of the largest stride.

    Args:
        run: network.
        image: (C, ...).
        multiple_of: largest stride of the network.

    Returns:
        (K, ...) on the grid of the image, or (K,) if the network has no spatial output.
    """
    canvas, image_box = pad_image(image, [-(-n // multiple_of) * multiple_of for n in image.shape[1:]])
    out = run(canvas[None])[0]
    return np.asarray(out[(slice(None), *image_box)] if out.ndim > 1 else out)


INFERENCES: dict[str, Callable[..., Array]] = {"whole": whole_image, "sliding": sliding_window}


def run_inference(run: PredictFn, image: Volume, inference: Step) -> Array:
    """Run a network on a preprocessed image.

    Args:
        run: network.
        image: output of `preprocess`.
        inference: `{"mode": "whole", "multiple_of": 8}` or `{"mode": "sliding", "roi": [...], "overlap": 0.5}`.

    Returns:
        (K, *image.shape), or (K,) if the network has no spatial output.

    Raises:
        UsageError: the mode or an option is unknown.
    """
    function, options = validate_section(INFERENCES, inference, key="mode", run_args=("run", "image"))
    return function(run, image.array, **options)


def compute_score_map(run: PredictFn, volume: Volume, preprocessing: Sequence[Step], inference: Step) -> Array:
    """Compute the mutual-information map of an image on the grid of the original image.

    Args:
        run: function that computes scores (N, 1, ...) on the grid of its input image.
        volume: original image.
        preprocessing: preprocessing steps of the encoder.
        inference: mode and options of `run_inference`.

    Returns:
        (*volume.shape) float32, interpolated linearly; NaN in regions that preprocessing cropped.
    """
    input_volume = preprocess(volume, preprocessing)
    scores = restore_grid(run_inference(run, input_volume, inference), input_volume, volume, order=1, fill=float("nan"))
    return np.asarray(scores[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictor:
    """Network with its preprocessing, inference mode and postprocessing, for torch and for ONNX Runtime.

    Attributes:
        run: the network.
        kind: `encoder`, or the kind of a task in `medim.tasks`.
        modality: imaging modality of the input.
        spatial_dims: 2 or 3.
        in_channels: number of image channels.
        classes: class names; for a segmenter without the background.
        class_values: value of each class in the files of a segmenter; empty if they are the numbers 1, 2, ...
        preprocessing: deterministic preprocessing steps in order.
        inference: mode and options of `run_inference`.
        score_map: for an encoder with its local critic, function that computes scores (N, 1, ...) on the grid of its
            input image.
        predict_with_features: the network with OOD features as its second output.
        ood_detector: out-of-distribution detector.
        sha256: digest of the weights; empty if unknown.
    """

    run: PredictFn
    kind: str
    modality: Modality
    spatial_dims: int
    in_channels: int
    classes: tuple[str, ...]
    class_values: tuple[int, ...] = ()
    preprocessing: tuple[Step, ...]
    inference: Step
    score_map: PredictFn | None = None
    predict_with_features: PredictWithFeatures | None = None
    ood_detector: OODDetector | None = None
    sha256: str = ""

    @property
    def task(self) -> Task:
        """Task of the network; KeyError for an encoder."""
        return find_task_of_kind(self.kind)

    def __call__(self, volume: Volume) -> Array:
        """Predict an image.

        Returns:
            Class numbers (*volume.shape) uint8 of a segmenter, probabilities (K,) of a classifier, or summary vector
            (d,) of an encoder.

        Raises:
            UserError: the number of dimensions or channels of the image differs from that of the training images.
            ReadError: the output of the network is not finite.
        """
        return self._compute_answer(self.run, volume, self._preprocess_volume(volume))

    def predict_with_ood(self, volume: Volume) -> tuple[Array, OODResult]:
        """Predict an image and score it with `ood_detector`; without a detector, the score is None."""
        if self.predict_with_features is None or self.ood_detector is None:
            return self(volume), OODResult()
        recorder, input_volume = FeatureRecorder(self.predict_with_features), self._preprocess_volume(volume)
        answer = self._compute_answer(recorder, volume, input_volume)
        return answer, self.ood_detector.score(ood_features(measure_quality(volume), input_volume, recorder.features))

    def predict_score_map(self, volume: Volume) -> Array:
        """Compute the mutual-information map of an image with `compute_score_map`: (*volume.shape) float32.

        Raises:
            UserError: the network has no local critic, or the image has the wrong number of dimensions or channels.
        """
        run = self.require_score_map()
        self._check_volume(volume)
        return compute_score_map(run, volume, self.preprocessing, self.inference)

    def require_score_map(self) -> PredictFn:
        """Return the score map function.

        Raises:
            UserError: the network has no local critic.
        """
        if self.score_map is None:
            raise UserError(
                f"map: expected an encoder with its local critic, got a {self.kind} without one. "
                "Pretrain with the objective local_dim (and export that run), or omit --mi-map-dir."
            )
        return self.score_map

    def _compute_answer(self, run: PredictFn, volume: Volume, input_volume: Volume) -> Array:
        logits = run_inference(run, input_volume, self.inference)
        if not np.isfinite(logits).all():
            raise ReadError(
                "non-finite-answer",
                "the output of the network is NaN or infinite: its weights, or values of this image, are extreme",
            )
        return logits if self.kind == ENCODER else self.task.to_answer(logits, input_volume, volume)

    def _preprocess_volume(self, volume: Volume) -> Volume:
        self._check_volume(volume)
        return preprocess(volume, self.preprocessing)

    def _check_volume(self, volume: Volume) -> None:
        if (volume.spatial_dims, len(volume.array)) != (self.spatial_dims, self.in_channels):
            raise UserError(
                f"expected a {self.spatial_dims}D image of {self.in_channels} channel(s), got "
                f"{volume.spatial_dims}D of {len(volume.array)}. Use a package that was trained on such images."
            )
