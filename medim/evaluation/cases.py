"""From labelled images to rows, a case and a class each, and from rows to metrics."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medim.data.index.index import AllRejectedError, Index, Record
from medim.data.labels import values_of
from medim.files import write_bytes
from medim.inference.network import Kind, Network
from medim.metrics.bootstrap import RESAMPLES, Metric, bootstrap, mean_over_subjects
from medim.metrics.classification import classification_metrics, classification_statistics
from medim.metrics.multi_label import multi_label_metrics
from medim.metrics.segmentation import segmentation_metrics
from medim.types import Array, UserError, Volume

SCHEMA_VERSION = 1
Row = dict[str, Any]  # keys as in COLUMNS; a rejected case has one row, with `rejected` (a stable code) and `detail`
Progress = Callable[[int, int], None]  # (cases done, cases)
Look = Callable[[Record, Volume], bool]  # whether an image, just read, is to be measured
_TEXT, _NUMBER = pa.string(), pa.float64()
_KEYS = {"image": _TEXT, "subject": _TEXT, "class": _TEXT}
TOLD = {1.0: "present", 0.0: "absent"}  # how a row tells of a finding; None where it is unknown
_REJECTED = {"rejected": _TEXT, "detail": _TEXT}
COLUMNS: dict[Kind, dict[str, pa.DataType]] = {
    "segmenter": {
        **_KEYS,
        "dice": _NUMBER,
        "hd95": _NUMBER,  # mm
        "surface_dice": _NUMBER,  # at 1 mm
        "truth_ml": _NUMBER,  # None in 2D
        "predicted_ml": _NUMBER,
        **_REJECTED,
    },
    "classifier": {**_KEYS, "probability": _NUMBER, "label": _TEXT, "prediction": _TEXT, **_REJECTED},
    "multi_label_classifier": {**_KEYS, "probability": _NUMBER, "label": _TEXT, **_REJECTED},  # label: as in TOLD
}


def score(
    network: Network,
    index: Index,
    records: Sequence[Record],
    *,
    look: Look | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Run a network on labelled images, each in its own space.

    A case that cannot be read, or that the network does not take, becomes a rejected row.

    Args:
        network: a segmenter or a classifier of either kind.
        index: where the images come from.
        records: those to run, each with a mask (segmenter) or a label (classifiers).
        look: asked of each image; what it leaves out has no rows.
        progress: called after each case.

    Returns:
        Rows in the order of the records, then of the classes.

    Raises:
        AllRejectedError: no case could be run.
        UserError: the masks' classes are not the network's.
    """
    relabel = _relabelling(network.classes, index.classes) if network.kind == "segmenter" else None
    rows: list[Row] = []
    for done, record in enumerate(records, start=1):
        keys = {"image": record.image, "subject": record.subject}
        rows.extend({**keys, **row} for row in _case(network, index, record, relabel, look))
        if progress:
            progress(done, len(records))
    if rows and all(row.get("rejected") for row in rows):
        raise AllRejectedError(
            f"{index.root}: expected images to measure on, but all {len(records)} were rejected; the first: "
            f"{rows[0]['image']}: {rows[0]['detail']}",
            index,
        )
    return rows


