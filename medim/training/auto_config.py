"""Resolve the `auto` values of a configuration from the median image of the index.

The rules compute with shapes in voxels and spacings in mm. `AUTO_RULES` describes them in words, and `medim config
show` prints them. The resolved configuration of a run contains the numbers and no `auto`.
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
from medim.model_spec import NetworkSpec
from medim.models.model import build_encoder
from medim.tasks import find_task
from medim.types import Step, UsageError

log = logging.getLogger(__name__)
Shape = tuple[int, ...]
Spacing = tuple[float, ...]

VIEW_VOXELS = 64**3  # largest view of pretraining and segmentation
WHOLE_VOXELS = 2_500_000  # largest view of classification, which uses whole images
VIEWS_PER_IMAGE = 16  # the voxels are made larger if the median image has more voxels than this number of views
LONGEST_SIDE = 224  # longest side of a resized image, in pixels
SMALLEST_GRID = 6  # smallest number of cells per side of the coarsest map
LEVELS = (3, 6)  # smallest and largest number of levels
MAX_CHANNELS = 256  # channels
BASE_CHANNELS: dict[str, int] = {"mri": 16, "xray": 32}  # channels of the finest map, doubled per level
USUAL_SIZES: dict[str, tuple[Shape, Spacing]] = {  # to check a configuration before images are read
    "mri": ((256, 256, 176), (1.0, 1.0, 1.0)),
    "xray": ((2500, 2048), (0.15, 0.15)),
}
AUTO_RULES = {
    "resample.spacing": "the median spacing; if the median image has more voxels than "
    f"{VIEWS_PER_IMAGE} views, all axes are made coarser by one factor",
    "resize.shape": f"the median aspect ratio, the longest side at most {LONGEST_SIDE}, in whole coarsest strides",
    "views.shape": f"the median image, its longest sides shortened to at most {VIEW_VOXELS:,} voxels "
    f"({WHOLE_VOXELS:,} for classification), in whole coarsest strides",
    "encoder.channels": f"{LEVELS[0]} to {LEVELS[1]} levels, the most that leave {SMALLEST_GRID} cells along each side "
    f"of the coarsest map; {BASE_CHANNELS['mri']} (mri) or {BASE_CHANNELS['xray']} (xray) channels, doubled per "
    f"level up to {MAX_CHANNELS}",
    "inference.roi": "the shape of the views",
    "inference.multiple_of": "the coarsest stride",
}


def resolve_run_config(command: Command, content: Section, index: Index | None, *, where: str) -> RunConfig:
    """Resolve the `auto` values of a configuration, and validate it.

    Args:
        command: command of the configuration.
        content: content of a YAML file, with overrides.
        index: index of the images; None uses an image of typical size, to check the configuration before images are
            read.
        where: name of the file, for messages.

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
    """Compute the median shape in voxels and spacing in mm of the images per axis (RAS order in 3D)."""
    shape = np.median([record.shape for record in index.records], axis=0)
    spacing = np.median([record.spacing for record in index.records], axis=0)
    return tuple(round(float(n)) for n in shape), tuple(round(float(mm), 4) for mm in spacing)


