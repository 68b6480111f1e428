"""Content of output folders, comparable between two runs of a command."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medim.output_folder import INTERNAL_NAMES, MARKER
from medim.tracking.outbox import RECORDS, STATE

Content = dict[str, Any]  # file and key: value, or file: digest
# Records of stops, and measurements of the machine, whose number depends on the duration.
RESUME_RECORDS = re.compile(
    r"/checkpoints/|mlflow\.json: /last/system/|/(resumed_from_steps|corrupt_checkpoints|n_resumed_cells)$"
    r"|/[^/]*(seconds|hours|peak_memory|wait_fraction)[^/]*$"
)


def read_content(folder: Path, outputs: Sequence[str]) -> Content:
    """Read all files of a result by name: the values of JSON objects by key, the digests of other files.

    Files of the exchange of results (`.medim-new` and others) are left out, and the records for MLflow that a kill
    after the end of a result leaves beside it.
    """
    content: Content = {}
    for output in outputs:
        for path in sorted(_list_files(folder / output)):
            name = path.relative_to(folder).as_posix()
            is_record = path.name in {RECORDS, STATE} and not path.with_name("config.yaml").is_file()
            if not is_record and path.name != MARKER and not INTERNAL_NAMES & set(path.relative_to(folder).parts):
                content |= _read_file(name, path)
    return content


def _list_files(output: Path) -> Iterator[Path]:
    if output.is_file():
        yield output
    elif output.is_dir():
        yield from (path for path in output.rglob("*") if path.is_file())


def _read_file(name: str, path: Path) -> Content:
    data = path.read_bytes()
    if path.suffix == ".json":
        with suppress(ValueError):  # a part of a file, which `find_unreadable` lists
            return {name: "", **{f"{name}: {key}": value for key, value in _flatten(json.loads(data))}}
    return {name: hashlib.sha256(data).hexdigest()}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flatten(part, f"{prefix}/{key}")
    else:
        yield prefix, json.dumps(value)


@dataclass(frozen=True)
class Reference:
    """Result of an uninterrupted command.

    Attributes:
        content: its content.
        volatile: names whose values differ between two such runs, such as times.
        seconds: duration of the command.
    """

    content: Content
    volatile: frozenset[str]
    seconds: float

    def compare(self, content: Content) -> list[str]:
        """List the names that are missing, unexpected or different."""
        names = sorted(set(self.content) ^ set(content))
        names += sorted(n for n in set(self.content) & set(content) if self.content[n] != content[n])
        return [name for name in names if name not in self.volatile and not RESUME_RECORDS.search(name)]


def find_unreadable(content_root: Path, outputs: Sequence[str]) -> list[str]:
    """List files at their final names that cannot be read as a whole: JSON, CSV, NIfTI, npz, Parquet, weights."""
    unreadable = []
    for output in outputs:
        for path in sorted(_list_files(content_root / output)):
            parts = path.relative_to(content_root).parts
            if INTERNAL_NAMES & set(parts) or any(part.startswith(".") for part in parts):
                continue
            try:
                _read_whole(path)
            except Exception as error:  # libraries raise many exception types
                unreadable.append(f"{path.relative_to(content_root)}: {type(error).__name__}")
    return unreadable


def _read_whole(path: Path) -> None:
    import blosc2
    import nibabel
    import numpy as np
    import pyarrow.parquet
    import safetensors.numpy

    if path.suffix == ".json":
        json.loads(path.read_bytes())
    elif path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(path.read_text())))
        if len({len(row) for row in rows}) != 1:
            raise ValueError("rows of different lengths")
    elif path.suffix == ".gz":
        np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            [arrays[name] for name in arrays.files]
    elif path.suffix == ".parquet":
        pyarrow.parquet.read_table(path)
    elif path.suffix == ".safetensors":
        safetensors.numpy.load_file(path)
    elif path.suffix == ".b2nd":
        blosc2.open(str(path), mode="r")[...]
    elif path.suffix in {".html", ".svg"} and not path.read_text().rstrip().endswith(f"</{path.suffix[1:]}>"):
        raise ValueError("the end is missing")
