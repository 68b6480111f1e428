"""Prediction for one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medim.data.index.index import ImageRecord, Index
from medim.inference.ood import OODResult
from medim.types import Array, Volume

PredictionRow = dict[str, str | float | None]  # a row of `predictions.csv`


@dataclass(frozen=True, eq=False, kw_only=True)
class Answer:
    """Prediction for one image, with the image.

    Attributes:
        record: row of the index.
        volume: the image before preprocessing.
        prediction: labels (*volume.shape) of a segmenter, probabilities or values (K,), or features (d,) of an encoder.
        ood_result: distance of the image to the training images.
    """

    record: ImageRecord
    volume: Volume
    prediction: Array
    ood_result: OODResult


AnswerWriter = Callable[[Path, Index, Answer], PredictionRow]  # first argument: output path without suffix
