"""Input size and depth after the images: what a configuration leaves `auto` is filled in from the index's median image.

Everything here is arithmetic on shapes in voxels and spacings in mm; `AUTO_RULES` says the rules in words, and
`medim config show` prints them. The numbers stand in the resolved configuration, so a run's own file holds no `auto`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from medim.config import AUTO, Command, RunConfig, Section, auto_keys, check_config, validate_section
from medim.data.index.index import Index
from medim.data.preprocessing.steps import STEPS
from medim.models.model import build_encoder
from medim.types import Step, UsageError

log = logging.getLogger(__name__)
Shape = tuple[int, ...]
Spacing = tuple[float, ...]

VIEW_VOXELS = 64**3  # largest view of pretraining and segmentation
WHOLE_VOXELS = 2_500_000  # largest view of classification, which sees an image whole
VIEWS_PER_IMAGE = 16  # more views' worth of voxels in the median image make the voxels larger
LONGEST_SIDE = 224  # of a resized image
SMALLEST_GRID = 6  # cells along the shortest side of the coarsest map
LEVELS = (3, 6)  # fewest and most
MAX_CHANNELS = 256  # channels
BASE_CHANNELS: dict[str, int] = {"mri": 16, "xray": 32}  # channels of the finest map; they double a level
USUAL_SIZES: dict[str, tuple[Shape, Spacing]] = {  # to check a configuration before an image is read
    "mri": ((256, 256, 176), (1.0, 1.0, 1.0)),
    "xray": ((2500, 2048), (0.15, 0.15)),
}
AUTO_RULES = {
    "resample.spacing": "the median spacing; where the median image holds more than "
    f"{VIEWS_PER_IMAGE} views, all axes are made coarser by one factor",
    "resize.shape": f"the median aspect ratio, the longest side at most {LONGEST_SIDE}, in whole coarsest strides",
    "views.shape": f"the median image, its longest sides cut to hold at most {VIEW_VOXELS:,} voxels "
    f"({WHOLE_VOXELS:,} for classification), in whole coarsest strides",
    "encoder.channels": f"{LEVELS[0]} to {LEVELS[1]} levels, the most that leave {SMALLEST_GRID} cells along each side "
    f"of the coarsest map; {BASE_CHANNELS['mri']} (mri) or {BASE_CHANNELS['xray']} (xray) channels, doubled a "
    f"level up to {MAX_CHANNELS}",
    "inference.roi": "the shape of the views",
    "inference.multiple_of": "the coarsest stride",
}


def resolve_run_config(command: Command, content: Section, index: Index | None, *, where: str) -> RunConfig:
    """Fill in what a configuration leaves `auto`, and check it.

    Args:
        command: whose keys.
        content: of a YAML file, with overrides.
        index: the images to follow; None takes an image of the usual size, to check the rest before images are read.
        where: the file's name, for messages.

    Raises:
        UsageError: see `medim.config.check_config` and `resolve_auto`.
    """
    default_size = USUAL_SIZES.get(str(content.get("modality")), ((), ()))
    config = check_config(
        command, resolve_auto(content, *(median_size(index) if index else default_size)), source=where
    )
    if index and auto_keys(content):
        sizes = describe_input(config, index)
        log.info("input %s, from the median image %s", sizes["input"], sizes["median image"])
    return config


def median_size(index: Index) -> tuple[Shape, Spacing]:
    """Median shape in voxels and spacing in mm of an index's images, an axis at a time (RAS order in 3D)."""
    shape = np.median([record.shape for record in index.records], axis=0)
    spacing = np.median([record.spacing for record in index.records], axis=0)
    return tuple(round(float(n)) for n in shape), tuple(round(float(mm), 4) for mm in spacing)


def describe_input(config: RunConfig, index: Index) -> dict[str, str]:
    """What a run feeds its encoder, and the median image it comes from, for a reader."""
    shape, spacing = median_size(index)
    spacings = [step["spacing"] for step in config.preprocessing if step.get("op") == "resample"]
    channels = config.encoder.get("channels")
    input_text = _format_dimensions(config.views.shape) + (
        f" at {_format_dimensions(spacings[-1])} mm" if spacings else ""
    )
    return {
        "input": input_text + (f", {len(channels)} levels" if channels else ""),
        "median image": f"{_format_dimensions(shape)} at {_format_dimensions(spacing)} mm",
    }


