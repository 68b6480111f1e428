"""Read the images of a command from its arguments, and print their summary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medim.cli.terminal import print_source
from medim.types import Modality, UsageError

if TYPE_CHECKING:
    from medim.data.index.index import Index
    from medim.data.index.tables import TableFile


def read_source(
    arguments: Any, modality: Modality, *, out: Path | None = None, show: bool = True
) -> tuple[Index, Path | None]:
    """Open or build the index in `--data` with the tables and options of a command.

    Args:
        arguments: arguments with `data` and `where`, and optionally `labels`, `subjects`, `keep_names`, `split_seed`.
        modality: modality of the images.
        out: folder in which the command writes `rejected.csv`, for the printed block.
        show: whether to print the summary.

    Returns:
        The index, and the folder of the store if the data are a store.

    Raises:
        UserError: as `medim.data.source.open_source`, or no image satisfies `where`.
        UsageError: `where` is invalid.
    """
    from medim.data.index.selection import parse_condition
    from medim.data.source import open_source

    names = ("labels", "subjects", "keep_names")
    options = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if "labels" in options:
        options["labels"] = name_label_columns(arguments)
    if arguments.where is not None:
        parse_condition(arguments.where)  # a mistake in it shows before images are read
    index, store = open_source(arguments.data, modality, **options)
    index = index if arguments.where is None else index.select(arguments.where)
    if show:
        show_source(arguments, index, out)
    return index, store


def name_label_columns(arguments: Any) -> Path | TableFile | None:
    """Combine `--labels` with the options that name its columns.

    Raises:
        UsageError: such an option is given without `--labels`.
    """
    from medim.data.index.tables import COLUMN_OPTIONS, TableFile

    columns = {column: getattr(arguments, f"{column}_column") for column in COLUMN_OPTIONS}
    columns = {column: name for column, name in columns.items() if name is not None}
    if columns and arguments.labels is None:
        raise UsageError(f"{COLUMN_OPTIONS[next(iter(columns))]}: requires --labels, the table with this column.")
    return TableFile(arguments.labels, columns) if columns else arguments.labels


def show_source(arguments: Any, index: Index, out: Path | None) -> None:
    """Print the summary of the images that a command reads."""
    from medim.output_folder import REJECTIONS_FILE

    rejections_file = None if out is None else out / REJECTIONS_FILE
    print_source(index, split_seed=getattr(arguments, "split_seed", None), rejections_file=rejections_file)
