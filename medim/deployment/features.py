"""Features as a file: a row an image, in the format that the suffix names."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

import numpy as np

from medim.types import Array, UserError

SCHEMA_VERSION = 1


def _npz(images: Sequence[str], subjects: Sequence[str], features: Array) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        schema_version=np.int64(SCHEMA_VERSION),
        image=np.asarray(images, np.str_),
        subject=np.asarray(subjects, np.str_),
        features=features,
    )
    return buffer.getvalue()


def _csv(images: Sequence[str], subjects: Sequence[str], features: Array) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "subject", *(f"f{i}" for i in range(features.shape[1]))])
    for image, subject, row in zip(images, subjects, features, strict=True):
        writer.writerow([image, subject, *map(str, row)])  # as few digits as give the same float32 again
    return text.getvalue().encode()


def _parquet(images: Sequence[str], subjects: Sequence[str], features: Array) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(
            '.parquet: expected pyarrow, which is not installed. pip install "medim[train]", or .csv.'
        ) from None
    columns = {f"f{i}": column for i, column in enumerate(features.T)}
    table = pyarrow.table({"image": list(images), "subject": list(subjects), **columns})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)}), buffer)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[Sequence[str], Sequence[str], Array], bytes]] = {
    ".npz": _npz,
    ".csv": _csv,
    ".parquet": _parquet,
}
