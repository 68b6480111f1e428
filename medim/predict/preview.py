"""Pictures of images with their prediction, for a quick check by eye."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from medim.files import write_bytes
from medim.inference.network import Predictor
from medim.pictures.case import draw_case
from medim.predict.answer import Answer
from medim.types import Array

PREVIEW_FOLDER = "previews"  # in the folder of a prediction
SIDE_PIXELS = {2: 512, 3: 320}  # longest side of a slice


def write_preview(path: Path, network: Predictor, answer: Answer) -> None:
    """Write a PNG of the image: with the contours of a segmentation, or with the probabilities or value above it.

    A 3D image is shown by three slices, those with the largest area of the segmentation. An image out of distribution
    has a line with the reason.

    Args:
        path: path of the picture.
        network: network of the package.
        answer: prediction and image.
    """
    volume, classes = answer.volume, network.classes
    label_maps: dict[str, Array | None] = {"": None}
    texts = [f"UNUSUAL: {answer.ood_result.reason}"] if answer.ood_result.ood else []
    if network.task.dense:
        label_maps = {"image": None, "prediction": answer.prediction}
    else:
        columns = network.task.answer_columns(answer.prediction, volume, classes)
        texts.append(", ".join(f"{name.replace('_', ' ')} {_format_cell(value)}" for name, value in columns.items()))
    side = SIDE_PIXELS[volume.spatial_dims]
    picture = draw_case(volume, label_maps, classes, side=side, text=". ".join(texts))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, buffer.getvalue())


def _format_cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float | np.floating) else str(value)
