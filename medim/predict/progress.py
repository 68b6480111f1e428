"""Journal of processed images, with which `medim predict` and `medim embed` continue after a stop."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, TypedDict

from medim.data.index.index import Rejection
from medim.output_folder import acquire_lock
from medim.predict.answer import PredictionRow
from medim.types import UserError

log = logging.getLogger(__name__)
JOURNAL = "progress.jsonl"  # in the folder of a prediction
SCHEMA_VERSION = 1


class Entry(TypedDict, total=False):
    """Result of one image."""

    row: PredictionRow  # of `predictions.csv`
    features: list[str | float | None]  # as `encode_features` gives them
    map: dict[str, str | float]  # row of `maps.csv`
    rejected: list[str]  # path, reason, detail


class ProgressJournal:
    """Append-only file: a line with the inputs of the command, then a line per image.

    A line is on the disk before the next image begins. The last line is ignored if a kill has cut it.

    Args:
        file: the file, opened for reading and writing.
        path: its path, for messages.
        inputs: everything besides the image that the results depend on.

    Raises:
        UserError: the journal is that of other inputs.
    """

    def __init__(self, file: IO[str], path: Path, inputs: Mapping[str, Any]) -> None:
        self._file = file
        lines, end = _read_complete_lines(file)
        header = {"schema_version": SCHEMA_VERSION, **inputs}
        if lines and lines[0] != header:
            changes = sorted(key for key in header if lines[0].get(key) != header[key])
            raise UserError(
                f"{path.name}: --resume needs the same inputs; these have changed: {', '.join(changes) or 'all'}. "
                "Use --overwrite to start over."
            )
        file.seek(end)
        file.truncate()
        self.entries: dict[str, Entry] = {str(line.pop("image")): line for line in lines[1:]}
        if not lines:
            self._append(header)

    def add(self, image: str, entry: Entry) -> None:
        """Record the result of an image after its files are written."""
        self._append({"image": image, **entry})
        self.entries[image] = entry

    def discard_missing(self, folder: Path, list_files: Callable[[str, Entry], Iterable[str]]) -> None:
        """Discard the results that lack a file, so that these images are processed again.

        Args:
            folder: folder of the files.
            list_files: function that lists the files of an image by its key and entry.
        """
        missing = [
            image
            for image, entry in self.entries.items()
            if not all((folder / file).is_file() for file in list_files(image, entry))
        ]
        for image in missing:
            del self.entries[image]
        if missing:
            log.info("%s: files of %d images are missing; these images are processed again", folder, len(missing))

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def open_journal(path: Path, inputs: Mapping[str, Any]) -> Iterator[ProgressJournal]:
    """Lock and open a journal, and read the results of an earlier call.

    Raises:
        UserError: another command uses the journal, or it is that of other inputs.
    """
    with _lock_journal(path) as file:
        yield ProgressJournal(file, path, inputs)


def empty_journal(path: Path) -> None:
    """Remove the results of an earlier call.

    Raises:
        UserError: another command uses the journal.
    """
    with _lock_journal(path) as file:
        file.truncate(0)


@contextmanager
def _lock_journal(path: Path) -> Iterator[IO[str]]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(acquire_lock(path, wait=False))
        except BlockingIOError:
            raise UserError(
                f"{path}: another medim command is writing this file. Wait for it, or choose another --out."
            ) from None
        yield file


def encode_rejection(rejection: Rejection) -> Entry:
    """Encode a rejection as an entry of the journal."""
    return {"rejected": [rejection.path, rejection.reason, rejection.detail]}


def decode_rejections(entries: Iterable[Entry]) -> list[Rejection]:
    """Decode the rejections among entries of the journal."""
    rows = (entry["rejected"] for entry in entries if "rejected" in entry)
    return [Rejection(path, reason, detail) for path, reason, detail in rows]


def _read_complete_lines(file: IO[str]) -> tuple[list[Any], int]:
    """Read the lines up to the first damaged one; return them with the position after the last of them."""
    file.seek(0)
    lines: list[Any] = []
    end = 0
    for text in file.read().splitlines(keepends=True):
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not text.endswith("\n") or not isinstance(line, dict) or (lines and "image" not in line):
            break
        lines.append(line)
        end += len(text)  # JSON is written in ASCII
    return lines, end
