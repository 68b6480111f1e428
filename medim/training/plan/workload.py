"""How much a pretraining run reads, encodes, saves and keeps in RAM, counted from its configuration and its images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from medim.config import PretrainConfig
from medim.data.index.index import Record
from medim.data.labels import names_of
from medim.data.loading.datasets import CACHE_BYTES
from medim.training.fit_ood import MOST_IMAGES
from medim.training.pretrain import online_probe
from medim.training.pretrain.history import FIRST_LOOK
from medim.training.pretrain.online_probe import FEW, FEWEST, MOST, PAIRS
from medim.training.pretrain.run import HELD_OUT_BATCHES

Records = Sequence[Record]


def subjects(records: Records) -> int:
    """Number of subjects."""
    return len({record.subject for record in records})


def validations(config: PretrainConfig, held_out: Records) -> int:
    """How often a run is measured on its held-out images: at every checkpoint, at the end, and at `FIRST_LOOK`."""
    if subjects(held_out) < 2:
        return 0
    steps = config.max_steps
    every = min(config.checkpoint_every_steps, steps)
    return math.ceil(steps / every) + (steps > FIRST_LOOK and FIRST_LOOK % every != 0)


def checkpoints(config: PretrainConfig) -> int:
    """How many a run writes; the last step's is always among them."""
    return math.ceil(config.max_steps / config.checkpoint_every_steps)


def validation_images(config: PretrainConfig, train: Records, held_out: Records) -> int:
    """Views that one validation encodes: held-out batches, pairs, and both sides of the probe."""
    if subjects(held_out) < 2:
        return 0
    batches = HELD_OUT_BATCHES * min(config.batch_size, subjects(held_out)) * config.views.count
    return batches + 2 * _pairs(config, held_out) + sum(_probed(config, train))


def reference_images(train: Records, held_out: Records) -> int:
    """Images whose statistics are written for the guard."""
    return sum(min(MOST_IMAGES, len(records)) for records in (train, held_out))


def cached_bytes(config: PretrainConfig, each: float, train: Records, held_out: Records) -> int:
    """Bytes of images that the training process keeps in RAM in the end.

    Args:
        config: the run.
        each: bytes of an image.
        train: images to train on, which loading processes keep where there are any.
        held_out: images to measure on.
    """
    drawn = 0 if config.workers else min(len(train), config.max_steps * config.batch_size)
    found = _kept(drawn, each)
    if subjects(held_out) > 1:
        batches = HELD_OUT_BATCHES * min(config.batch_size, subjects(held_out))
        gauged = (_pairs(config, held_out), *_probed(config, train))
        found += _kept(min(len(held_out), batches), each)
        found += sum(_kept(count, each, online_probe.CACHE_BYTES) for count in gauged)
    return found


def worker_cached_bytes(config: PretrainConfig, each: float, train: Records) -> int:
    """Bytes of training images that each loading process keeps in RAM in the end; see `cached_bytes`."""
    if not config.workers:
        return 0
    return _kept(min(len(train), math.ceil(config.max_steps / config.workers) * config.batch_size), each)


def _kept(count: int, each: float, most: int = CACHE_BYTES) -> int:
    return min(most, int(count * each))


def _pairs(config: PretrainConfig, held_out: Records) -> int:
    """Images of `medim.training.pretrain.online_probe.Pairs`."""
    return min(PAIRS, max(FEWEST, 2 * config.batch_size), subjects(held_out))


def _probed(config: PretrainConfig, train: Records) -> tuple[int, int]:
    """Images on the two sides of the online probe, if the draw of its subjects keeps the shares of the classes."""
    labels = {record.subject: record.label for record in train if record.label is not None}
    if config.select_without_labels or names_of(labels.values()):  # blind, or several findings an image
        return 0, 0
    most = min(MOST, max(FEW, 4 * config.batch_size))
    asked = min(most, len(labels) // 3)
    neighbours = min(most, len(labels) - asked)
    counts = [n for n in Counter(labels.values()).values() if n * asked >= FEWEST * len(labels)]
    if len(counts) < 2:
        return 0, 0
    share = sum(counts) / len(labels)
    return round(neighbours * share), round(asked * share)
