"""Statistics of a run's images for the out-of-distribution guard, written beside the weights when training ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student
from torch import nn

from medim.data.index.index import Record
from medim.data.loading.cohort import Cohort
from medim.files import write_bytes
from medim.inference.network import infer
from medim.inference.ood import (
    COUNTS,
    FALSE_ALARMS,
    PARTS,
    REFERENCE,
    Both,
    Method,
    Normal,
    Reference,
    Rows,
    drawn,
    rows_of,
)
from medim.models.model import Model
from medim.models.ood_features import as_watched_run
from medim.types import Array, Step, UserError, Volume

log = logging.getLogger(__name__)
MOST_IMAGES = 256  # that are looked at, of the training and of the validation split
FEWEST_SUBJECTS, FEWEST_HELD_OUT = 10, 3  # fewer say little of others, and much of themselves
FLOOR = 0.02  # smallest deviation of an intensity or a length that counts, about 2 %


def write_reference(folder: Path, network: nn.Module, cohort: Cohort, spec: dict[str, Any]) -> None:
    """Write `reference.npz`, or remove an old one and say why there is none.

    Args:
        folder: where the weights lie.
        network: an encoder or model.
        cohort: the training split gives the statistics, the validation split the limits.
        spec: the network's; see `medim.models.serialization`.
    """
    training = network.training
    try:
        data = _reference(network.eval(), cohort, spec).dump()
    except (UserError, RuntimeError, ValueError) as error:  # of torch where a network takes views but no whole image
        (folder / REFERENCE).unlink(missing_ok=True)
        log.warning("no out-of-distribution guard: %s", error)
    else:
        write_bytes(folder / REFERENCE, data)
    finally:
        network.train(training)


def _reference(network: nn.Module, cohort: Cohort, spec: dict[str, Any]) -> Reference:
    train, val = _spread(cohort.records("train")), _spread(cohort.records("val"))
    subjects, others = ([record.subject for record in records] for records in (train, val))
    found = len(set(subjects)), len(set(others))
    if found[0] < FEWEST_SUBJECTS or found[1] < FEWEST_HELD_OUT:
        raise UserError(
            f"expected {FEWEST_SUBJECTS} subjects or more to train on and {FEWEST_HELD_OUT} held out, "
            f"got {found[0]} and {found[1]}."
        )
    rows, held_out = (list(rows_of_records(network, cohort, records, spec)) for records in (train, val))
    return fit(rows, subjects, held_out, others)


def fit(rows: Sequence[Rows], subjects: Sequence[str], held_out: Sequence[Rows], others: Sequence[str]) -> Reference:
    """The statistics of training images, with limits from held-out ones.

    Args:
        rows: of the training images; see `medim.inference.ood.rows_of`.
        subjects: whose they are.
        held_out: of images of other subjects, whose distances set the limits.
        others: whose those are.
    """
    shapes = {part: normal(np.stack([row[part] for row in rows]), FLOOR if part != "features" else 0) for part in PARTS}
    logs = np.stack(
        [np.log(np.maximum(shapes[part].distance(np.stack([row[part] for row in held_out])), 1e-9)) for part in PARTS],
        axis=1,
    )
    limits, method = limits_of(logs, others)
    parts = {
        part: Normal(shape.mean, shape.scale, shape.precision, max(1.0, float(np.exp(limits[i]))))
        for i, (part, shape) in enumerate(shapes.items())
    }
    counts = (len(rows), len(set(subjects)), len(held_out), len(set(others)))
    return Reference(parts, dict(zip(COUNTS, counts, strict=True)), method)


def normal(rows: Array, floor: float) -> Normal:
    """Mean, deviations and the inverse of the correlation of rows (N, d), shrunk as Ledoit and Wolf (2004) say.

    Args:
        rows: of the training images.
        floor: smallest deviation, for numbers that hardly differ between the images.
    """
    mean = rows.mean(axis=0)
    spread = rows.std(axis=0)
    scale = np.maximum(spread, max(floor, 1e-6, 1e-3 * float(np.median(spread))))
    unit = (rows - mean) / scale
    count, d = unit.shape
    covariance = unit.T @ unit / count
    np.fill_diagonal(covariance, 1.0)  # also where the floor took the place of a smaller deviation
    level = np.trace(covariance) / d
    away = float(((covariance - level * np.eye(d)) ** 2).sum())
    noise = float(((unit**2).sum(axis=1) ** 2).sum() / count**2 - (covariance**2).sum() / count)
    shrinkage = float(np.clip(noise / away, 0, 1)) if away > 1e-12 else 1.0
    shrunk = (1 - shrinkage) * covariance + max(shrinkage * level, 1e-3) * np.eye(d)
    return Normal(mean, scale, np.linalg.inv(shrunk), 1.0)


def limits_of(scores: Array, subjects: Sequence[str]) -> tuple[Array, Method]:
    """Limits of which an image of a fresh subject exceeds any with probability `FALSE_ALARMS`, or less.

    With enough subjects the conformal quantile for repeated measures (Lee, Barber and Willett 2023, "Distribution-free
    inference with hierarchical data") of the largest standardised score, which assumes nothing of their distribution.
    With fewer than 19 there is none; prediction limits of normal distributions take its place (Hahn and Meeker 1991,
    "Statistical Intervals"), with the probability divided among the parts (Bonferroni).

    Args:
        scores: (N, parts) log distances of held-out images.
        subjects: whose they are; each subject counts once, however many images it has.

    Returns:
        (parts,) limits, and how they came about.
    """
    count, parts = len(set(subjects)), scores.shape[1]
    weights = _weights(subjects)
    mean = weights @ scores
    deviation = np.sqrt(np.maximum(weights @ (scores - mean) ** 2 * count / (count - 1), 1e-12))
    largest = ((scores - mean) / deviation).max(axis=1)
    order = np.argsort(largest, kind="stable")
    place = int(np.searchsorted(np.cumsum(weights[order]) * count / (count + 1), 1 - FALSE_ALARMS - 1e-9))
    if place < len(order):
        return mean + largest[order[place]] * deviation, "conformal"
    far = float(student.ppf(1 - FALSE_ALARMS / parts, count - 1)) * np.sqrt(1 + 1 / count)
    return mean + far * deviation, "normal"


def _weights(subjects: Sequence[str]) -> Array:
    """(N,) summing to 1, the same for every subject."""
    _, place, counts = np.unique(np.asarray(subjects), return_inverse=True, return_counts=True)
    return np.asarray(1 / counts[place] / len(counts))


def rows_of_records(
    network: nn.Module, cohort: Cohort, records: Sequence[Record], spec: dict[str, Any]
) -> Iterator[Rows]:
    """What the guard would see of each image, from the store.

    Args:
        network: an encoder or model in evaluation mode.
        cohort: where the images lie.
        records: which.
        spec: the network's.
    """
    encoder = network.encoder if isinstance(network, Model) else network
    both, figures = as_watched_run(encoder), cohort.figures()
    for record in records:
        image = cohort.store.volume(cohort.keys[record.image])
        yield rows_of(figures[record.image], image, watched_of(both, image, spec["inference"]))


def watched_of(both: Both, image: Volume, inference: Step) -> Array:
    """What `medim.inference.ood.Watch` would keep of an image; windows that it leaves out are not run.

    Args:
        both: the network.
        image: preprocessed.
        inference: see `medim.inference.network.infer`.
    """
    chosen = set(drawn(len(_walked(image, inference, lambda place, window: None))))
    found = _walked(image, inference, lambda place, window: both(window)[1][0] if place in chosen else None)
    return np.asarray(np.mean([features for features in found if features is not None], axis=0))


def _walked(image: Volume, inference: Step, look: Callable[[int, Array], Any]) -> list[Any]:
    """What `look` gives for each window of an image, by number and voxels; no answer is made of them."""
    found: list[Any] = []

    def blank(window: Array) -> Array:
        found.append(look(len(found), window))
        return np.zeros((len(window), 1, *window.shape[2:]), np.float32)

    infer(blank, image, inference)
    return found


def _spread(records: Sequence[Record]) -> list[Record]:
    """At most `MOST_IMAGES`: one image of every subject before any second one."""
    turns: dict[str, int] = {}
    ranked = []
    for place, record in enumerate(records):
        turns[record.subject] = turns.get(record.subject, 0) + 1
        ranked.append((turns[record.subject], place, record))
    return [record for *_, record in sorted(ranked, key=lambda item: item[:2])[:MOST_IMAGES]]
