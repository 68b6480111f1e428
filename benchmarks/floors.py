"""Floor of each objective: its minimum arithmetic without the overhead of medim.

A part is one matrix product, convolution, norm or softmax, forward and backward, on random tensors of the sizes that
the method requires. `FLOORS` lists the parts of each objective, derived from the formulas of the papers and not from
the code of medim. Activations, sums, indices, masks and copies are omitted; their cost is above the floor.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from medim.models.critics import CRITICS
from medim.models.decoders import ImageDecoder
from medim.objectives import OBJECTIVES

FloorPart = Callable[[], object]
CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def build_floor_parts(section: dict[str, Any], **sizes: Any) -> list[FloorPart]:
    """Build the parts of an objective.

    Args:
        section: section of the objective in a config.
        **sizes: output of `medim.objectives.objective.encoder_info`, `view_count`, and `images`, the batch size.
    """
    return FLOORS[section["name"]](SimpleNamespace(**sizes | _fill_defaults(OBJECTIVES, section)))


def build_local_dim_parts(options: Any) -> list[FloorPart]:
    """Build the parts of `local_dim`: per view, critic, scores and softmax of summaries and local features."""
    cells, globals_ = math.prod(options.grids[options.feature_level]), 1
    if options.summary_level is not None:
        globals_ = math.prod(options.grids[options.summary_level])
        options.summary_channels = options.channels[options.summary_level]
    parts: list[FloorPart] = options.view_count * _build_contrast_parts(
        options, options.channels[options.feature_level], cells, globals_
    )
    return parts + _build_batch_norm_parts(options, globals_)


def build_global_dim_parts(options: Any) -> list[FloorPart]:
    """Build the parts of `global_dim`: convolutions over the map, then as `local_dim` with one feature per image."""
    dims, grid, width = (
        len(options.grids[options.feature_level]),
        options.grids[options.feature_level],
        options.channels[options.feature_level],
    )
    parts: list[FloorPart] = []
    for wider in options.reduce:
        parts.append(build_convolution((options.images * options.view_count, width, *grid), wider, (3,) * dims))
        grid, width = tuple(side - 2 for side in grid), wider
    parts += options.view_count * _build_contrast_parts(options, width * math.prod(grid), 1, 1)
    return parts + _build_batch_norm_parts(options, 1)


def _build_contrast_parts(options: Any, channels: int, cells: int, globals_: int) -> list[FloorPart]:
    """Build the parts of a critic and the softmax over its scores."""
    critic = SimpleNamespace(**_fill_defaults(CRITICS, options.critic))
    locals_, summaries = options.images * cells, options.images * globals_
    score_count = locals_ if options.negatives == "all" else 2 * cells  # scores per summary
    if critic.name == "encode_and_dot":
        parts = _build_embedding_parts(options.images, channels, cells, critic.width, critic.local_norm)
        parts += _build_embedding_parts(
            options.images, options.summary_channels, globals_, critic.width, critic.summary_norm
        )
        parts += [build_linear(summaries, critic.width, locals_)]
    elif critic.name == "concat_and_convolve":
        first, *_ = critic.hidden
        parts = [build_linear(locals_, channels, first), build_linear(summaries, options.summary_channels, first)]
        parts += [build_linear(summaries * score_count, *widths) for widths in pairwise((*critic.hidden, 1))]
    else:
        parts = [
            build_linear(summaries, options.summary_channels, channels),
            build_linear(summaries, channels, locals_),
        ]
    return [*parts, build_softmax(summaries, score_count)]


def _build_embedding_parts(images: int, channels: int, cells: int, width: int, norm: str) -> list[FloorPart]:
    """Build the parts of an encode-and-dot embedding: two layers with batch norm between, a shortcut and a norm."""
    input_shape, hidden_shape = (images, channels, cells), (images, width, cells)
    norms = {"layer": [build_layer_norm(images * cells, width)], "batch": [build_batch_norm(hidden_shape)], "none": []}
    layers = [build_convolution(shape, width, (1,)) for shape in (input_shape, hidden_shape, input_shape)]
    return [*layers, build_batch_norm(hidden_shape), *norms[norm]]


def _build_batch_norm_parts(options: Any, globals_: int) -> list[FloorPart]:
    return (
        [build_batch_norm((options.images * options.view_count, options.summary_channels, globals_))]
        if options.batch_norm_summary
        else []
    )


def build_coordinates_parts(options: Any) -> list[FloorPart]:
    """Build the parts of `coordinates`: per point, two hidden layers with batch norm, and one softmax per axis."""
    grid = options.grids[options.feature_level]
    rows = options.images * options.view_count * min(options.points or math.inf, math.prod(grid))
    width = (
        options.channels[options.feature_level] * (1 + (options.kind == "relative"))
        + options.use_summary * options.summary_channels
    )
    classes = [2 * side - 1 if options.kind == "relative" else side for side in grid]
    layers = [build_linear(rows, *widths) for widths in pairwise((width, options.hidden, options.hidden, sum(classes)))]
    return [
        *layers,
        *2 * [build_batch_norm((rows, options.hidden))],
        *(build_softmax(rows, count) for count in classes),
    ]


def build_prior_matching_parts(options: Any) -> list[FloorPart]:
    """Build the parts of `prior_matching`.

    The step of the discriminator processes prior samples and summaries, and the gradient penalty; the step of the
    encoder processes the summaries.
    """
    rows = options.images * options.view_count
    return [
        build_linear(count, *widths)
        for widths in pairwise((options.summary_channels, *options.hidden, 1))
        for count in (2 * rows, 2 * rows, rows)
    ]


def build_reconstruction_parts(options: Any) -> list[FloorPart]:
    """Build the part of `reconstruction`: projection of decoded voxels to the image."""
    shape = (options.images * options.view_count, options.decoded_channels, *options.input_shape)
    return [build_convolution(shape, options.in_channels, (1,) * len(options.input_shape))]


def build_dense_dim_parts(options: Any) -> list[FloorPart]:
    """Build the parts of `dense_dim`: projections at the points, scores and softmax per image or over the batch."""
    rows, width = options.images * options.points, options.width
    groups, points = (options.images, options.points) if options.negatives == "same_image" else (1, rows)
    projection = [build_linear(rows, options.decoded_channels, width), build_linear(rows, width, width)]
    scores = build_operation(torch.bmm, (groups, points, width), (groups, width, points))
    return [*2 * projection, scores, build_softmax(rows, points)]


def build_cpc_parts(options: Any) -> list[FloorPart]:
    """Build the parts of `cpc`.

    These are the gated convolutions of the context, and per predicted step: prediction, scores of all local features in
    its rows, and softmax.
    """
    grid, width, images = (
        options.grids[options.feature_level],
        options.channels[options.feature_level],
        options.images * options.view_count,
    )
    rows, *rest = grid
    context_shape = (images, width, rows + 1, *(side + 2 for side in rest))
    gate = build_convolution(context_shape, 2 * width, (2, *(3 for _ in rest)))
    parts: list[FloorPart] = options.layers * [gate, build_convolution((images, width, *grid), width, (1,) * len(grid))]
    for ahead in range(options.skip + 1, min(options.skip + options.steps, rows - 1) + 1):
        count = images * (rows - ahead) * math.prod(rest)
        parts += [build_linear(count, width, width), build_linear(count, width, count), build_softmax(count, count)]
    return parts


def build_vae_parts(options: Any) -> list[FloorPart]:
    """Build the parts of `vae`: standard deviations from the last map, and the decoder."""
    images, channels = options.images * options.view_count, options.channels[-1]
    decoder = ImageDecoder(
        options.summary_channels,
        options.in_channels,
        options.input_shape,
        channels=tuple(options.decoder_channels),
        norm=options.norm,
    )
    weights = dict(decoder.named_parameters())

    def run_decoder(summary: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = torch.func.functional_call(decoder, dict(zip(weights, values, strict=True)), summary)
        return image

    shapes = [(images, options.summary_channels), *(tuple(weight.shape) for weight in weights.values())]
    return [build_linear(images, 2 * channels, options.summary_channels), build_operation(run_decoder, *shapes)]


def build_amdim_parts(options: Any) -> list[FloorPart]:
    """Build the parts of `amdim`: heads on maps and summary; scores and softmax of three pairs in both directions."""
    images, width = options.images * options.view_count, options.width
    parts = [build_batch_norm((images, width))]
    if options.summary_channels != width:
        parts.append(build_linear(images, options.summary_channels, width))
    first, second = (math.prod(options.grids[level]) for level in options.feature_levels)
    for level, cells in zip(options.feature_levels, (first, second), strict=True):
        input_shape, hidden_shape = (images, options.channels[level], cells), (images, width, cells)
        parts += [build_convolution(shape, width, (1,)) for shape in (input_shape, hidden_shape, input_shape)] + [
            build_batch_norm(hidden_shape)
        ]
    for cells in (first, second, first):
        parts += 2 * [
            build_linear(options.images, width, options.images * cells),
            build_softmax(options.images, options.images * cells),
        ]
    return parts


def build_simclr_parts(options: Any) -> list[FloorPart]:
    """Build the parts of `simclr`: two layers on the summary of each view; scores and softmax of all pairs of views."""
    images = options.images * options.view_count
    widths = (options.summary_channels, options.hidden or options.summary_channels, options.width)
    return [
        *(build_linear(images, *pair) for pair in pairwise(widths)),
        build_linear(images, options.width, images),
        build_softmax(images, images),
    ]


FLOORS: dict[str, Callable[[Any], list[FloorPart]]] = {
    "local_dim": build_local_dim_parts,
    "global_dim": build_global_dim_parts,
    "coordinates": build_coordinates_parts,
    "prior_matching": build_prior_matching_parts,
    "reconstruction": build_reconstruction_parts,
    "cpc": build_cpc_parts,
    "vae": build_vae_parts,
    "beta_vae": build_vae_parts,
    "dense_dim": build_dense_dim_parts,
    "amdim": build_amdim_parts,
    "simclr": build_simclr_parts,
}


def build_operation(function: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> FloorPart:
    """Build the forward and backward pass of a function on random tensors."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    slope = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, slope)


