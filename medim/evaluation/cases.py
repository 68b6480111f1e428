"""From labelled images to rows, a case and a class each, and from rows to metrics."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medim.data.index.index import AllRejectedError, ImageRecord, Index
from medim.data.labels import encode_findings
from medim.files import write_bytes
from medim.inference.network import ModelKind, Predictor
from medim.metrics.bootstrap import N_RESAMPLES, Metric, bootstrap_interval, mean_over_subjects
from medim.metrics.classification import classification_metrics, classification_statistics
from medim.metrics.multi_label import multi_label_metrics
from medim.metrics.segmentation import segmentation_metrics
from medim.types import Array, UserError, Volume

SCHEMA_VERSION = 1
CaseRow = dict[
    str, Any
]  # keys as in COLUMNS; a rejected case has one row, with `rejected` (a stable code) and `detail`
CaseProgress = Callable[[int, int], None]  # (cases done, cases)
CaseFilter = Callable[[ImageRecord, Volume], bool]  # whether an image, just read, is to be measured
_TEXT, _NUMBER = pa.string(), pa.float64()
_KEY_COLUMNS = {"image": _TEXT, "subject": _TEXT, "class": _TEXT}
FINDING_TEXT = {1.0: "present", 0.0: "absent"}  # how a row tells of a finding; None where it is unknown
_REJECTION_COLUMNS = {"rejected": _TEXT, "detail": _TEXT}
COLUMNS: dict[ModelKind, dict[str, pa.DataType]] = {
    "segmenter": {
        **_KEY_COLUMNS,
        "dice": _NUMBER,
        "hd95": _NUMBER,  # mm
        "surface_dice": _NUMBER,  # at 1 mm
        "truth_ml": _NUMBER,  # None in 2D
        "predicted_ml": _NUMBER,
        **_REJECTION_COLUMNS,
    },
    "classifier": {**_KEY_COLUMNS, "probability": _NUMBER, "label": _TEXT, "prediction": _TEXT, **_REJECTION_COLUMNS},
    "multi_label_classifier": {
        **_KEY_COLUMNS,
        "probability": _NUMBER,
        "label": _TEXT,
        **_REJECTION_COLUMNS,
    },  # label: as in TOLD
}


def score_cases(
    network: Predictor,
    index: Index,
    records: Sequence[ImageRecord],
    *,
    case_filter: CaseFilter | None = None,
    progress: CaseProgress | None = None,
) -> list[CaseRow]:
    """Run a network on labelled images, each in its own space.

    A case that cannot be read, or that the network does not take, becomes a rejected row.

    Args:
        network: a segmenter or a classifier of either kind.
        index: where the images come from.
        records: those to run, each with a mask (segmenter) or a label (classifiers).
        case_filter: asked of each image; what it leaves out has no rows.
        progress: called after each case.

    Returns:
        Rows in the order of the records, then of the classes.

    Raises:
        AllRejectedError: no case could be run.
        UserError: the masks' classes are not the network's.
    """
    mapping = _class_mapping(network.classes, index.classes) if network.kind == "segmenter" else None
    rows: list[CaseRow] = []
    for done, record in enumerate(records, start=1):
        keys = {"image": record.image, "subject": record.subject}
        rows.extend({**keys, **row} for row in _score_case(network, index, record, mapping, case_filter))
        if progress:
            progress(done, len(records))
    if rows and all(row.get("rejected") for row in rows):
        raise AllRejectedError(
            f"{index.root}: expected images to measure on, but all {len(records)} were rejected; the first: "
            f"{rows[0]['image']}: {rows[0]['detail']}",
            index,
        )
    return rows


def summarise_cases(
    rows: Sequence[CaseRow], kind: ModelKind, classes: Sequence[str], *, seed: int = 0, resamples: int = N_RESAMPLES
) -> dict[str, Any]:
    """Metrics of scored cases, each with its 95 % interval over subjects.

    Args:
        rows: what `score_cases` returns.
        kind: the network's.
        classes: the network's.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        `n` images measured, their `subjects`, images `n_rejected`, and `metrics` (each value, ci_low, ci_high, n).
    """
    valid_rows = [row for row in rows if not row.get("rejected")]
    images = dict.fromkeys((row["image"], row["subject"]) for row in valid_rows)
    subjects = [subject for _, subject in images]
    metrics: dict[str, Metric] = {}
    if kind == "segmenter":
        rows_by_class = {name: [row for row in valid_rows if row["class"] == name] for name in classes}
        means = np.mean([[row["dice"] for row in rows_by_class[name]] for name in classes], axis=0)
        metrics["dice"] = mean_over_subjects(list(means), subjects, seed=seed, resamples=resamples)
        for metric in ("dice", "hd95", "surface_dice"):
            for name in classes:
                values = [row[metric] for row in rows_by_class[name]]
                interval = mean_over_subjects(values, subjects, seed=seed, resamples=resamples)
                metrics[f"{metric}_{name}"] = interval
    elif kind == "multi_label_classifier":
        arrays = finding_arrays(valid_rows, classes)
        metrics = multi_label_metrics(*arrays, classes, subjects, seed=seed, resamples=resamples)
    else:
        probabilities, labels = class_arrays(valid_rows, classes)
        overall = classification_metrics(probabilities, labels)
        for name, statistic in classification_statistics(probabilities, labels).items():
            metrics[name] = bootstrap_interval(statistic, subjects, seed=seed, resamples=resamples, value=overall[name])
    n_rejected = sum(bool(row.get("rejected")) for row in rows)
    return {"n": len(images), "subjects": len(set(subjects)), "rejected": n_rejected, "metrics": metrics}


def class_arrays(rows: Sequence[CaseRow], classes: Sequence[str]) -> tuple[Array, Array]:
    """Probabilities (N, K) and labels (N,) of a classifier's rows, rejected ones left out."""
    valid_rows = [row for row in rows if not row.get("rejected")]
    probabilities = np.array([row["probability"] for row in valid_rows], dtype=np.float64).reshape(-1, len(classes))
    labels = [classes.index(row["label"]) for row in valid_rows[:: len(classes)]]
    return probabilities, np.array(labels, dtype=np.intp)


