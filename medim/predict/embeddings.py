"""Files of image features with one row per image; the suffix selects the format."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

import numpy as np

from medim.inference.ood import OODResult
from medim.types import Array, UserError
from medim.version import install_command

SCHEMA_VERSION = 1
OOD_COLUMNS = tuple(OODResult().columns)


def _encode_npz(
    images: Sequence[str], subjects: Sequence[str], features: Array, ood_results: Sequence[OODResult]
) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Array] = {
        "schema_version": np.asarray(SCHEMA_VERSION, np.int64),
        "image": np.asarray(images, np.str_),
        "subject": np.asarray(subjects, np.str_),
        "features": features,
        **_build_ood_arrays(ood_results),
    }
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _encode_csv(
    images: Sequence[str], subjects: Sequence[str], features: Array, ood_results: Sequence[OODResult]
) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "subject", *(f"f{i}" for i in range(features.shape[1])), *OOD_COLUMNS])
    for image, subject, row, ood_result in zip(images, subjects, features, ood_results, strict=True):
        writer.writerow(
            [image, subject, *map(str, row), *ood_result.columns.values()]
        )  # shortest decimal representation of each float32
    return text.getvalue().encode()


def _encode_parquet(
    images: Sequence[str], subjects: Sequence[str], features: Array, ood_results: Sequence[OODResult]
) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(
            f".parquet: pyarrow is not installed. Run: {install_command('train')}; or write a .csv file."
        ) from None
    columns = {f"f{i}": column for i, column in enumerate(features.T)}
    types = {"ood_score": pyarrow.float32(), "ood": pyarrow.bool_(), "ood_by": pyarrow.string()}
    ood_columns = {name: pyarrow.array([v.columns[name] for v in ood_results], kind) for name, kind in types.items()}
    table = pyarrow.table({"image": list(images), "subject": list(subjects), **columns, **ood_columns})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)}), buffer)
    return buffer.getvalue()


def _build_ood_arrays(ood_results: Sequence[OODResult]) -> dict[str, Array]:
    """Convert OOD results to arrays; missing values become NaN, -1 and an empty string."""
    columns = {name: [v.columns[name] for v in ood_results] for name in OOD_COLUMNS}
    return {
        "ood_score": np.array([np.nan if score is None else score for score in columns["ood_score"]], np.float32),
        "ood": np.array([-1 if flag is None else flag for flag in columns["ood"]], np.int8),
        "ood_by": np.array([group or "" for group in columns["ood_by"]], np.str_),
    }


WRITERS: dict[str, Callable[[Sequence[str], Sequence[str], Array, Sequence[OODResult]], bytes]] = {
    ".npz": _encode_npz,
    ".csv": _encode_csv,
    ".parquet": _encode_parquet,
}
