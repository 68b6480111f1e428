"""Files of image features with one row per image; the suffix selects the format."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from medim.inference.ood import OODResult
from medim.parsing import encode_csv
from medim.types import Array, UserError
from medim.version import install_command

SCHEMA_VERSION = 2
OOD_COLUMNS = tuple(OODResult().columns)


class FeatureRow(NamedTuple):
    """Features of one image.

    Attributes:
        image: key of the image.
        subject: pseudonym of the subject.
        features: (d,).
        ood_result: distance of the image to the training images.
    """

    image: str
    subject: str
    features: Array
    ood_result: OODResult


def stack_features(rows: Sequence[FeatureRow]) -> Array:
    """Stack the features of all rows: (N, d) float32."""
    return np.stack([row.features for row in rows]).astype(np.float32)


def encode_features(features: Array, ood_result: OODResult) -> list[str | float | None]:
    """Encode features (d,) as base64 of little-endian float32, with score and feature group, for a journal."""
    data = base64.b64encode(np.asarray(features, "<f4").tobytes()).decode("ascii")
    return [data, ood_result.score, ood_result.feature_group]


def decode_features(content: Sequence[Any]) -> tuple[Array, OODResult]:
    """Decode the result of `encode_features`."""
    data, score, feature_group = content
    return np.frombuffer(base64.b64decode(data), "<f4"), OODResult(score, feature_group)


def _encode_npz(rows: Sequence[FeatureRow]) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Array] = {
        "schema_version": np.asarray(SCHEMA_VERSION, np.int64),
        "image": np.asarray([row.image for row in rows], np.str_),
        "subject": np.asarray([row.subject for row in rows], np.str_),
        "features": stack_features(rows),
        **_build_ood_arrays([row.ood_result for row in rows]),
    }
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _encode_csv(rows: Sequence[FeatureRow]) -> bytes:
    features = stack_features(rows)
    columns = ["image", "subject", *(f"f{i}" for i in range(features.shape[1])), *OOD_COLUMNS]
    lines = (  # `str` gives the shortest decimals of float32
        [row.image, row.subject, *map(str, values), *row.ood_result.columns.values()]
        for row, values in zip(rows, features, strict=True)
    )
    return encode_csv(columns, lines)


def _encode_parquet(rows: Sequence[FeatureRow]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(
            f".parquet: pyarrow is not installed. Run: {install_command('train')}; or write a .csv file."
        ) from None
    keys = {"image": [row.image for row in rows], "subject": [row.subject for row in rows]}
    columns = {f"f{i}": column for i, column in enumerate(stack_features(rows).T)}
    types = {"ood_score": pyarrow.float32(), "ood": pyarrow.bool_(), "ood_feature_group": pyarrow.string()}
    ood_columns = {
        name: pyarrow.array([row.ood_result.columns[name] for row in rows], kind) for name, kind in types.items()
    }
    table = pyarrow.table({**keys, **columns, **ood_columns})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)}), buffer)
    return buffer.getvalue()


def _build_ood_arrays(ood_results: Sequence[OODResult]) -> dict[str, Array]:
    """Convert OOD results to arrays; missing values become NaN, -1 and an empty string."""
    columns = {name: [v.columns[name] for v in ood_results] for name in OOD_COLUMNS}
    return {
        "ood_score": np.array([np.nan if score is None else score for score in columns["ood_score"]], np.float32),
        "ood": np.array([-1 if flag is None else flag for flag in columns["ood"]], np.int8),
        "ood_feature_group": np.array([group or "" for group in columns["ood_feature_group"]], np.str_),
    }


WRITERS: dict[str, Callable[[Sequence[FeatureRow]], bytes]] = {
    ".npz": _encode_npz,
    ".csv": _encode_csv,
    ".parquet": _encode_parquet,
}
