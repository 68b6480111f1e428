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
from medim.data.index.index import ImageRecord
from medim.data.loading.cohort import Cohort
from medim.data.loading.datasets import ViewDataset
from medim.evaluation.probing.classifiers import PROBES
from medim.metrics.classification import classification_metrics
from medim.metrics.ranking import auroc_standard_error
from medim.metrics.representation import alignment, extract_features, uniformity
from medim.training.engine.sampler import derive_seed
from medim.types import Array

log = logging.getLogger(__name__)
PROTOCOL, METRIC = "knn", "auroc"
MIN_SUBJECTS, MAX_SUBJECTS = 64, 256  # subjects on each side of the probe: as many as four batches hold, within these
MAX_PAIRS = 64  # subjects whose two views are compared, at most; as many as two batches hold
MIN_CLASS_SUBJECTS = 5  # subjects of a class on each side
PROBE_BATCH_SIZE = 16
CACHE_BYTES = 1 << 28


class AlignmentMetric:
    """Alignment and uniformity of two views of held-out images, cut and augmented as in training.

    Args:
        config: the run.
        cohort: where the images lie.
        records: held-out images.
        seed: of the choice of images and of the views.
    """

    def __init__(self, config: PretrainConfig, cohort: Cohort, records: Sequence[ImageRecord], *, seed: int) -> None:
        pair_records = _draw_one_per_subject(records, seed)[
            : min(MAX_PAIRS, max(MIN_CLASS_SUBJECTS, 2 * config.batch_size))
        ]
        views = config.views
        self._seed = seed
        self._images = ViewDataset(
            cohort.store,
            cohort.store_keys(pair_records),
            shape=views.shape,
            count=2,
            same_place=views.same_place,
            augmentations=views.augmentations,
            cache_bytes=CACHE_BYTES,
        )

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """`alignment` and `uniformity`."""
        summaries = _encode_views(encoder, self._images, self._seed)  # (2 N, d)
        return {"alignment": alignment(summaries[::2], summaries[1::2]), "uniformity": uniformity(summaries[::2])}


class OnlineProbe:
    """Nearest neighbours among labelled training images, asked for the labels of other training subjects.

    Args:
        config: the run.
        cohort: where the images lie.
        support: labelled images.
        queries: labelled images of other subjects.
        seed: of the places where views are cut.
    """

    def __init__(
        self,
        config: PretrainConfig,
        cohort: Cohort,
        support: Sequence[ImageRecord],
        queries: Sequence[ImageRecord],
        *,
        seed: int,
    ) -> None:
        self.classes = sorted({str(record.label) for record in support})
        self._seed = seed
        self._sides = tuple(
            ViewDataset(cohort.store, cohort.store_keys(part), shape=config.views.shape, cache_bytes=CACHE_BYTES)
            for part in (support, queries)
        )
        self._labels = tuple(np.array([self.classes.index(str(r.label)) for r in part]) for part in (support, queries))

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """`probe` and `probe_error`, its standard error."""
        support_features, query_features = (_encode_views(encoder, side, self._seed) for side in self._sides)
        if not (np.isfinite(support_features).all() and np.isfinite(query_features).all()):
            return {"probe": float("nan"), "probe_error": float("nan")}
        prediction = PROBES[PROTOCOL](support_features, self._labels[0], query_features, seed=self._seed)
        value = classification_metrics(prediction.probabilities, self._labels[1])[METRIC]
        assert value is not None  # open_probe saw two classes or more
        counts = np.bincount(self._labels[1], minlength=len(self.classes))
        n_rarest = int(counts[counts > 0].min())
        bounded_value = min(value, 1 - 0.5 / n_rarest)  # a few cases without a mistake are no proof that there are none
        return {
            "probe": value,
            "probe_error": auroc_standard_error(bounded_value, n_rarest, len(self._labels[1]) - n_rarest),
        }

    @property
    def n_labels(self) -> int:
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


def open_probe(
    config: PretrainConfig, cohort: Cohort, records: Sequence[ImageRecord], *, seed: int
) -> OnlineProbe | None:
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
    candidates = (
        [] if cohort.index.findings else _draw_one_per_subject([r for r in records if r.label is not None], seed)
    )
    limit = min(MAX_SUBJECTS, max(MIN_SUBJECTS, 4 * config.batch_size))
    queries = candidates[: min(limit, len(candidates) // 3)]
    sides = candidates[len(queries) :][:limit], queries
    counts = [Counter(str(record.label) for record in side) for side in sides]
    classes = {name for name in counts[0] if min(count[name] for count in counts) >= MIN_CLASS_SUBJECTS}
    if len(classes) < 2:
        if candidates:
            log.info(
                "probe: too few labelled subjects (%d of two classes on each side are needed), so none",
                MIN_CLASS_SUBJECTS,
            )
        return None
    support, queries = ([record for record in side if str(record.label) in classes] for side in sides)
    return OnlineProbe(config, cohort, support, queries, seed=seed)


def _draw_one_per_subject(records: Sequence[ImageRecord], seed: int) -> list[ImageRecord]:
    """One image of each subject, in an order that is drawn."""
    order = np.random.default_rng(derive_seed(seed, 3)).permutation(len(records))
    first_places: dict[str, int] = {}
    for place in order:
        first_places.setdefault(records[place].subject, int(place))
    return [records[place] for place in first_places.values()]


def _encode_views(encoder: nn.Module, images: ViewDataset, seed: int) -> Array:
    """Summaries (N V, d) of every image's views, the views of an image side by side."""
    count = len(images)
    batches = (
        torch.cat([images[i, derive_seed(seed, i, 4)][0] for i in range(start, min(start + PROBE_BATCH_SIZE, count))])
        for start in range(0, count, PROBE_BATCH_SIZE)
    )
    return extract_features(encoder, batches)
