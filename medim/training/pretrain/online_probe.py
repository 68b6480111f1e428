"""What is measured beside the losses: a probe where labels exist, alignment and uniformity of held-out subjects.

A gauge takes the encoder as it is and gives numbers. It has images of its own, the same at each measurement, encodes
them in evaluation mode, and touches neither weights nor the run's random numbers. Labels are used here alone, and they
are those of training subjects: the probe chooses the step whose encoder is left, and what `medim study` and
`medim evaluate` measure on must choose nothing.
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
from medim.data.index.index import Record
from medim.data.loading.cohort import Cohort
from medim.data.loading.datasets import ViewDataset
from medim.evaluation.probing.classifiers import PROTOCOLS
from medim.metrics.classification import classification_metrics
from medim.metrics.ranking import auroc_error
from medim.metrics.representation import alignment, extract, uniformity
from medim.training.engine.sampler import seed_of
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
        chosen = _one_each(records, seed)[: min(PAIRS, max(FEWEST, 2 * config.batch_size))]
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
    """Nearest neighbours among labelled training images, asked for the labels of other training subjects.

    Args:
        config: the run.
        cohort: where the images lie.
        neighbours: labelled images.
        asked: labelled images of other subjects.
        seed: of the places where views are cut.
    """

    def __init__(
        self,
        config: PretrainConfig,
        cohort: Cohort,
        neighbours: Sequence[Record],
        asked: Sequence[Record],
        *,
        seed: int,
    ) -> None:
        self.classes = sorted({str(record.label) for record in neighbours})
        self._seed = seed
        self._sides = tuple(
            ViewDataset(cohort.store, cohort.store_keys(part), shape=config.views.shape, cache_bytes=CACHE_BYTES)
            for part in (neighbours, asked)
        )
        self._labels = tuple(np.array([self.classes.index(str(r.label)) for r in part]) for part in (neighbours, asked))

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
        certain = min(value, 1 - 0.5 / few)  # a few cases without a mistake are no proof that there are none
        return {"probe": value, "probe_error": auroc_error(certain, few, len(self._labels[1]) - few)}

    @property
    def labels(self) -> int:
        """How many it knows."""
        return sum(map(len, self._labels))

    @property
    def protocol(self) -> dict[str, Any]:
        """What `summary.json` says of it."""
        return {
            "protocol": PROTOCOL,
            "metric": METRIC,
            "classes": self.classes,
            "neighbours": len(self._labels[0]),
            "asked": len(self._labels[1]),
        }


def open_probe(config: PretrainConfig, cohort: Cohort, records: Sequence[Record], *, seed: int) -> OnlineProbe | None:
    """The probe of a run; None where labels do not suffice.

    Of the labelled training subjects, one image each, a third is asked and the others are the neighbours, 64 to 256 a
    side: it encodes about as much as a few training steps do. Labels suffice with one class an image and two classes of
    five subjects on each side; rarer classes are left out. None, too, where the run is to select without labels.

    Args:
        config: the run.
        cohort: where the images lie.
        records: the training split.
        seed: of the choice of images.
    """
    if config.select_without_labels:
        return None
    known = [] if cohort.index.findings else _one_each([r for r in records if r.label is not None], seed)
    most = min(MOST, max(FEW, 4 * config.batch_size))
    asked = known[: min(most, len(known) // 3)]
    sides = known[len(asked) :][:most], asked
    counts = [Counter(str(record.label) for record in side) for side in sides]
    classes = {name for name in counts[0] if min(count[name] for count in counts) >= FEWEST}
    if len(classes) < 2:
        if known:
            log.info("probe: too few labelled subjects (%d of two classes on each side are needed), so none", FEWEST)
        return None
    left, asked = ([record for record in side if str(record.label) in classes] for side in sides)
    return OnlineProbe(config, cohort, left, asked, seed=seed)


def _one_each(records: Sequence[Record], seed: int) -> list[Record]:
    """One image of each subject, in an order that is drawn."""
    order = np.random.default_rng(seed_of(seed, 3)).permutation(len(records))
    first: dict[str, int] = {}
    for place in order:
        first.setdefault(records[place].subject, int(place))
    return [records[place] for place in first.values()]


def _encode(encoder: nn.Module, images: ViewDataset, seed: int) -> Array:
    """Summaries (N V, d) of every image's views, the views of an image side by side."""
    count = len(images)
    batches = (
        torch.cat([images[i, seed_of(seed, i, 4)][0] for i in range(start, min(start + BATCH, count))])
        for start in range(0, count, BATCH)
    )
    return extract(encoder, batches)
