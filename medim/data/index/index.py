"""From a source on the disk to an index: one row an image, one reason for everything that is none."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

from medim.data.index.build import Series, build, existing, root_of, sorted_labels
from medim.data.index.records import (
    SCHEMA_VERSION,
    Record,
    Rejection,
    read_records,
    read_rejections,
    write_records,
    write_rejections,
)
from medim.data.index.scan_cache import Looks, Progress, look_at
from medim.data.index.walk import walk
from medim.data.labels import counted, names_of
from medim.data.readers import DICOM, ReadError, read_mask, reader_of, split_item
from medim.data.readers.base import check_voxels
from medim.data.readers.dicom.reader import Plan
from medim.files import hash_of, read_json, write_json
from medim.privacy import Scrubber, find, hidden, pseudonym, tokens
from medim.types import Modality, UsageError, UserError, Volume

__all__ = ["AllRejectedError", "Index", "Record", "Rejection", "build_index", "is_index"]

log = logging.getLogger(__name__)


class AllRejectedError(UserError):
    """Nothing in the source is an image; `index` holds the reasons."""

    exit_code = 4

    def __init__(self, message: str, index: Index) -> None:
        super().__init__(message, index)
        self.message = message
        self.index = index

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Index:
    """The images of a source.

    Attributes:
        root: folder that paths are relative to.
        modality: "mri" or "xray".
        records: the images, sorted by path: everything seeded follows this order.
        rejected: every other file found.
        classes: names of the mask values 1..K; without masks the class labels, sorted.
        hidden: parts of `root` that hold an identity.
        opened: files that had to be opened to build it; the others were as they were.
    """

    root: Path
    modality: Modality
    records: tuple[Record, ...]
    rejected: tuple[Rejection, ...] = ()
    classes: tuple[str, ...] = ()
    hidden: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    opened: int = field(default=0, repr=False, compare=False)
    _series: Series = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def hash(self) -> str:
        """Hex digest of the records and classes; the same wherever the source lies and whatever the site key.

        Subjects and series count by their order, not by their pseudonyms.
        """
        places: dict[str | None, int] = {}

        def row(record: Record) -> dict[str, Any]:
            orders = {key: places.setdefault(getattr(record, key), len(places)) for key in ("subject", "series")}
            return asdict(record) | orders | {"quality": None}  # says nothing new about the files

        rows = [row(record) for record in self.records]
        return hash_of([self.modality, self.classes, rows])

    @property
    def labels(self) -> tuple[str, ...]:
        """The findings that labels speak of, else the class labels that occur, sorted (numbers by value)."""
        return _labels(self.records)

    @cached_property
    def findings(self) -> tuple[str, ...]:
        """The findings that labels speak of; none where a label is a class."""
        return names_of(record.label for record in self.records)

    def locate(self, record: Record) -> Path:
        """The file of an image, or the first file of its series.

        Raises:
            UserError: it is not there any more.
        """
        return self._place(record)[0]

    def plan(self, record: Record) -> Plan | None:
        """Where the slices of a DICOM image stand; None for an image of another format.

        Raises:
            ReadError: it has changed and is no image any more.
        """
        files = self._source(record)
        if reader_of(files[0]) is not DICOM:
            return None
        try:
            return DICOM.plan(files, self._place(record)[1])
        except ReadError as error:
            raise error.at(record.path) from error

    def open(self, record: Record) -> Volume:
        """Read an image.

        Raises:
            ReadError: it has changed and is no image any more; the message names the record's path.
        """
        try:
            item = self._place(record)[1]
            files = self._source(record)
            reader = reader_of(files[0])
            if reader is None:
                raise ReadError("not-an-image", "no reader knows this file any more")
            volume = DICOM.read_files(files) if len(files) > 1 else reader.read(files[0], item)
            check_voxels(volume.array)
            if volume.shape != record.shape:
                raise ReadError(
                    "changed", f"shape {volume.shape}; the index says {record.shape}. Run `medim index` again"
                )
        except ReadError as error:
            raise error.at(record.path) from error
        return volume

    def open_mask(self, record: Record) -> Volume:
        """Read an image's mask: uint8 (1, ...), on the image's grid.

        Raises:
            ReadError: the record has no mask, it cannot be read, or it holds values above the number of classes.
        """
        if record.mask is None:
            raise ReadError("no-mask", "expected a record with a mask", path=record.path)
        try:
            mask = read_mask(find(self.root, record.mask))
        except ReadError as error:
            raise error.at(record.mask) from error
        if self.classes and mask.array.max() > len(self.classes):
            detail = f"the mask holds the value {mask.array.max()}; expected 0 to {len(self.classes)}"
            raise ReadError("unknown-class", detail, path=record.mask)
        return mask

    def fingerprint(self, record: Record) -> str:
        """Hex digest that changes when a source file of the image or its mask changes (size or time)."""
        files = [*self._source(record)] + ([find(self.root, record.mask)] if record.mask else [])
        states = [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in files)]
        return hash_of([pseudonym(str(self.root)), record.path, record.mask, states])

    def write(self, out: Path) -> None:
        """Write `index.parquet` (`index.csv` in the light install), `rejected.csv`, and `summary.json` last."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").unlink(missing_ok=True)
        write_records(out, self.records)
        write_rejections(out / "rejected.csv", self.rejected)
        write_json(out / "summary.json", self._summary(out))

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read what `write` wrote: the folder, or its `index.parquet` or `index.csv`.

        The source is looked for where it lay relative to the index.

        Raises:
            UserError: no whole index lies there.
        """
        folder = path if path.is_dir() else path.parent
        table = next((folder / name for name in ("index.parquet", "index.csv") if (folder / name).is_file()), None)
        if path.is_file():
            table = path
        if table is None or not (folder / "summary.json").is_file():
            raise UserError(
                f"{path}: expected an index (index.parquet or index.csv, and summary.json). Run `medim index`."
            )
        summary = read_json(folder / "summary.json")
        version, modality = summary.get("schema_version"), summary.get("modality")
        if version != SCHEMA_VERSION or modality not in get_args(Modality):
            raise UserError(
                f"{folder}: expected an index of schema version {SCHEMA_VERSION}, got {version}. "
                "Run `medim index` again."
            )
        if summary.get("site") != pseudonym("site"):
            log.warning("the index was made with another site key: hidden path parts cannot be found, subjects differ")
        source = str(summary.get("source"))
        try:
            root = find(folder.resolve(), source).resolve()
        except UserError:
            root = (folder.resolve() / source).resolve()  # told when a file is asked for
        return cls(
            root=root,
            modality=cast(Modality, modality),
            records=read_records(table),
            rejected=read_rejections(folder / "rejected.csv"),
            classes=tuple(str(name) for name in summary.get("classes", ())),
            hidden=_hidden_parts(root, source),
        )

    def _summary(self, out: Path) -> dict[str, object]:
        relative = Path(os.path.relpath(self.root, out.resolve()))
        scrub = Scrubber(tokens(self.hidden))
        return {
            "schema_version": SCHEMA_VERSION,
            "modality": self.modality,
            "source": scrub.path(relative),
            "site": pseudonym("site"),
            "counts": {
                "images": len(self.records),
                "subjects": len({record.subject for record in self.records}),
                "labelled": sum(record.label is not None for record in self.records),
                "masks": sum(record.mask is not None for record in self.records),
                "rejected": len(self.rejected),
            },
            "splits": dict(sorted(Counter(record.split for record in self.records if record.split).items())),
            "labels": dict(counted(record.label for record in self.records)),
            "reasons": dict(sorted(Counter(rejection.reason for rejection in self.rejected).items())),
            "classes": list(self.classes),
            "hash": self.hash,
        }

    def _place(self, record: Record) -> tuple[Path, str | None]:
        """The file of an image, and the image's name in it; a `#` may belong to the file's own name.

        Raises:
            UserError: the file is not there any more.
        """
        place, item = split_item(record.path)
        with suppress(UserError):
            return find(self.root, record.path), None
        return find(self.root, place.as_posix()), item

    def _source(self, record: Record) -> tuple[Path, ...]:
        """Every file of an image, the first one first."""
        first = self.locate(record)
        if record.series is None or len(record.shape) == 2:
            return (first,)

        def near() -> Iterator[list[Path]]:
            yield [first]
            yield sorted(path for path in first.parent.iterdir() if path.is_file())
            yield walk([self.root])  # a series may be spread over folders

        for files in near():
            if (first, record.shape) in self._series:
                break
            sights = [look_at(DICOM.look, path) for path in files if DICOM.accepts(path)]
            found, _ = DICOM.gather(sights, self.modality)
            self._series.update({(image.files[0], image.shape): image.files for image in found})
        if (first, record.shape) not in self._series:
            raise ReadError("changed", "its series is no image any more. Run `medim index` again", path=record.path)
        return self._series[first, record.shape]


def _labels(records: Sequence[Record]) -> tuple[str, ...]:
    """Findings, or classes in order."""
    labels = [record.label for record in records]
    return names_of(labels) or sorted_labels(labels)


def is_index(path: Path) -> bool:
    """Whether a path is an index that `Index.write` wrote: its folder, or its table."""
    if path.is_file():
        return path.name in {"index.parquet", "index.csv"} and (path.parent / "summary.json").is_file()
    return (path / "summary.json").is_file() and any((path / f"index.{kind}").is_file() for kind in ("parquet", "csv"))


def build_index(
    source: Path | Sequence[Path],
    modality: Modality,
    *,
    labels: Path | None = None,
    subjects: Path | None = None,
    jobs: int = 1,
    remember: bool = True,
    progress: Progress | None = None,
) -> Index:
    """Find every image in a source.

    NIfTI, pictures and arrays are read whole, once; of DICOM the headers alone. What was seen of a file is remembered
    until its size or time changes. A subject is whom `subjects` says, or a
    `subjects.csv` in the source; else the DICOM PatientID with its issuer, the BIDS `sub-`, or the file's stem (its
    folder, where stems repeat from folder to folder). It is always written as a pseudonym.

    Args:
        source: files and folders in any layout of `docs/reference/cli.md`; several become one index.
        modality: "mri" (3D) or "xray" (2D).
        labels: CSV with columns `image` or `subject`, and `label`, `mask` (path) or `split`; else a `labels.csv` in the
            source is used.
        subjects: CSV with columns `image`, `subject`.
        jobs: processes; with more than one, a script needs the usual `if __name__ == "__main__":`.
        remember: whether files that have not changed are left unread; see `medim.data.index.scan_cache`.
        progress: called with the number of files known, and of all of their format.

    Raises:
        UserError: a path is missing, nothing lies there, or a table contradicts itself or fits no image.
        AllRejectedError: files were found, and none is an image of this modality.
    """
    if modality not in get_args(Modality):
        raise UsageError(f"modality: expected {' or '.join(get_args(Modality))}, got {modality!r}.")
    if jobs < 1:
        raise UsageError(f"--jobs: expected 1 or more processes, got {jobs}.")
    given = [source] if isinstance(source, str | os.PathLike) else list(source)
    places = existing([Path(place) for place in given])
    looks = Looks(root_of(places) if remember else None, jobs=jobs, progress=progress)
    built = build(places, modality, looks, labels=labels, subjects=subjects)
    index = Index(
        root=built.root,
        modality=modality,
        records=built.records,
        rejected=built.rejected,
        classes=built.classes or _labels(built.records),
        hidden=built.hidden,
        opened=looks.opened,
        _series=built.series,
    )
    if not index.records:
        counts = Counter(rejection.reason for rejection in index.rejected)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        raise AllRejectedError(
            f"expected {modality} images, got {len(index.rejected)} files and no image of them: {reasons}. "
            "See rejected.csv of `medim index` for each file, or choose another --modality.",
            index,
        )
    return index


def _hidden_parts(root: Path, source: str) -> frozenset[str]:
    """The parts of a source's path that stand hidden in the index."""
    pairs = zip(reversed(root.parts), reversed(source.split("/")), strict=False)
    return frozenset(real for real, written in pairs if real != written and hidden(real) == written)
