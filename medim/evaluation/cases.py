"""Run a network on labelled images: one row per case and class, and metrics of these rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from medim.data.index.index import AllRejectedError, ImageRecord, Index
from medim.data.mask_classes import match_class_names
from medim.data.readers import ReadError
from medim.files import write_bytes
from medim.inference.network import Predictor
from medim.metrics.bootstrap import N_RESAMPLES, MetricEstimate
from medim.metrics.segmentation import METRIC_RULE
from medim.tasks import find_task_of_kind
from medim.tasks.task import CaseRow, ColumnType, LabelledCase
from medim.types import UserError, Volume

SCHEMA_VERSION = 1
CaseProgress = Callable[[int, int], None]  # (cases done, cases)
CaseFilter = Callable[[ImageRecord, Volume], bool]  # whether to evaluate an image that was just read
_COLUMN_TYPES: dict[ColumnType, pa.DataType] = {"text": pa.string(), "number": pa.float64()}
_KEY_COLUMNS: dict[str, ColumnType] = {"image": "text", "subject": "text", "class": "text"}
_REJECTION_COLUMNS: dict[str, ColumnType] = {"rejected": "text", "detail": "text"}


class CaseSummary(TypedDict):
    """Metrics of scored cases, with their numbers.

    Attributes:
        n: number of evaluated images.
        subjects: number of their subjects.
        rejected: number of rejected images.
        metric_rule: version of the rule for classes without a voxel; see `medim.metrics.segmentation`.
        metrics: value, ci_low, ci_high and n by metric, and for distances `missed`, the cases in which the prediction
            lacks the structure.
    """

    n: int
    subjects: int
    rejected: int
    metric_rule: int
    metrics: dict[str, MetricEstimate]


def score_cases(
    network: Predictor,
    index: Index,
    records: Sequence[ImageRecord],
    *,
    case_filter: CaseFilter | None = None,
    progress: CaseProgress | None = None,
) -> list[CaseRow]:
    """Run a network on labelled images, each in its original space.

    A case that cannot be read, or that the network does not accept, becomes a rejected row.

    Args:
        network: a segmenter or a classifier of either kind.
        index: index of the images.
        records: images to run, each with a mask (segmenter) or a label (classifiers).
        case_filter: called with each image; an image for which it returns False has no rows.
        progress: called after each case.

    Returns:
        Rows in the order of the records, then of the classes.

    Raises:
        AllRejectedError: no case could be run.
        UserError: the classes of the masks are not those of the network.
    """
    if class_error := network.task.find_class_error(network.classes, name_source_classes(network, index)):
        raise UserError(class_error)
    rows: list[CaseRow] = []
    for done, record in enumerate(records, start=1):
        keys = {"image": record.image, "subject": record.subject}
        rows.extend({**keys, **row} for row in _score_case(network, index, record, case_filter))
        if progress:
            progress(done, len(records))
    network.task.clear_unmeasured_classes([row for row in rows if not row.get("rejected")])
    if rows and all(row.get("rejected") for row in rows):
        raise AllRejectedError(
            f"{index.source_name}: all {len(records)} images to evaluate were rejected; the first: "
            f"{rows[0]['image']}: {rows[0]['detail']}",
            index,
        )
    return rows


def name_source_classes(network: Predictor, index: Index) -> tuple[str, ...]:
    """Names of the mask classes of a source, in the words of the network where a side has no names."""
    return match_class_names(index.classes, index.class_values, network.classes, network.class_values)


def summarise_cases(
    rows: Sequence[CaseRow], kind: str, classes: Sequence[str], *, seed: int = 0, resamples: int = N_RESAMPLES
) -> CaseSummary:
    """Compute the metrics of scored cases, each with its 95 % interval over subjects.

    Args:
        rows: rows of `score_cases`.
        kind: kind of the network.
        classes: classes of the network.
        seed: random seed of the bootstrap.
        resamples: number of bootstrap resamples.

    Returns:
        `n` (evaluated images), `subjects`, `rejected` (images), and `metrics` (each with value, ci_low, ci_high, n).
    """
    valid_rows = [row for row in rows if not row.get("rejected")]
    images = dict.fromkeys((row["image"], row["subject"]) for row in valid_rows)
    metrics = find_task_of_kind(kind).summarise_cases(valid_rows, classes, seed=seed, resamples=resamples)
    n_rejected = sum(bool(row.get("rejected")) for row in rows)
    return {
        "n": len(images),
        "subjects": len({subject for _, subject in images}),
        "rejected": n_rejected,
        "metric_rule": METRIC_RULE,
        "metrics": metrics,
    }


def write_cases(path: Path, rows: Sequence[CaseRow], kind: str) -> None:
    """Write rows as parquet, with the columns of the task of a network kind."""
    columns = {**_KEY_COLUMNS, **find_task_of_kind(kind).case_columns, **_REJECTION_COLUMNS}
    schema = pa.schema([(name, _COLUMN_TYPES[column_type]) for name, column_type in columns.items()])
    write_parquet(path, pa.Table.from_pylist(list(rows), schema=schema))


def write_parquet(path: Path, table: pa.Table, *, schema_version: int = SCHEMA_VERSION) -> None:
    """Write a table of cases, with its schema version."""
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"schema_version": str(schema_version)}), buffer)
    write_bytes(path, buffer.getvalue())


def read_cases(path: Path) -> list[CaseRow]:
    """Read the rows that `write_cases` wrote.

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


def _score_case(network: Predictor, index: Index, record: ImageRecord, case_filter: CaseFilter | None) -> list[CaseRow]:
    """Compute the rows of one case, without its keys."""
    task = network.task
    try:
        volume = index.open(record)
        if case_filter and not case_filter(record, volume):
            return []
        mask = index.open_mask(record) if task.dense else None
    except Exception as error:  # a decoder may raise any exception; count the case and continue
        return [_rejection_row(getattr(error, "reason", "unreadable"), error)]
    case = LabelledCase(
        record=record,
        volume=volume,
        mask=mask,
        classes=network.classes,
        source_classes=name_source_classes(network, index),
    )
    if target_error := task.find_target_error(case):
        return [{"rejected": target_error[0], "detail": target_error[1]}]
    try:
        answer = network(volume)
    except UserError as error:
        return [_rejection_row(error.reason if isinstance(error, ReadError) else "not-for-this-model", error)]
    return task.score_case(answer, case)


def _rejection_row(reason: str, error: Exception) -> CaseRow:
    """Describe an error; the message of a library is left out, as it may contain the path of the file."""
    detail = str(error) if isinstance(error, UserError) else f"the image cannot be read ({type(error).__name__})"
    return {"rejected": reason, "detail": detail}
