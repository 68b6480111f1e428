"""Rows of an index and their files: parquet, or CSV if pyarrow is not installed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from medim.files import write_bytes, write_csv
from medim.parsing import read_csv
from medim.privacy import format_result_path
from medim.types import UserError
from medim.version import install_command

SCHEMA_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image, without identities.

    Attributes:
        image: key, unique in the index.
        path: the file, or the first file of a series, relative to the source; with `#item` for one of several images
            in a file.
        subject: pseudonym; one per person.
        session: pseudonym of the visit.
        series: pseudonym of the DICOM series.
        modality: "mri" or "xray".
        sequence: acquisition type (DICOM ScanningSequence, BIDS suffix).
        shape: voxels per axis as returned by `open`, without the channel.
        spacing: mm per axis.
        affine: 16 numbers, row major, voxel index to RAS+ mm.
        scanner: manufacturer and model.
        field_strength: field strength in tesla.
        label: class or findings.
        mask: path of the segmentation, relative to the source.
        split: "train", "val" or "test" if specified by the source.
        quality: stable codes of accepted irregularities, separated by spaces; see `docs/reference/rejections.md`.
    """

    image: str
    path: str
    subject: str
    session: str | None
    series: str | None
    modality: str
    sequence: str | None
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    affine: tuple[float, ...]
    scanner: str | None
    field_strength: float | None
    label: str | None
    mask: str | None
    split: str | None
    quality: str | None


@dataclass(frozen=True)
class Rejection:
    """A rejected file, or a rejected series by its first file.

    Attributes:
        path: path relative to the source.
        reason: a stable code.
        detail: an explanation.
        n_files: number of files that the rejection stands for; 1 in tables of earlier versions.
    """

    path: str
    reason: str
    detail: str
    n_files: int = 1


INDEX_COLUMNS = tuple(field.name for field in fields(ImageRecord))
REJECTION_COLUMNS = tuple(field.name for field in fields(Rejection))
_LIST_TYPES: dict[str, Callable[[Any], Any]] = {"shape": int, "spacing": float, "affine": float}
_FLOAT_COLUMNS = {"field_strength"}
_INDEX_REMEDY = "Run `medim index` again."
_REQUIRED_COLUMNS = {"image", "path", "subject", "modality"}


def write_records(folder: Path, records: Sequence[ImageRecord]) -> Path:
    """Write `index.parquet`, or `index.csv` in the light install, and remove the other one.

    Returns:
        The file written.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        rows = ([_encode_cell(value) for value in astuple(record)] for record in records)
        write_csv(folder / "index.csv", INDEX_COLUMNS, rows)
        (folder / "index.parquet").unlink(missing_ok=True)
        return folder / "index.csv"
    types = {name: pyarrow.string() for name in INDEX_COLUMNS}
    types |= {
        name: pyarrow.list_(pyarrow.int64() if item_type is int else pyarrow.float64())
        for name, item_type in _LIST_TYPES.items()
    }
    types |= {name: pyarrow.float64() for name in _FLOAT_COLUMNS}
    schema = pyarrow.schema(list(types.items()), metadata={"schema_version": str(SCHEMA_VERSION)})
    columns = [[getattr(record, name) for record in records] for name in INDEX_COLUMNS]
    arrays = [pyarrow.array(column, type=types[name]) for name, column in zip(INDEX_COLUMNS, columns, strict=True)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), buffer)
    write_bytes(folder / "index.parquet", buffer.getvalue())
    (folder / "index.csv").unlink(missing_ok=True)
    return folder / "index.parquet"


def read_records(path: Path) -> tuple[ImageRecord, ...]:
    """Read `index.parquet` or `index.csv`.

    Raises:
        UserError: pyarrow is missing, or the file is damaged or lacks a column.
    """
    rows: Iterable[Mapping[str, object]]
    place = format_result_path(path)
    rows = _read_parquet_rows(path) if path.suffix == ".parquet" else read_csv(path, remedy=_INDEX_REMEDY, place=place)
    try:
        return tuple(ImageRecord(**{name: _decode_cell(name, row[name]) for name in INDEX_COLUMNS}) for row in rows)
    except KeyError as error:
        raise UserError(f"{place}: expected the column {error} of an index. Run `medim index` again.") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{place}: expected the values of an index, got {error}. Run `medim index` again.") from error


def write_rejections(path: Path, rejected: Sequence[Rejection]) -> None:
    """Write `rejected.csv`: one row per rejected file, with its reason."""
    write_csv(path, REJECTION_COLUMNS, (astuple(rejection) for rejection in rejected))


def read_rejections(path: Path) -> tuple[Rejection, ...]:
    """Read `rejected.csv`; an empty tuple if the file does not exist.

    Raises:
        UserError: the file is damaged or lacks a column.
    """
    if not path.exists():
        return ()
    place = format_result_path(path)
    content = read_csv(path, remedy=_INDEX_REMEDY, place=place)
    content.require_columns(place, REJECTION_COLUMNS[:3], remedy=_INDEX_REMEDY)
    try:
        return tuple(
            Rejection(row["path"], row["reason"], row["detail"], int(row.get("n_files") or 1)) for row in content
        )
    except ValueError as error:
        raise UserError(f"{place}: expected a number in the column n_files. {_INDEX_REMEDY}") from error


def _read_parquet_rows(path: Path) -> list[dict[str, object]]:
    place = format_result_path(path)
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(
            f"{place}: reading parquet requires pyarrow, which is not installed. Run: {install_command('train')}; "
            "or run `medim index` here to write CSV."
        ) from None
    try:
        rows: list[dict[str, object]] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{place}: expected a parquet file, got an invalid or truncated file ({error}).") from error
    return rows


def _encode_cell(value: Any) -> Any:
    """Encode a value as a CSV cell; numbers keep every digit."""
    return " ".join(map(repr, value)) if isinstance(value, tuple) else value


def _decode_cell(name: str, cell: Any) -> Any:
    """Decode a value from a parquet or CSV cell."""
    if name in _LIST_TYPES:
        return tuple(_LIST_TYPES[name](item) for item in (cell.split() if isinstance(cell, str) else cell))
    if cell is None or (cell == "" and name not in _REQUIRED_COLUMNS):
        return None
    return float(cell) if name in _FLOAT_COLUMNS else str(cell)