def build_linear(rows: int, in_features: int, out_features: int) -> FloorPart:
    """Build a matrix product of (rows, in_features) and (in_features, out_features)."""
    return build_operation(F.linear, (rows, in_features), (out_features, in_features))


def build_convolution(shape: tuple[int, ...], out_channels: int, kernel: tuple[int, ...]) -> FloorPart:
    """Build an unpadded convolution of (N, C, ...)."""
    return build_operation(CONVOLUTIONS[len(kernel)], shape, (out_channels, shape[1], *kernel))


def build_batch_norm(shape: tuple[int, ...]) -> FloorPart:
    """Build a batch norm of (N, C, ...) over all axes except C."""
    return build_operation(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), shape, shape[1:2], shape[1:2]
    )


def build_layer_norm(rows: int, width: int) -> FloorPart:
    """Build a layer norm of (rows, width) over width."""
    return build_operation(lambda x, w, b: F.layer_norm(x, (width,), w, b), (rows, width), (width,), (width,))


def build_softmax(rows: int, classes: int) -> FloorPart:
    """Build a log-softmax over the classes of each row."""
    return build_operation(lambda x: F.log_softmax(x, dim=1), (rows, classes))


def _fill_defaults(table: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """Add default values of missing options to a section."""
    parameters = inspect.signature(table[section["name"]]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | section
