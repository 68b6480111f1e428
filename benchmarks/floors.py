"""The floor of each objective: what its arithmetic costs alone, without what surrounds it in medim.

A part is one matrix product, convolution, norm or softmax, forward and backward, on random tensors of the sizes that
the method needs. `FLOORS` gives each objective's parts, counted from the papers' formulas and not from medim's code.
Activations, sums, indices, masks and copies are left out: what they cost lies above the floor.
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

Part = Callable[[], object]
CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def floor(section: dict[str, Any], **sizes: Any) -> list[Part]:
    """The parts of an objective.

    Args:
        section: the objective's, as in a config.
        **sizes: what `medim.objectives.objective.known` says, `view_count`, and the number `images` of a batch.
    """
    return FLOORS[section["name"]](SimpleNamespace(**sizes | _options(OBJECTIVES, section)))


def local_dim(o: Any) -> list[Part]:
    """In every view: critic, scores and softmax of summaries against locals."""
    cells, globals_ = math.prod(o.grids[o.level]), 1
    if o.summary_level is not None:
        globals_ = math.prod(o.grids[o.summary_level])
        o.summary_channels = o.channels[o.summary_level]
    parts: list[Part] = o.view_count * _contrast(o, o.channels[o.level], cells, globals_)
    return parts + _standardise(o, globals_)


def global_dim(o: Any) -> list[Part]:
    """The convolutions over the map, where there are any; then the same, with one local an image."""
    dims, grid, width = len(o.grids[o.level]), o.grids[o.level], o.channels[o.level]
    parts: list[Part] = []
    for wider in o.reduce:
        parts.append(convolution((o.images * o.view_count, width, *grid), wider, (3,) * dims))
        grid, width = tuple(side - 2 for side in grid), wider
    parts += o.view_count * _contrast(o, width * math.prod(grid), 1, 1)
    return parts + _standardise(o, 1)


def _contrast(o: Any, channels: int, cells: int, globals_: int) -> list[Part]:
    """The critic and the softmax over its scores."""
    critic = SimpleNamespace(**_options(CRITICS, o.critic))
    locals_, summaries = o.images * cells, o.images * globals_
    met = locals_ if o.negatives == "all" else 2 * cells  # by each summary
    if critic.name == "encode_and_dot":
        parts = _embedding(o.images, channels, cells, critic.width, critic.local_norm)
        parts += _embedding(o.images, o.summary_channels, globals_, critic.width, critic.summary_norm)
        parts += [linear(summaries, critic.width, locals_)]
    elif critic.name == "concat_and_convolve":
        first, *_ = critic.hidden
        parts = [linear(locals_, channels, first), linear(summaries, o.summary_channels, first)]
        parts += [linear(summaries * met, *widths) for widths in pairwise((*critic.hidden, 1))]
    else:
        parts = [linear(summaries, o.summary_channels, channels), linear(summaries, channels, locals_)]
    return [*parts, softmax(summaries, met)]


def _embedding(images: int, channels: int, cells: int, width: int, norm: str) -> list[Part]:
    """Of encode-and-dot: two layers with BN between, a shortcut, and a norm."""
    into, inside = (images, channels, cells), (images, width, cells)
    norms = {"layer": [layer_norm(images * cells, width)], "batch": [batch_norm(inside)], "none": []}
    layers = [convolution(shape, width, (1,)) for shape in (into, inside, into)]
    return [*layers, batch_norm(inside), *norms[norm]]


def _standardise(o: Any, globals_: int) -> list[Part]:
    return [batch_norm((o.images * o.view_count, o.summary_channels, globals_))] if o.standardise else []


def coordinates(o: Any) -> list[Part]:
    """Two hidden layers with BN, and a softmax an axis, at the points of every view."""
    grid = o.grids[o.level]
    rows = o.images * o.view_count * min(o.points or math.inf, math.prod(grid))
    width = o.channels[o.level] * (1 + (o.kind == "relative")) + o.see_summary * o.summary_channels
    classes = [2 * side - 1 if o.kind == "relative" else side for side in grid]
    layers = [linear(rows, *widths) for widths in pairwise((width, o.hidden, o.hidden, sum(classes)))]
    return [*layers, *2 * [batch_norm((rows, o.hidden))], *(softmax(rows, count) for count in classes)]


def prior_matching(o: Any) -> list[Part]:
    """Its own step: prior and summaries through D, and once more for the slope of the penalty; then the encoder's."""
    rows = o.images * o.view_count
    return [
        linear(count, *widths)
        for widths in pairwise((o.summary_channels, *o.hidden, 1))
        for count in (2 * rows, 2 * rows, rows)
    ]


def reconstruction(o: Any) -> list[Part]:
    """From decoded voxels to the image."""
    shape = (o.images * o.view_count, o.decoded_channels, *o.input_shape)
    return [convolution(shape, o.in_channels, (1,) * len(o.input_shape))]


