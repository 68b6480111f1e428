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

from medim.config import bind
from medim.data.preprocessing.quality import measure
from medim.data.preprocessing.steps import preprocess, restore
from medim.inference.ood import Both, Reference, Verdict, Watch, rows_of
from medim.types import Array, Modality, Step, UserError, Volume

Run = Callable[[Array], Array]  # (N, C, ...) float32 in; (N, K, ...) logits, or (N, K), out
Kind = Literal["encoder", "segmenter", "classifier", "multi_label_classifier"]
SIGMA = 0.125  # of the Gaussian that blends windows, over the side of the window (MONAI's and nnU-Net's)


def whole(run: Run, image: Array, *, multiple_of: int = 1) -> Array:
    """Run the image at once, padded around the centre with each channel's minimum to what the network's strides divide.

    Args:
        run: the network.
        image: (C, ...).
        multiple_of: the network's coarsest stride.

    Returns:
        (K, ...) on the image's grid, or (K,) where the network has no grid.
    """
    padded, inside = _padded(image, [-(-n // multiple_of) * multiple_of for n in image.shape[1:]])
    out = run(padded[None])[0]
    return np.asarray(out[(slice(None), *inside)] if out.ndim > 1 else out)


def sliding(run: Run, image: Array, *, roi: tuple[int, ...], overlap: float = 0.5) -> Array:
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
    padded, inside = _padded(image, [max(n, r) for n, r in zip(image.shape[1:], roi, strict=True)])
    weight = _gaussian(roi)
    total: Array | None = None
    seen = np.zeros(padded.shape[1:], np.float32)
    for start in itertools.product(*(_starts(n, r, overlap) for n, r in zip(padded.shape[1:], roi, strict=True))):
        box = tuple(slice(a, a + r) for a, r in zip(start, roi, strict=True))
        window = np.ascontiguousarray(padded[(slice(None), *box)])
        if all(channel.min() == channel.max() for channel in window):
            continue
        logits = run(window[None])[0]
        if logits.shape[1:] != tuple(roi):
            raise UserError(f"inference: expected logits on a grid {roi}, got {logits.shape[1:]}. Use mode whole.")
        if total is None:
            total = np.zeros((len(logits), *padded.shape[1:]), np.float32)
        total[(slice(None), *box)] += logits * weight
        seen[box] += weight
    if total is None:  # nothing but constant windows; one of them tells the number of classes
        total = np.zeros((len(run(window[None])[0]), *padded.shape[1:]), np.float32)
    total /= np.where(seen > 0, seen, 1)
    total[0][seen == 0] = 1
    return np.asarray(total[(slice(None), *inside)])


INFERENCES: dict[str, Callable[..., Array]] = {"whole": whole, "sliding": sliding}


def infer(run: Run, image: Volume, inference: Step) -> Array:
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
    function, options = bind(INFERENCES, inference, key="mode", given=("run", "image"))
    return function(run, image.array, **options)


def labels_of(logits: Array, processed: Volume, volume: Volume) -> Array:
    """Logits (K, *processed.shape), class 0 being the background, as labels on the grid of the image as read.

    Logits are brought back (linearly) before they are compared, so the borders are those of the image's own grid. What
    preprocessing cut away is background.

    Returns:
        (*volume.shape) uint8.
    """
    back = restore(logits, processed, volume, order=1, fill=0.0)
    return np.asarray(back.argmax(axis=0), np.uint8)


def probabilities_of(logits: Array) -> Array:
    """Logits (K,) of classes that exclude each other as probabilities summing to 1."""
    odds = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(odds / odds.sum())


def findings_of(logits: Array) -> Array:
    """Logits (K,) of findings, each for itself, as probabilities."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits.astype(np.float64))))


def score(run: Run, volume: Volume, preprocessing: Sequence[Step], inference: Step) -> Array:
    """Scores of a mutual-information map on the grid of an image as a reader gave it.

    Args:
        run: image to scores (N, 1, ...) on the image's grid.
        volume: as read.
        preprocessing: the steps the encoder was trained with.
        inference: see `infer`.

    Returns:
        (*volume.shape) float32, interpolated linearly; NaN where preprocessing cut the image away.
    """
    processed = preprocess(volume, preprocessing)
    scores = restore(infer(run, processed, inference), processed, volume, order=1, fill=float("nan"))
    return np.asarray(scores[0])


@dataclass(frozen=True, eq=False)
class Network:
    """A network with all that is needed to use it on an image, whatever runs it (torch or ONNX Runtime).

    Attributes:
        run: the network itself.
        kind: what it answers.
        modality: what it reads.
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        classes: names; a segmenter's without the background.
        preprocessing: deterministic steps, first to last.
        inference: see `infer`.
        score_map: of an encoder with its local critic: image to scores (N, 1, ...) on the image's grid.
        both: the network with what the guard watches.
        reference: what the guard compares with.
    """

    run: Run
    kind: Kind
    modality: Modality
    spatial_dims: int
    in_channels: int
    classes: tuple[str, ...]
    preprocessing: tuple[Step, ...]
    inference: Step
    score_map: Run | None = None
    both: Both | None = None
    reference: Reference | None = None

    def __call__(self, volume: Volume) -> Array:
        """Labels (*volume.shape) uint8 of a segmenter, probabilities (K,) of classifiers, summary (d,) of an encoder.

        Raises:
            UserError: the image has another number of dimensions or channels than the network was trained on.
        """
        return self._answer(self.run, volume, self._preprocessed(volume))

    def guarded(self, volume: Volume) -> tuple[Array, Verdict]:
        """The answer, and whether the image is like those the network was trained on; see `medim.inference.ood`."""
        if self.both is None or self.reference is None:
            return self(volume), Verdict()
        watch, processed = Watch(self.both), self._preprocessed(volume)
        answer = self._answer(watch, volume, processed)
        return answer, self.reference.judge(rows_of(measure(volume), processed, watch.watched))

    def scores(self, volume: Volume) -> Array:
        """The mutual-information map of an image, (*volume.shape) float32; see `score`.

        Raises:
            UserError: no critic came with the network, or the image does not fit it.
        """
        run = self.check_score_map()
        self._check(volume)
        return score(run, volume, self.preprocessing, self.inference)

    def check_score_map(self) -> Run:
        """What draws the map; UserError where no critic came with the network."""
        if self.score_map is None:
            raise UserError(
                f"map: expected an encoder with the local critic it was trained with, got a {self.kind} without. "
                "Pretrain with the objective local_dim (and export that run), or leave --map out."
            )
        return self.score_map

    def _answer(self, run: Run, volume: Volume, processed: Volume) -> Array:
        logits = infer(run, processed, self.inference)
        return labels_of(logits, processed, volume) if self.kind == "segmenter" else _ANSWERS[self.kind](logits)

    def _preprocessed(self, volume: Volume) -> Volume:
        self._check(volume)
        return preprocess(volume, self.preprocessing)

    def _check(self, volume: Volume) -> None:
        if (volume.spatial_dims, len(volume.array)) != (self.spatial_dims, self.in_channels):
            raise UserError(
                f"expected a {self.spatial_dims}D image of {self.in_channels} channel(s), got "
                f"{volume.spatial_dims}D of {len(volume.array)}. Use a package made for such images."
            )


_ANSWERS: dict[Kind, Callable[[Array], Array]] = {
    "encoder": np.asarray,
    "classifier": probabilities_of,
    "multi_label_classifier": findings_of,
}


def _padded(image: Array, shape: Sequence[int]) -> tuple[Array, tuple[slice, ...]]:
    """The image in the middle of a larger grid, and the box where it lies."""
    before = [(want - have) // 2 for want, have in zip(shape, image.shape[1:], strict=True)]
    inside = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    if tuple(shape) == image.shape[1:]:
        return image, inside
    least = image.min(axis=tuple(range(1, image.ndim)), keepdims=True)
    out = np.broadcast_to(least, (len(image), *shape)).copy()
    out[(slice(None), *inside)] = image
    return out, inside


def _starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis; the last one ends with the image."""
    step = window if size == window else max(int(window * (1 - overlap)), 1)
    count = -(-(size - window) // step) + 1
    return [min(i * step, size - window) for i in range(count)]


def _gaussian(roi: Sequence[int]) -> Array:
    """(*roi) float32, at most 1 and never 0."""
    weight = np.ones(tuple(roi))
    for axis, side in enumerate(roi):
        place = np.arange(side) - (side - 1) / 2
        profile = np.exp(-0.5 * (place / (SIGMA * side)) ** 2)
        weight *= profile.reshape([-1 if a == axis else 1 for a in range(len(roi))])
    return np.maximum(weight, 1e-3).astype(np.float32)
