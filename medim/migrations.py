"""Rename the keys and columns of files that earlier versions of medim wrote.

Each reader of such a file calls a function of this module with the kind of the file. Files of this version are returned
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from medim.files import read_json
from medim.parsing import CsvContent, read_csv
from medim.types import UserError

T = TypeVar("T")

FileKind = Literal[
    "run",
    "history",
    "study",
    "results",
    "pretraining",
    "audit",
    "quality",
    "store_entry",
    "model_spec",
    "checkpoint_selection_state",
]
_SELECTION_KEYS = {
    "by": "criterion",
    "of_steps": "last_step",
    "why": "reason",
    "figures": "metrics",
    "metrics.held_out_loss": "val_loss",
    "labels": "n_labels",
}
_CHECKPOINT_SELECTION = {
    "selected": "checkpoint_selection",
    **{f"checkpoint_selection.{path}": key for path, key in _SELECTION_KEYS.items()},
}
FILE_KEYS: dict[FileKind, dict[str, str]] = {  # kind of file: {path of the old key: new key}; `*` is every item
    # summary.json of a pretraining or fine-tuning run, metrics.json and summary.json of an evaluation, probe.json
    "run": {
        "verdict_why": "verdict_reason",
        "what_to_try": "advice",
        "verdicts": "verdict_changes",
        "verdict_changes.*.why": "reason",
        **_CHECKPOINT_SELECTION,
        "probe.neighbours": "n_neighbours",
        "probe.asked": "n_queries",
        "loss.*.held_out": "val",
        "diagnostics.*.held_out": "val",
        "data_wait_fraction": "dataloader_wait_fraction",
        "damaged_checkpoints": "corrupt_checkpoints",
        "overlap": "train_val_duplicates",
        "seen": "contamination",
        "labelled": "n_labelled",
        "unlabelled_left_out": "n_unlabelled",
        "excluded_seen": "n_excluded_subjects",
        "excluded_seen_images": "n_excluded_images",
        "bootstrap.over": "unit",
        "rows.*.c_from": "c_source",
        "maps": "levels",
    },
    "history": {"held_out": "val"},  # columns of history.csv
    "study": {  # summary.json of a study
        "measure_at": "eval_steps",
        "overlap": "train_val_duplicates",
        "seen": "contamination",
        "chosen_with_labels": "n_selection_labels",
        "too_small_to_choose": "no_lr_selection",
        "repeat": "command_line",
        "resumed_cells": "n_resumed_cells",
        "comparisons.rows.*.labelled": "n_labelled",
        "comparisons.rows.*.difference.over": "variance_sources",
        "comparisons.rows.*.labels_saved.worth": "equivalent_labels",
        "comparisons.rows.*.labels_saved.over": "variance_sources",
        "comparisons.rows.*.time_to_scratch.over": "variance_sources",
    },
    "results": {"init": "arm", "labelled": "n_labelled"},  # columns of results.parquet
    "audit": {  # audit.json
        "duplicates.bits": "max_hamming_distance",
        "duplicates.unhashed": "n_unhashed",
        "duplicates.near.*.trained": "train_image",
        "duplicates.near.*.held_out": "other_image",
        "duplicates.near.*.bits": "hamming_distance",
        "shortcuts.*.differs": "varies",
        "shortcuts.*.told": "prediction",
        "probes.*.left_out": "excluded",
        "probes.*.told": "prediction",
    },
    "quality": {  # columns of quality.csv
        "levels": "n_unique_values",
        "empty": "background_fraction",
        "nearest": "nearest_other_subject",
        "distance": "hamming_other_subject",
        "nearest_own": "nearest_same_subject",
        "distance_own": "hamming_same_subject",
    },
    "store_entry": {  # header of an image in a store
        "figures": "metrics",
        "metrics.levels": "n_unique_values",
        "metrics.empty": "background_fraction",
    },
    "pretraining": {"arms.*.*.loss.*.held_out": "val", "arms.*.*.curves.*.held_out": "val"},  # pretraining.json
    "model_spec": _CHECKPOINT_SELECTION,  # encoder.json, and `architecture` in medim.json
    "checkpoint_selection_state": {"figures": "metrics", "metrics.held_out_loss": "val_loss"},  # in a checkpoint
}
FILE_VALUES: dict[FileKind, dict[str, dict[str, str]]] = {  # kind of file: {path of a key: {old value: new value}}
    "run": {"checkpoint_selection.criterion": {"held_out_loss": "val_loss"}, "bootstrap.unit": {"subjects": "subject"}},
    "model_spec": {"checkpoint_selection.criterion": {"held_out_loss": "val_loss"}},
    "audit": {
        "shortcuts.*.name": {
            "size as read": "raw size",
            "size as seen": "input size",
            "intensity as read": "raw intensity",
            "intensity as seen": "input intensity",
        },
        "shortcuts.*.features": {"levels": "n_unique_values"},
    },
}


def read_migrated_json(path: Path, kind: FileKind, *, place: str | None = None) -> dict[str, Any]:
    """Read a JSON object, with the keys of this version; messages name `place`, or the path.

    Raises:
        UserError: the file is missing, not JSON, or not an object.
    """
    return rename_keys(read_json(path, place=place), kind)


def read_checked_json(path: Path, kind: FileKind | None, schema: type[T], *, place: str | None = None) -> T:
    """Read a JSON object, rename old keys, and check the content against a schema.

    Args:
        path: the file.
        kind: kind of the file; None if no version had other keys.
        schema: a `TypedDict`; other keys than those of the schema are allowed.
        place: name of the file in messages, without identities; None for the path.

    Returns:
        The content with all keys of the file.

    Raises:
        UserError: the file is missing or not JSON, or a value is missing or of another type.
    """
    content = read_json(path, place=place) if kind is None else read_migrated_json(path, kind, place=place)
    try:
        _build_adapter(cast(Any, schema)).validate_python(content, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        problem = "which is missing" if fault["type"] == "missing" else f"got {str(fault['input'])[:100]!r}"
        raise UserError(
            f"{place or path}: expected a valid value of {key!r}, {problem}. Copy the file again."
        ) from None
    return cast(T, content)


@cache
def _build_adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def read_migrated_csv(path: Path, kind: FileKind, *, remedy: str = "Copy it again.") -> CsvContent:
    """Read a CSV file that medim wrote, with the column names of this version.

    Raises:
        UserError: the file is damaged.
    """
    content = read_csv(path, remedy=remedy)
    columns = tuple(rename_columns(content.columns, kind))
    rows = tuple(dict(zip(columns, row.values(), strict=True)) for row in content.rows)
    return CsvContent(columns, rows, content.lines)


def rename_keys(content: Mapping[str, Any], kind: FileKind) -> dict[str, Any]:
    """Return the content of a file with the keys of this version; the argument is not changed.

    Examples:
        >>> rename_keys({"selected": {"by": "held_out_loss", "step": 20}}, "run")
        {'checkpoint_selection': {'criterion': 'val_loss', 'step': 20}}
    """
    migrated: Any = dict(content)
    for path, new_key in FILE_KEYS[kind].items():
        *parents, old_key = path.split(".")
        migrated = _change_at(migrated, parents, partial(_rename, old_key, new_key))
    for path, values in FILE_VALUES.get(kind, {}).items():
        *parents, key = path.split(".")
        migrated = _change_at(migrated, parents, partial(_replace_value, key, values))
    return dict(migrated)


def rename_columns(names: Iterable[str], kind: FileKind) -> list[str]:
    """Return the column names of a table, with those of this version.

    Examples:
        >>> rename_columns(["step", "held_out"], "history")
        ['step', 'val']
    """
    return [FILE_KEYS[kind].get(name, name) for name in names]


def _change_at(content: Any, path: Sequence[str], change: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Replace the mappings at a path by their changed copies; `*` is every item of a list or value of a mapping."""
    if path and path[0] == "*" and isinstance(content, list):
        return [_change_at(item, path[1:], change) for item in content]
    if not isinstance(content, Mapping):
        return content
    if not path:
        return change(content)
    keys = content.keys() if path[0] == "*" else content.keys() & {path[0]}
    return {name: _change_at(value, path[1:], change) if name in keys else value for name, value in content.items()}


def _rename(old_key: str, new_key: str, mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return {new_key if key == old_key else key: value for key, value in mapping.items()}


def _replace_value(key: str, new_values: Mapping[str, str], mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    value = mapping.get(key)
    if isinstance(value, list):
        return {**mapping, key: [new_values.get(item, item) for item in value]}
    return {**mapping, key: new_values[value]} if isinstance(value, str) and value in new_values else mapping
