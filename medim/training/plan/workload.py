"""Count the images that a pretraining run reads, encodes and keeps in RAM, and its validations and checkpoints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from medim.config import PretrainConfig
from medim.data.index.index import ImageRecord
from medim.data.labels import finding_names
from medim.data.loading.datasets import CACHE_BYTES
from medim.training.fit_ood import MAX_IMAGES
from medim.training.pretrain import online_probe
from medim.training.pretrain.history import FIRST_VALIDATION_STEP
from medim.training.pretrain.online_probe import MAX_PAIRS, MAX_SUBJECTS, MIN_CLASS_SUBJECTS, MIN_SUBJECTS
from medim.training.pretrain.run import VAL_BATCHES

RecordSequence = Sequence[ImageRecord]


def count_subjects(records: RecordSequence) -> int:
    """Count the subjects of records."""
    return len({record.subject for record in records})


def count_validations(config: PretrainConfig, held_out: RecordSequence) -> int:
    """Count the validations of a run: at every checkpoint, at the end, and at `FIRST_VALIDATION_STEP`."""
    if count_subjects(held_out) < 2:
        return 0
    steps = config.max_steps
    every = min(config.checkpoint_every_steps, steps)
    return math.ceil(steps / every) + (steps > FIRST_VALIDATION_STEP and FIRST_VALIDATION_STEP % every != 0)


def count_checkpoints(config: PretrainConfig) -> int:
    """Count the checkpoints of a run, including that of the last step."""
    return math.ceil(config.max_steps / config.checkpoint_every_steps)


def count_validation_images(config: PretrainConfig, train: RecordSequence, held_out: RecordSequence) -> int:
    """Count the views that one validation encodes: validation batches, pairs, and support and queries of the probe."""
    if count_subjects(held_out) < 2:
        return 0
    batches = VAL_BATCHES * min(config.batch_size, count_subjects(held_out)) * config.views.count
    return batches + 2 * _count_pairs(config, held_out) + sum(_count_probe_images(config, train))


def count_reference_images(train: RecordSequence, held_out: RecordSequence) -> int:
    """Count the images with statistics for the out-of-distribution detector."""
    return sum(min(MAX_IMAGES, len(records)) for records in (train, held_out))


def estimate_cached_bytes(
    config: PretrainConfig, image_bytes: float, train: RecordSequence, held_out: RecordSequence
) -> int:
    """Estimate the bytes of images that the training process keeps in RAM at the end of the run.

    Args:
        config: configuration of the run.
        image_bytes: bytes per image.
        train: images of the training split; with data-loading workers, the workers keep them.
        held_out: images of the validation split.
    """
    n_train = 0 if config.workers else min(len(train), config.max_steps * config.batch_size)
    total = _cached(n_train, image_bytes)
    if count_subjects(held_out) > 1:
        batches = VAL_BATCHES * min(config.batch_size, count_subjects(held_out))
        metric_images = (_count_pairs(config, held_out), *_count_probe_images(config, train))
        total += _cached(min(len(held_out), batches), image_bytes)
        total += sum(_cached(count, image_bytes, online_probe.CACHE_BYTES) for count in metric_images)
    return total


def estimate_worker_cached_bytes(config: PretrainConfig, image_bytes: float, train: RecordSequence) -> int:
    """Estimate the bytes of training images that each data-loading worker keeps in RAM; see `estimate_cached_bytes`."""
    if not config.workers:
        return 0
    return _cached(min(len(train), math.ceil(config.max_steps / config.workers) * config.batch_size), image_bytes)


def _cached(count: int, image_bytes: float, limit: int = CACHE_BYTES) -> int:
    return min(limit, int(count * image_bytes))


def _count_pairs(config: PretrainConfig, held_out: RecordSequence) -> int:
    """Count the images of `medim.training.pretrain.online_probe.AlignmentMetric`."""
    return min(MAX_PAIRS, max(MIN_CLASS_SUBJECTS, 2 * config.batch_size), count_subjects(held_out))


def _count_probe_images(config: PretrainConfig, train: RecordSequence) -> tuple[int, int]:
    """Count the support and query images of the online probe, for a sample with the class proportions of all."""
    labels = {record.subject: record.label for record in train if record.label is not None}
    if config.checkpoint_selection == "loss" or finding_names(labels.values()):  # the latter: several per image
        return 0, 0
    limit = min(MAX_SUBJECTS, max(MIN_SUBJECTS, 4 * config.batch_size))
    n_queries = min(limit, len(labels) // 3)
    n_support = min(limit, len(labels) - n_queries)
    counts = [n for n in Counter(labels.values()).values() if n * n_queries >= MIN_CLASS_SUBJECTS * len(labels)]
    if len(counts) < 2:
        return 0, 0
    share = sum(counts) / len(labels)
    return round(n_support * share), round(n_queries * share)