def dense_dim(o: Any) -> list[Part]:
    """Both sides projected at the points, scores and softmax within each image, or over the batch."""
    rows, width = o.images * o.points, o.width
    groups, points = (o.images, o.points) if o.negatives == "same_image" else (1, rows)
    projection = [linear(rows, o.decoded_channels, width), linear(rows, width, width)]
    scores = operation(torch.bmm, (groups, points, width), (groups, width, points))
    return [*2 * projection, scores, softmax(rows, points)]


def cpc(o: Any) -> list[Part]:
    """The context's gated convolutions; a step: prediction, scores of all locals of its rows, softmax."""
    grid, width, images = o.grids[o.level], o.channels[o.level], o.images * o.view_count
    rows, *rest = grid
    padded = (images, width, rows + 1, *(side + 2 for side in rest))
    gated = convolution(padded, 2 * width, (2, *(3 for _ in rest)))
    parts: list[Part] = o.layers * [gated, convolution((images, width, *grid), width, (1,) * len(grid))]
    for ahead in range(o.skip + 1, min(o.skip + o.steps, rows - 1) + 1):
        count = images * (rows - ahead) * math.prod(rest)
        parts += [linear(count, width, width), linear(count, width, count), softmax(count, count)]
    return parts


def vae(o: Any) -> list[Part]:
    """The spread from the last map, and the decoder."""
    images, channels = o.images * o.view_count, o.channels[-1]
    decoder = ImageDecoder(
        o.summary_channels, o.in_channels, o.input_shape, channels=tuple(o.decoder_channels), norm=o.norm
    )
    weights = dict(decoder.named_parameters())

    def decode(summary: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        drawn: torch.Tensor = torch.func.functional_call(decoder, dict(zip(weights, values, strict=True)), summary)
        return drawn

    shapes = [(images, o.summary_channels), *(tuple(weight.shape) for weight in weights.values())]
    return [linear(images, 2 * channels, o.summary_channels), operation(decode, *shapes)]


def amdim(o: Any) -> list[Part]:
    """A head on each map and one on the summary; scores and softmax of three pairs, in both directions."""
    images, width = o.images * o.view_count, o.width
    parts = [batch_norm((images, width))]
    if o.summary_channels != width:
        parts.append(linear(images, o.summary_channels, width))
    first, second = (math.prod(o.grids[level]) for level in o.levels)
    for level, cells in zip(o.levels, (first, second), strict=True):
        into, inside = (images, o.channels[level], cells), (images, width, cells)
        parts += [convolution(shape, width, (1,)) for shape in (into, inside, into)] + [batch_norm(inside)]
    for cells in (first, second, first):
        parts += 2 * [linear(o.images, width, o.images * cells), softmax(o.images, o.images * cells)]
    return parts


def simclr(o: Any) -> list[Part]:
    """Two layers on the summary of every view; scores and softmax of every view against every view."""
    images = o.images * o.view_count
    widths = (o.summary_channels, o.hidden or o.summary_channels, o.width)
    return [
        *(linear(images, *pair) for pair in pairwise(widths)),
        linear(images, o.width, images),
        softmax(images, images),
    ]


FLOORS: dict[str, Callable[[Any], list[Part]]] = {
    "local_dim": local_dim,
    "global_dim": global_dim,
    "coordinates": coordinates,
    "prior_matching": prior_matching,
    "reconstruction": reconstruction,
    "cpc": cpc,
    "vae": vae,
    "beta_vae": vae,
    "dense_dim": dense_dim,
    "amdim": amdim,
    "simclr": simclr,
}


def operation(function: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> Part:
    """Forward and backward pass of a function on random tensors of these shapes."""
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    slope = torch.randn_like(function(*given))
    return lambda: torch.autograd.grad(function(*given), given, slope)


def linear(rows: int, before: int, after: int) -> Part:
    """A matrix product: (rows, before) and (before, after)."""
    return operation(F.linear, (rows, before), (after, before))


def convolution(shape: tuple[int, ...], after: int, kernel: tuple[int, ...]) -> Part:
    """An unpadded convolution of (N, C, ...)."""
    return operation(CONVOLUTIONS[len(kernel)], shape, (after, shape[1], *kernel))


def batch_norm(shape: tuple[int, ...]) -> Part:
    """Of (N, C, ...) over all but C."""
    return operation(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), shape, shape[1:2], shape[1:2])


def layer_norm(rows: int, width: int) -> Part:
    """Of (rows, width) over width."""
    return operation(lambda x, w, b: F.layer_norm(x, (width,), w, b), (rows, width), (width,), (width,))


def softmax(rows: int, classes: int) -> Part:
    """The logarithm of a softmax over the classes of each row."""
    return operation(lambda x: F.log_softmax(x, dim=1), (rows, classes))


def _options(table: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """A section, with the defaults of what it leaves out."""
    parameters = inspect.signature(table[section["name"]]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | section
