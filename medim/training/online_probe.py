"""What is measured on held-out subjects beside the losses: a probe where labels exist, alignment and uniformity.

A gauge takes the encoder as it is and gives numbers. It has images of its own, the same at each measurement, encodes
them in evaluation mode, and touches neither weights nor the run's random numbers. Labels are used here alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from medim.config import PretrainConfig
from medim.data.datasets import ViewDataset
from medim.data.index import Record
from medim.evaluation.binary import auroc_error
from medim.evaluation.features import alignment, extract, uniformity
from medim.evaluation.metrics import classification_metrics
from medim.evaluation.protocols import PROTOCOLS
from medim.training.cohort import Cohort
from medim.training.loaders import seed_of
from medim.types import Array

log = logging.getLogger(__name__)
PROTOCOL, METRIC = "knn", "auroc"
FEW, MOST = 64, 256  # subjects on each side of the probe: as many as four batches hold, within these
PAIRS = 64  # subjects whose two views are compared, at most; as many as two batches hold
FEWEST = 5  # subjects of a class on each side
BATCH = 16
CACHE_BYTES = 1 << 28


class Pairs:
    """Alignment and uniformity of two views of held-out images, cut and augmented as in training.

    Args:
        config: the run.
        cohort: where the images lie.
        records: held-out images.
        seed: of the choice of images and of the views.
    """

    def __init__(self, config: PretrainConfig, cohort: Cohort, records: Sequence[Record], *, seed: int) -> None:
        chosen = _one_each(records, min(PAIRS, max(FEWEST, 2 * config.batch_size)), seed)
        views = config.views
        self._seed = seed
        self._images = ViewDataset(
            cohort.store,
            cohort.store_keys(chosen),
            shape=views.shape,
            count=2,
            same_place=views.same_place,
            augmentations=views.augmentations,
            cache_bytes=CACHE_BYTES,
        )

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """`alignment` and `uniformity`."""
        summaries = _encode(encoder, self._images, self._seed)  # (2 N, d)
        return {"alignment": alignment(summaries[::2], summaries[1::2]), "uniformity": uniformity(summaries[::2])}


class OnlineProbe:
    """Nearest neighbours among labelled training images, measured on held-out subjects.

    Args:
        config: the run.
        cohort: where the images lie.
        train: labelled images of the training split.
        test: labelled images of held-out subjects.
        seed: of the places where views are cut.
    """

    def __init__(
        self, config: PretrainConfig, cohort: Cohort, train: Sequence[Record], test: Sequence[Record], *, seed: int
    ) -> None:
        self.classes = sorted({str(record.label) for record in train})
        self._seed = seed
        self._sides = tuple(
            ViewDataset(cohort.store, cohort.store_keys(part), shape=config.views.shape, cache_bytes=CACHE_BYTES)
            for part in (train, test)
        )
        self._labels = tuple(np.array([self.classes.index(str(r.label)) for r in part]) for part in (train, test))

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """`probe` and `probe_error`, its standard error."""
        x, rest = (_encode(encoder, side, self._seed) for side in self._sides)
        if not (np.isfinite(x).all() and np.isfinite(rest).all()):
            return {"probe": float("nan"), "probe_error": float("nan")}
        answer = PROTOCOLS[PROTOCOL](x, self._labels[0], rest, seed=self._seed)
        value = classification_metrics(answer.probabilities, self._labels[1])[METRIC]
        assert value is not None  # open_probe saw two classes or more
        counts = np.bincount(self._labels[1], minlength=len(self.classes))
        few = int(counts[counts > 0].min())
        return {"probe": value, "probe_error": auroc_error(value, few, len(self._labels[1]) - few)}

    @property
    def protocol(self) -> dict[str, Any]:
        """What `summary.json` says of it."""
        return {
            "protocol": PROTOCOL,
            "metric": METRIC,
            "classes": self.classes,
            "train_subjects": len(self._labels[0]),
            "held_out_subjects": len(self._labels[1]),
        }


def open_probe(
    config: PretrainConfig, cohort: Cohort, train: Sequence[Record], held_out: Sequence[Record], *, seed: int
) -> OnlineProbe | None:
    """The probe of a run, 64 to 256 subjects a side and one image of each; None where labels do not suffice.

    It encodes about as much as a few training steps do. Labels suffice with one class an image, two classes or more in
    training and held out, and five subjects of each.

    Args:
        config: the run.
        cohort: where the images lie.
        train: the training split.
        held_out: the validation split.
        seed: of the choice of images.
    """
    if cohort.index.findings:
        return None
    known = [record for record in train if record.label is not None]
    counts = Counter(str(record.label) for record in _one_each(known, len(known), seed))
    classes = {name for name, count in counts.items() if count >= FEWEST}
    most = min(MOST, max(FEW, 4 * config.batch_size))
    sides = [
        _one_each([r for r in part if r.label is not None and str(r.label) in classes], most, seed)
        for part in (train, held_out)
    ]
    found = [Counter(str(record.label) for record in side) for side in sides]
    if min(len(count) for count in found) < 2 or min(found[1].values()) < FEWEST:
        if known:
            log.info("probe: too few labelled subjects (%d of each class on each side are needed), so none", FEWEST)
        return None
    return OnlineProbe(config, cohort, *sides, seed=seed)


def _one_each(records: Sequence[Record], most: int, seed: int) -> list[Record]:
    """One image of each of some subjects, drawn."""
    order = np.random.default_rng(seed_of(seed, 3)).permutation(len(records))
    first: dict[str, int] = {}
    for place in order:
        first.setdefault(records[place].subject, int(place))
    return [records[place] for place in sorted(list(first.values())[:most])]


def _encode(encoder: nn.Module, images: ViewDataset, seed: int) -> Array:
    """Summaries (N V, d) of every image's views, the views of an image side by side."""
    count = len(images)
    batches = (
        torch.cat([images[i, seed_of(seed, i, 4)][0] for i in range(start, min(start + BATCH, count))])
        for start in range(0, count, BATCH)
    )
    return extract(encoder, batches)