def summarise(
    rows: Sequence[Row], kind: Kind, classes: Sequence[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Metrics of scored cases, each with its 95 % interval over subjects.

    Args:
        rows: what `score` returns.
        kind: the network's.
        classes: the network's.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        `n` images measured, their `subjects`, images `rejected`, and `metrics` (each value, ci_low, ci_high, n).
    """
    used = [row for row in rows if not row.get("rejected")]
    images = dict.fromkeys((row["image"], row["subject"]) for row in used)
    subjects = [subject for _, subject in images]
    metrics: dict[str, Metric] = {}
    if kind == "segmenter":
        columns = {name: [row for row in used if row["class"] == name] for name in classes}
        means = np.mean([[row["dice"] for row in columns[name]] for name in classes], axis=0)
        metrics["dice"] = mean_over_subjects(list(means), subjects, seed=seed, resamples=resamples)
        for metric in ("dice", "hd95", "surface_dice"):
            for name in classes:
                values = [row[metric] for row in columns[name]]
                found = mean_over_subjects(values, subjects, seed=seed, resamples=resamples)
                metrics[f"{metric}_{name}"] = found
    elif kind == "multi_label_classifier":
        told = finding_arrays(used, classes)
        metrics = multi_label_metrics(*told, classes, subjects, seed=seed, resamples=resamples)
    else:
        probabilities, labels = class_arrays(used, classes)
        overall = classification_metrics(probabilities, labels)
        for name, statistic in classification_statistics(probabilities, labels).items():
            metrics[name] = bootstrap(statistic, subjects, seed=seed, resamples=resamples, value=overall[name])
    rejected = sum(bool(row.get("rejected")) for row in rows)
    return {"n": len(images), "subjects": len(set(subjects)), "rejected": rejected, "metrics": metrics}


def class_arrays(rows: Sequence[Row], classes: Sequence[str]) -> tuple[Array, Array]:
    """Probabilities (N, K) and labels (N,) of a classifier's rows, rejected ones left out."""
    used = [row for row in rows if not row.get("rejected")]
    probabilities = np.array([row["probability"] for row in used], dtype=np.float64).reshape(-1, len(classes))
    labels = [classes.index(row["label"]) for row in used[:: len(classes)]]
    return probabilities, np.array(labels, dtype=np.intp)


def finding_arrays(rows: Sequence[Row], classes: Sequence[str]) -> tuple[Array, Array]:
    """Probabilities and labels, 1, 0 or NaN (unknown), of a multi-label classifier's rows: two of (N, K)."""
    used = [row for row in rows if not row.get("rejected")]
    told = {word: value for value, word in TOLD.items()} | {None: np.nan}
    columns = [row["probability"] for row in used], [told[row["label"]] for row in used]
    probabilities, labels = (np.array(column, np.float64).reshape(-1, len(classes)) for column in columns)
    return probabilities, labels


def write_cases(path: Path, rows: Sequence[Row], kind: Kind) -> None:
    """Write rows as parquet, with the columns of `COLUMNS`."""
    write_parquet(path, pa.Table.from_pylist(list(rows), schema=pa.schema(list(COLUMNS[kind].items()))))


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table of cases, with its schema version."""
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)}), buffer)
    write_bytes(path, buffer.getvalue())


def read_cases(path: Path) -> list[Row]:
    """Read what `write_cases` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: expected the cases of an evaluation ({error}). Run `medim evaluate` again."
        ) from error
    return rows


def _case(network: Network, index: Index, record: Record, relabel: Array | None, look: Look | None) -> list[Row]:
    """Rows of one case, without its keys."""
    try:
        volume = index.open(record)
        if look and not look(record, volume):
            return []
        mask = index.open_mask(record) if network.kind == "segmenter" else None
    except Exception as error:  # a decoder may raise anything; the case is counted, the rest goes on
        return [_rejected(getattr(error, "reason", "unreadable"), error, index)]
    if mask is None and not _labelled(record.label, network):
        detail = f"expected a label of {', '.join(network.classes)}, got {record.label!r}"
        return [{"rejected": "unknown-class", "detail": detail}]
    if mask is not None and mask.shape != volume.shape:
        detail = f"expected a mask on the image's grid {volume.shape}, got {mask.shape}"
        return [{"rejected": "mask-off-grid", "detail": detail}]
    if mask is not None and mask.array.max() > len(network.classes):
        detail = f"expected mask values 0 to {len(network.classes)}, got {mask.array.max()}"
        return [{"rejected": "unknown-class", "detail": detail}]
    try:
        answer = network(volume)
    except UserError as error:
        return [_rejected("not-for-this-model", error, index)]
    if mask is not None:
        truth = mask.array[0] if relabel is None else relabel[mask.array[0]]
        return _segmented(answer, truth, volume, network.classes)
    if network.kind == "multi_label_classifier":
        told = [TOLD.get(value) for value in values_of(record.label, network.classes)]
        columns = zip(network.classes, map(float, answer), told, strict=True)
        return [dict(zip(("class", "probability", "label"), column, strict=True)) for column in columns]
    prediction = network.classes[int(answer.argmax())]
    return [
        {"class": name, "probability": float(p), "label": record.label, "prediction": prediction}
        for name, p in zip(network.classes, answer, strict=True)
    ]


def _labelled(label: str | None, network: Network) -> bool:
    """Whether a label is a class of the network, or tells of one of its findings."""
    if network.kind == "multi_label_classifier":
        return bool(np.isfinite(values_of(label, network.classes)).any())
    return label in network.classes


def _segmented(prediction: Array, truth: Array, volume: Volume, classes: Sequence[str]) -> list[Row]:
    scores = segmentation_metrics(prediction, truth, volume.spacing, classes)
    rows: list[Row] = [{"class": name, **scores[name]} for name in classes]
    if volume.spatial_dims == 3:
        ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
        for value, row in enumerate(rows, start=1):
            row["truth_ml"] = ml * int((truth == value).sum())
            row["predicted_ml"] = ml * int((prediction == value).sum())
    return rows


def _relabelling(ours: Sequence[str], theirs: Sequence[str]) -> Array | None:
    """Table from the source's mask values to the network's; None where the source names no classes."""
    if not theirs:
        return None
    if set(ours) != set(theirs):
        raise UserError(
            f"masks: expected the model's classes ({', '.join(ours)}), got {', '.join(theirs)}. Name them alike in "
            "dataset.json, or measure on another source."
        )
    return np.array([0, *(list(ours).index(name) + 1 for name in theirs)], dtype=np.uint8)


def _rejected(reason: str, error: Exception, index: Index) -> Row:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return {"rejected": reason, "detail": text.replace(f"{index.root}/", "")}