def finding_arrays(rows: Sequence[CaseRow], classes: Sequence[str]) -> tuple[Array, Array]:
    """Probabilities and labels, 1, 0 or NaN (unknown), of a multi-label classifier's rows: two of (N, K)."""
    valid_rows = [row for row in rows if not row.get("rejected")]
    finding_values = {word: value for value, word in FINDING_TEXT.items()} | {None: np.nan}
    columns = [row["probability"] for row in valid_rows], [finding_values[row["label"]] for row in valid_rows]
    probabilities, labels = (np.array(column, np.float64).reshape(-1, len(classes)) for column in columns)
    return probabilities, labels


def write_cases(path: Path, rows: Sequence[CaseRow], kind: ModelKind) -> None:
    """Write rows as parquet, with the columns of `COLUMNS`."""
    write_parquet(path, pa.Table.from_pylist(list(rows), schema=pa.schema(list(COLUMNS[kind].items()))))


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table of cases, with its schema version."""
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)}), buffer)
    write_bytes(path, buffer.getvalue())


def read_cases(path: Path) -> list[CaseRow]:
    """Read what `write_cases` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        rows: list[CaseRow] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: expected the cases of an evaluation ({error}). Run `medim evaluate` again."
        ) from error
    return rows


def _score_case(
    network: Predictor, index: Index, record: ImageRecord, mapping: Array | None, case_filter: CaseFilter | None
) -> list[CaseRow]:
    """Rows of one case, without its keys."""
    try:
        volume = index.open(record)
        if case_filter and not case_filter(record, volume):
            return []
        mask = index.open_mask(record) if network.kind == "segmenter" else None
    except Exception as error:  # a decoder may raise anything; the case is counted, the rest goes on
        return [_rejection_row(getattr(error, "reason", "unreadable"), error, index)]
    if mask is None and not _has_label(record.label, network):
        detail = f"expected a label of {', '.join(network.classes)}, got {record.label!r}"
        return [{"rejected": "unknown-class", "detail": detail}]
    if mask is not None and mask.shape != volume.shape:
        detail = f"expected a mask on the image's grid {volume.shape}, got {mask.shape}"
        return [{"rejected": "mask-off-grid", "detail": detail}]
    if mask is not None and mask.array.max() > len(network.classes):
        detail = f"expected mask values 0 to {len(network.classes)}, got {mask.array.max()}"
        return [{"rejected": "unknown-class", "detail": detail}]
    try:
        output = network(volume)
    except UserError as error:
        return [_rejection_row("not-for-this-model", error, index)]
    if mask is not None:
        truth = mask.array[0] if mapping is None else mapping[mask.array[0]]
        return _score_segmentation(output, truth, volume, network.classes)
    if network.kind == "multi_label_classifier":
        finding_texts = [FINDING_TEXT.get(value) for value in encode_findings(record.label, network.classes)]
        columns = zip(network.classes, map(float, output), finding_texts, strict=True)
        return [dict(zip(("class", "probability", "label"), column, strict=True)) for column in columns]
    prediction = network.classes[int(output.argmax())]
    return [
        {"class": name, "probability": float(p), "label": record.label, "prediction": prediction}
        for name, p in zip(network.classes, output, strict=True)
    ]


def _has_label(label: str | None, network: Predictor) -> bool:
    """Whether a label is a class of the network, or tells of one of its findings."""
    if network.kind == "multi_label_classifier":
        return bool(np.isfinite(encode_findings(label, network.classes)).any())
    return label in network.classes


def _score_segmentation(prediction: Array, truth: Array, volume: Volume, classes: Sequence[str]) -> list[CaseRow]:
    scores = segmentation_metrics(prediction, truth, volume.spacing, classes)
    rows: list[CaseRow] = [{"class": name, **scores[name]} for name in classes]
    if volume.spatial_dims == 3:
        ml_per_voxel = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
        for value, row in enumerate(rows, start=1):
            row["truth_ml"] = ml_per_voxel * int((truth == value).sum())
            row["predicted_ml"] = ml_per_voxel * int((prediction == value).sum())
    return rows


def _class_mapping(ours: Sequence[str], theirs: Sequence[str]) -> Array | None:
    """Table from the source's mask values to the network's; None where the source names no classes."""
    if not theirs:
        return None
    if set(ours) != set(theirs):
        raise UserError(
            f"masks: expected the model's classes ({', '.join(ours)}), got {', '.join(theirs)}. Name them alike in "
            "dataset.json, or measure on another source."
        )
    return np.array([0, *(list(ours).index(name) + 1 for name in theirs)], dtype=np.uint8)


def _rejection_row(reason: str, error: Exception, index: Index) -> CaseRow:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return {"rejected": reason, "detail": text.replace(f"{index.root}/", "")}
