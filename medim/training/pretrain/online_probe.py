"""Metrics of the encoder during training: k-NN probe if labels exist, alignment and uniformity of validation subjects.

An encoder metric is a function of the encoder that returns numbers. It has its own images, the same at each validation,
encodes them in evaluation mode, and changes neither the weights nor the random state of the run. Labels are used only
here, and only those of training subjects: the probe selects the step of the saved encoder, and labels of the
evaluation split of `medim study` and `medim evaluate` must not affect the selection.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from medim.config import PretrainConfig
from medim.data.index.index import ImageRecord
from medim.data.loading.cohort import Cohort
from medim.data.loading.datasets import ViewDataset
from medim.evaluation.probing.classifiers import PROBES
from medim.metrics import compute_metrics
from medim.metrics.ranking import auroc_standard_error
from medim.metrics.representation import alignment, uniformity
from medim.models.feature_extraction import extract_features
from medim.training.engine.sampler import derive_seed
from medim.types import Array

log = logging.getLogger(__name__)
PROTOCOL, METRIC = "knn", "auroc"
MIN_SUBJECTS, MAX_SUBJECTS = (
    64,
    256,
)  # support subjects and query subjects of the probe: four batches each, within these limits
MAX_PAIRS = 64  # largest number of subjects with two views for the alignment; at most two batches
MIN_CLASS_SUBJECTS = 5  # smallest number of support and of query subjects per class
PROBE_BATCH_SIZE = 16
CACHE_BYTES = 1 << 28


class AlignmentMetric:
    """Alignment and uniformity of two views of validation images, cropped and augmented as in training.

    Args:
        config: configuration of the run.
        cohort: cohort with the store of the images.
        records: validation images.
        seed: random seed of the selection of images and of the views.
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
            same_crop=views.same_crop,
            augmentations=views.augmentations,
            cache_bytes=CACHE_BYTES,
        )

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """Compute `alignment` and `uniformity`."""
        summaries = _encode_views(encoder, self._images, self._seed)  # (2 N, d)
        return {"alignment": alignment(summaries[::2], summaries[1::2]), "uniformity": uniformity(summaries[::2])}


class OnlineProbe:
    """k-NN probe during training: predicts labels of training subjects from those of other training subjects.

    Args:
        config: configuration of the run.
        cohort: cohort with the store of the images.
        support: labelled images, the neighbours.
        queries: labelled images of other subjects.
        seed: random seed of the positions of the views.
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
        """Compute `probe` (AUROC) and `probe_error`, its standard error."""
        support_features, query_features = (_encode_views(encoder, side, self._seed) for side in self._sides)
        if not (np.isfinite(support_features).all() and np.isfinite(query_features).all()):
            return {"probe": float("nan"), "probe_error": float("nan")}
        prediction = PROBES[PROTOCOL].predict(support_features, self._labels[0], query_features, seed=self._seed)
        value = compute_metrics("classification", prediction.predictions, self._labels[1])[METRIC]
        assert value is not None  # open_probe requires two classes or more
        counts = np.bincount(self._labels[1], minlength=len(self.classes))
        n_rarest = int(counts[counts > 0].min())
        bounded_value = min(value, 1 - 0.5 / n_rarest)  # a perfect score on few cases would have a standard error of 0
        return {
            "probe": value,
            "probe_error": auroc_standard_error(bounded_value, n_rarest, len(self._labels[1]) - n_rarest),
        }

    @property
    def n_labels(self) -> int:
        """Number of labels in use."""
        return sum(map(len, self._labels))

    @property
    def protocol(self) -> dict[str, object]:
        """Description of the probe for `summary.json`."""
        return {
            "protocol": PROTOCOL,
            "metric": METRIC,
            "classes": self.classes,
            "n_neighbours": len(self._labels[0]),
            "n_queries": len(self._labels[1]),
        }


def open_probe(
    config: PretrainConfig, cohort: Cohort, records: Sequence[ImageRecord], *, seed: int
) -> OnlineProbe | None:
    """Build the probe of a run; None if there are too few labels.

    Of the labelled training subjects, one image each, a third are queries and the others are the support, 64 to 256
    each. Its cost is about that of a few training steps. It needs one class per image and two classes with five
    subjects each in support and queries; rarer classes are left out. There is no probe with
    `checkpoint_selection: loss`.

    Args:
        config: configuration of the run.
        cohort: cohort with the store of the images.
        records: images of the training split.
        seed: random seed of the selection of images.
    """
    if config.checkpoint_selection == "loss":
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
                "no probe: too few labelled subjects (two classes with %d support and query subjects each are needed)",
                MIN_CLASS_SUBJECTS,
            )
        return None
    support, queries = ([record for record in side if str(record.label) in classes] for side in sides)
    return OnlineProbe(config, cohort, support, queries, seed=seed)


def _draw_one_per_subject(records: Sequence[ImageRecord], seed: int) -> list[ImageRecord]:
    """Draw one image of each subject, in random order."""
    order = np.random.default_rng(derive_seed(seed, 3)).permutation(len(records))
    first_places: dict[str, int] = {}
    for place in order:
        first_places.setdefault(records[place].subject, int(place))
    return [records[place] for place in first_places.values()]


def _encode_views(encoder: nn.Module, images: ViewDataset, seed: int) -> Array:
    """Encode the views of every image: summaries (N V, d), the views of an image adjacent."""
    count = len(images)
    batches = (
        torch.cat([images[i, derive_seed(seed, i, 4)][0] for i in range(start, min(start + PROBE_BATCH_SIZE, count))])
        for start in range(0, count, PROBE_BATCH_SIZE)
    )
    return extract_features(encoder, batches)