def describe_input(config: RunConfig, index: Index) -> dict[str, str]:
    """Describe the input of the encoder and the median image that determined it."""
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
    """Replace every `auto` that has a rule by numbers for the median image; given values are not changed.

    The encoder is the deepest with at least `SMALLEST_GRID` cells per side of the coarsest map.

    Args:
        content: configuration before validation; if its structure is invalid, it is returned unchanged.
        shape: shape of the median image, in voxels.
        spacing: spacing of the median image, in mm.

    Raises:
        UsageError: the options of a section do not match its constructor.

    Examples:
        >>> content = {"modality": "mri", "preprocessing": [{"op": "ras"}], "views": {"shape": "auto"}}
        >>> content |= {"encoder": {"name": "unet", "channels": "auto"}}
        >>> result = resolve_auto(content, (36, 50, 35), (1.0, 1.0, 1.0))
        >>> result["views"]["shape"], result["encoder"]["channels"]
        ([36, 52, 36], [16, 32, 64])
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
    """Whether the sections that the rules use are valid; if not, `medim.config.check_config` reports the error."""
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
    """Yield the encoder at every allowed depth, deepest first; unchanged if its channels are given."""
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
    """Compute the stride of the last map of the encoder in voxels; the network is built without memory for weights."""
    shape = (2 ** (LEVELS[1] + 1),) * spatial_dims
    try:
        with torch.device("meta"):
            network: Any = build_encoder(
                NetworkSpec(encoder=encoder, in_channels=1, spatial_dims=spatial_dims, input_shape=shape)
            )
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"encoder {encoder.get('name')!r}: the options are inconsistent ({error}).") from error
    return int(network.strides[-1])


def _fill_for_stride(content: Section, shape: Shape, spacing: Spacing, stride: int) -> Section:
    """Resolve all `auto` values for an encoder with the given stride."""
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
    task = content.get("task")  # None in pretraining
    max_voxels = WHOLE_VOXELS if task and find_task(task).whole_views else VIEW_VOXELS
    sides = list(view_shape or _shorten_sides(shape, stride, max_voxels))
    result = {**content, "preprocessing": steps, "views": {**views, "shape": sides}}
    if isinstance(inference := content.get("inference"), dict):
        rules = {"roi": sides, "multiple_of": stride}
        result["inference"] = {
            key: rules.get(key, AUTO) if value == AUTO else value for key, value in inference.items()
        }
    return result


def _choose_spacing(shape: Shape, spacing: Spacing, view: int) -> list[float]:
    """Compute the spacing at which an image has at most `VIEWS_PER_IMAGE` times the voxels of a view.

    An unchanged spacing is rounded by less than the tolerance of `resample`, so that no voxel is interpolated.
    """
    factor = (math.prod(shape) / (VIEWS_PER_IMAGE * view)) ** (1 / len(shape))
    return [float(f"{mm * factor:.2g}") if factor > 1 else round(mm, 3) for mm in spacing]


def _choose_resize_shape(shape: Shape, spacing: Spacing, stride: int) -> Shape:
    """Compute a shape with the aspect ratio of the image in mm, in whole strides."""
    extent = [n * mm for n, mm in zip(shape, spacing, strict=True)]
    scale = min(LONGEST_SIDE, max(shape)) / max(extent)
    return tuple(max(1, round(mm * scale / stride)) * stride for mm in extent)


def _shorten_sides(shape: Shape, stride: int, voxels: int) -> Shape:
    """Round the shape up to whole strides, and shorten the longest side until it has at most `voxels` voxels."""
    sides = [-(-n // stride) * stride for n in shape]
    while math.prod(sides) > voxels and max(sides) > stride:
        sides[sides.index(max(sides))] -= stride
    return tuple(sides)


def _apply_step_geometry(step: Step, shape: Shape, spacing: Spacing) -> tuple[Shape, Spacing]:
    """Compute shape and spacing after a preprocessing step, as far as they do not depend on voxel values."""
    _, options = validate_section(STEPS, step, key="op", run_args=("volume",))
    new = options.get("spacing", options.get("shape", shape))
    if len(new) != len(shape) or min(new) <= 0:
        return shape, spacing  # the step itself reports the error
    if step["op"] == "resample":
        return tuple(round((n - 1) * a / b) + 1 for n, a, b in zip(shape, spacing, new, strict=True)), new
    if step["op"] == "resize":
        return new, tuple(n * mm / m for n, mm, m in zip(shape, spacing, new, strict=True))
    if step["op"] in ("pad_or_crop", "centre"):
        return new, spacing
    return shape, spacing


def _format_dimensions(numbers: Sequence[float]) -> str:
    return "x".join(f"{n:.4g}" for n in numbers)
