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

from medim.data.index.build import SeriesFiles, build_records, find_common_root, resolve_sources, sort_labels
from medim.data.index.records import (
    SCHEMA_VERSION,
    ImageRecord,
    Rejection,
    read_records,
    read_rejections,
    write_records,
    write_rejections,
)
from medim.data.index.scan_cache import FileScanner, ProgressCallback, inspect_file
from medim.data.index.walk import list_readable_files
from medim.data.labels import count_labels, finding_names
from medim.data.readers import DICOM, ReadError, find_reader, read_mask, split_item
from medim.data.readers.base import check_voxels
from medim.data.readers.dicom.reader import SlicePlan
from medim.files import json_sha256, read_json, write_json
from medim.privacy import Scrubber, identity_tokens, make_pseudonym, resolve_scrubbed_path, scrubbed_name
from medim.types import Modality, UsageError, UserError, Volume

__all__ = ["AllRejectedError", "ImageRecord", "Index", "Rejection", "build_index", "is_index"]

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
        identity_parts: parts of `root` that hold an identity.
        n_inspected: files that had to be opened to build it; the others were as they were.
    """

    root: Path
    modality: Modality
    records: tuple[ImageRecord, ...]
    rejected: tuple[Rejection, ...] = ()
    classes: tuple[str, ...] = ()
    identity_parts: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    n_inspected: int = field(default=0, repr=False, compare=False)
    _series: SeriesFiles = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def hash(self) -> str:
        """Hex digest of the records and classes; the same wherever the source lies and whatever the site key.

        Subjects and series count by their order, not by their pseudonyms.
        """
        numbers: dict[str | None, int] = {}

        def hash_row(record: ImageRecord) -> dict[str, Any]:
            orders = {key: numbers.setdefault(getattr(record, key), len(numbers)) for key in ("subject", "series")}
            return asdict(record) | orders | {"quality": None}  # says nothing new about the files

        rows = [hash_row(record) for record in self.records]
        return json_sha256([self.modality, self.classes, rows])

    @property
    def labels(self) -> tuple[str, ...]:
        """The findings that labels speak of, else the class labels that occur, sorted (numbers by value)."""
        return _list_labels(self.records)

    @cached_property
    def findings(self) -> tuple[str, ...]:
        """The findings that labels speak of; none where a label is a class."""
        return finding_names(record.label for record in self.records)

    def locate(self, record: ImageRecord) -> Path:
        """The file of an image, or the first file of its series.

        Raises:
            UserError: it is not there any more.
        """
        return self._locate_item(record)[0]

    def plan_slices(self, record: ImageRecord) -> SlicePlan | None:
        """Where the slices of a DICOM image stand; None for an image of another format.

        Raises:
            ReadError: it has changed and is no image any more.
        """
        files = self._list_source_files(record)
        if find_reader(files[0]) is not DICOM:
            return None
        try:
            return DICOM.plan_slices(files, self._locate_item(record)[1])
        except ReadError as error:
            raise error.with_path(record.path) from error

    def open(self, record: ImageRecord) -> Volume:
        """Read an image.

        Raises:
            ReadError: it has changed and is no image any more; the message names the record's path.
        """
        try:
            item = self._locate_item(record)[1]
            files = self._list_source_files(record)
            reader = find_reader(files[0])
            if reader is None:
                raise ReadError("not-an-image", "no reader knows this file any more")
            volume = DICOM.read_files(files) if len(files) > 1 else reader.read(files[0], item)
            check_voxels(volume.array)
            if volume.shape != record.shape:
                raise ReadError(
                    "changed", f"shape {volume.shape}; the index says {record.shape}. Run `medim index` again"
                )
        except ReadError as error:
            raise error.with_path(record.path) from error
        return volume

    def open_mask(self, record: ImageRecord) -> Volume:
        """Read an image's mask: uint8 (1, ...), on the image's grid.

        Raises:
            ReadError: the record has no mask, it cannot be read, or it holds values above the number of classes.
        """
        if record.mask is None:
            raise ReadError("no-mask", "expected a record with a mask", path=record.path)
        try:
            mask = read_mask(resolve_scrubbed_path(self.root, record.mask))
        except ReadError as error:
            raise error.with_path(record.mask) from error
        if self.classes and mask.array.max() > len(self.classes):
            detail = f"the mask holds the value {mask.array.max()}; expected 0 to {len(self.classes)}"
            raise ReadError("unknown-class", detail, path=record.mask)
        return mask

    def fingerprint(self, record: ImageRecord) -> str:
        """Hex digest that changes when a source file of the image or its mask changes (size or time)."""
        files = [*self._list_source_files(record)] + (
            [resolve_scrubbed_path(self.root, record.mask)] if record.mask else []
        )
        states = [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in files)]
        return json_sha256([make_pseudonym(str(self.root)), record.path, record.mask, states])

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
        if summary.get("site") != make_pseudonym("site"):
            log.warning("the index was made with another site key: hidden path parts cannot be found, subjects differ")
        source = str(summary.get("source"))
        try:
            root = resolve_scrubbed_path(folder.resolve(), source).resolve()
        except UserError:
            root = (folder.resolve() / source).resolve()  # told when a file is asked for
        return cls(
            root=root,
            modality=cast(Modality, modality),
            records=read_records(table),
            rejected=read_rejections(folder / "rejected.csv"),
            classes=tuple(str(name) for name in summary.get("classes", ())),
            identity_parts=_find_identity_parts(root, source),
        )

    def _summary(self, out: Path) -> dict[str, object]:
        relative = Path(os.path.relpath(self.root, out.resolve()))
        scrub = Scrubber(identity_tokens(self.identity_parts))
        return {
            "schema_version": SCHEMA_VERSION,
            "modality": self.modality,
            "source": scrub.scrub_path(relative),
            "site": make_pseudonym("site"),
            "counts": {
                "images": len(self.records),
                "subjects": len({record.subject for record in self.records}),
                "labelled": sum(record.label is not None for record in self.records),
                "masks": sum(record.mask is not None for record in self.records),
                "rejected": len(self.rejected),
            },
            "splits": dict(sorted(Counter(record.split for record in self.records if record.split).items())),
            "labels": dict(count_labels(record.label for record in self.records)),
            "reasons": dict(sorted(Counter(rejection.reason for rejection in self.rejected).items())),
            "classes": list(self.classes),
            "hash": self.hash,
        }

    def _locate_item(self, record: ImageRecord) -> tuple[Path, str | None]:
        """The file of an image, and the image's name in it; a `#` may belong to the file's own name.

        Raises:
            UserError: the file is not there any more.
        """
        file, item = split_item(record.path)
        with suppress(UserError):
            return resolve_scrubbed_path(self.root, record.path), None
        return resolve_scrubbed_path(self.root, file.as_posix()), item

    def _list_source_files(self, record: ImageRecord) -> tuple[Path, ...]:
        """Every file of an image, the first one first."""
        first = self.locate(record)
        if record.series is None or len(record.shape) == 2:
            return (first,)

        def search_scopes() -> Iterator[list[Path]]:
            yield [first]
            yield sorted(path for path in first.parent.iterdir() if path.is_file())
            yield list_readable_files([self.root])  # a series may be spread over folders

        for files in search_scopes():
            if (first, record.shape) in self._series:
                break
            inspections = [inspect_file(DICOM.inspect, path) for path in files if DICOM.accepts(path)]
            images, _ = DICOM.collect_images(inspections, self.modality)
            self._series.update({(image.files[0], image.shape): image.files for image in images})
        if (first, record.shape) not in self._series:
            raise ReadError("changed", "its series is no image any more. Run `medim index` again", path=record.path)
        return self._series[first, record.shape]


def _list_labels(records: Sequence[ImageRecord]) -> tuple[str, ...]:
    """Findings, or classes in order."""
    labels = [record.label for record in records]
    return finding_names(labels) or sort_labels(labels)


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
    progress: ProgressCallback | None = None,
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
    source_list = [source] if isinstance(source, str | os.PathLike) else list(source)
    sources = resolve_sources([Path(place) for place in source_list])
    scanner = FileScanner(find_common_root(sources) if remember else None, jobs=jobs, progress=progress)
    content = build_records(sources, modality, scanner, labels=labels, subjects=subjects)
    index = Index(
        root=content.root,
        modality=modality,
        records=content.records,
        rejected=content.rejected,
        classes=content.classes or _list_labels(content.records),
        identity_parts=content.identity_parts,
        n_inspected=scanner.n_inspected,
        _series=content.series,
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


def _find_identity_parts(root: Path, source: str) -> frozenset[str]:
    """The parts of a source's path that stand hidden in the index."""
    pairs = zip(reversed(root.parts), reversed(source.split("/")), strict=False)
    return frozenset(
        real_part
        for real_part, scrubbed_part in pairs
        if real_part != scrubbed_part and scrubbed_name(real_part) == scrubbed_part
    )