def resolve_auto(content: Section, shape: Shape, spacing: Spacing) -> Section:
    """Replace every `auto` that has a rule by numbers that fit the median image; what is given stays as it is.

    The deepest encoder is taken whose coarsest map keeps `SMALLEST_GRID` cells along every side.

    Args:
        content: a configuration, unchecked; where its parts have not their form, it comes back as it is.
        shape: of the median image, in voxels.
        spacing: of the median image, in mm.

    Raises:
        UsageError: a section does not fit its constructor.
    """
    if not auto_keys(content) or not _has_form(content):
        return content
    result = content
    for encoder in _list_depths(content["encoder"], content["modality"]):
        stride = coarsest_stride(encoder, len(shape))
        result = _fill_for_stride({**content, "encoder": encoder}, shape, spacing, stride)
        if all(n % stride == 0 and n // stride >= SMALLEST_GRID for n in result["views"]["shape"]):
            break
    return result


def _has_form(content: Section) -> bool:
    """Whether what the rules look at is there; where it is not, `medim.config.check_config` says so."""
    encoder, views, steps = (content.get(key) for key in ("encoder", "views", "preprocessing"))
    if (
        str(content.get("modality")) not in BASE_CHANNELS
        or not isinstance(encoder, dict)
        or not isinstance(views, dict)
    ):
        return False
    sides = views.get("shape")
    is_explicit = isinstance(sides, list | tuple) and all(isinstance(n, int) and n > 0 for n in sides)
    return (is_explicit or sides == AUTO) and isinstance(steps, list) and all(isinstance(step, dict) for step in steps)


def _list_depths(encoder: Section, modality: str) -> Iterator[Section]:
    """The encoder at every depth it may have, deepest first; as it is where its channels are given."""
    if encoder.get("channels") != AUTO:
        yield encoder
        return
    lowest, highest = LEVELS
    for levels in range(highest, lowest - 1, -1):
        yield {
            **encoder,
            "channels": [min(BASE_CHANNELS[modality] * 2**level, MAX_CHANNELS) for level in range(levels)],
        }


def coarsest_stride(encoder: Section, spatial_dims: int) -> int:
    """Voxels a cell of the encoder's last map stands for; the network is built without memory for its weights."""
    shape = (2 ** (LEVELS[1] + 1),) * spatial_dims
    try:
        with torch.device("meta"):
            network: Any = build_encoder(
                {"encoder": encoder, "in_channels": 1, "spatial_dims": spatial_dims, "input_shape": shape}
            )
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"encoder {encoder.get('name')!r}: expected options that fit each other ({error}).") from error
    return int(network.strides[-1])


def _fill_for_stride(content: Section, shape: Shape, spacing: Spacing, stride: int) -> Section:
    """The configuration with every number for an encoder of a known stride."""
    views = content["views"]
    view_shape = None if views["shape"] == AUTO else tuple(views["shape"])
    steps = []
    for step in content["preprocessing"]:
        if step.get("op") == "resample" and step.get("spacing") == AUTO:
            step = {
                **step,
                "spacing": _choose_spacing(shape, spacing, math.prod(view_shape) if view_shape else VIEW_VOXELS),
            }
        if step.get("op") == "resize" and step.get("shape") == AUTO:
            step = {**step, "shape": list(view_shape or _choose_resize_shape(shape, spacing, stride))}
        steps.append(step)
        shape, spacing = _apply_step_geometry(step, shape, spacing)
    max_voxels = WHOLE_VOXELS if content.get("task") == "classification" else VIEW_VOXELS
    sides = list(view_shape or _shorten_sides(shape, stride, max_voxels))
    result = {**content, "preprocessing": steps, "views": {**views, "shape": sides}}
    if isinstance(inference := content.get("inference"), dict):
        rules = {"roi": sides, "multiple_of": stride}
        result["inference"] = {
            key: rules.get(key, AUTO) if value == AUTO else value for key, value in inference.items()
        }
    return result


def _choose_spacing(shape: Shape, spacing: Spacing, view: int) -> list[float]:
    """The spacing at which an image holds at most `VIEWS_PER_IMAGE` views of so many voxels.

    A spacing that is kept is rounded by less than what `resample` keeps as it is, so that no voxel is interpolated.
    """
    factor = (math.prod(shape) / (VIEWS_PER_IMAGE * view)) ** (1 / len(shape))
    return [float(f"{mm * factor:.2g}") if factor > 1 else round(mm, 3) for mm in spacing]


def _choose_resize_shape(shape: Shape, spacing: Spacing, stride: int) -> Shape:
    """A shape of the image's aspect ratio in mm, in whole strides."""
    extent = [n * mm for n, mm in zip(shape, spacing, strict=True)]
    scale = min(LONGEST_SIDE, max(shape)) / max(extent)
    return tuple(max(1, round(mm * scale / stride)) * stride for mm in extent)


def _shorten_sides(shape: Shape, stride: int, voxels: int) -> Shape:
    """The image in whole strides, its longest side shortened until it holds no more than so many voxels."""
    sides = [-(-n // stride) * stride for n in shape]
    while math.prod(sides) > voxels and max(sides) > stride:
        sides[sides.index(max(sides))] -= stride
    return tuple(sides)


def _apply_step_geometry(step: Step, shape: Shape, spacing: Spacing) -> tuple[Shape, Spacing]:
    """Shape and spacing of an image after a preprocessing step, as far as they do not depend on its voxels."""
    _, options = validate_section(STEPS, step, key="op", run_args=("volume",))
    new = options.get("spacing", options.get("shape", shape))
    if len(new) != len(shape) or min(new) <= 0:
        return shape, spacing  # the step itself says what is wrong
    if step["op"] == "resample":
        return tuple(round((n - 1) * a / b) + 1 for n, a, b in zip(shape, spacing, new, strict=True)), new
    if step["op"] == "resize":
        return new, tuple(n * mm / m for n, mm, m in zip(shape, spacing, new, strict=True))
    if step["op"] in ("pad_or_crop", "centre"):
        return new, spacing
    return shape, spacing


def _format_dimensions(numbers: Sequence[float]) -> str:
    return "x".join(f"{n:.4g}" for n in numbers)
