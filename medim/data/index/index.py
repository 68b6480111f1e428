"""Index of a data source: one row per image, and one reason per rejected file."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NotRequired, get_args

from typing_extensions import TypedDict  # pydantic needs this form before Python 3.12

from medim.data.index.build import (
    DIMENSIONS,
    IndexContent,
    SeriesFiles,
    build_records,
    describe_wrong_dimensions,
    find_common_root,
    resolve_sources,
    sort_labels,
)
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
from medim.data.index.selection import describe_columns, hide_names, parse_condition, scrub_condition
from medim.data.index.tables import TableFile
from medim.data.index.walk import list_readable_files
from medim.data.labels import count_labels, finding_names
from medim.data.mask_classes import MAX_CLASSES, format_values, is_identity, to_class_numbers
from medim.data.readers import DICOM, ReadError, find_reader, read_image, read_mask, split_item
from medim.data.readers.base import check_voxels
from medim.data.readers.dicom.reader import SlicePlan
from medim.files import json_sha256, write_json
from medim.migrations import read_checked_json
from medim.output_folder import REJECTIONS_FILE
from medim.privacy import (
    Scrubber,
    format_path,
    format_result_path,
    identity_tokens,
    make_pseudonym,
    resolve_scrubbed_path,
    scrubbed_name,
)
from medim.types import Modality, UsageError, UserError, Volume

__all__ = ["AllRejectedError", "ImageRecord", "Index", "Rejection", "build_index", "is_index", "read_modality"]

log = logging.getLogger(__name__)
_OTHER_MODALITY: dict[Modality, tuple[int, Modality]] = {"mri": (2, "xray"), "xray": (3, "mri")}
_VERSION_WITH_NAMES = 2  # schema version of earlier indexes, whose paths contain names that are now pseudonyms
_LABEL_REASON_PREFIX = "label-"  # of rejections of labels without an image


class AllRejectedError(UserError):
    """The source contains no image.

    Attributes:
        index: index with the reason of each rejected file.
        rejections_file: `rejected.csv` with these reasons; None if it has not been written.
    """

    exit_code = 4

    def __init__(self, message: str, index: Index) -> None:
        super().__init__(message, index)
        self.message = message
        self.index = index
        self.rejections_file: Path | None = None

    def __str__(self) -> str:
        return self.message + (f" Reason of each file: {self.rejections_file}" if self.rejections_file else "")

    def write_rejections(self, path: Path) -> None:
        """Write the reasons to a CSV file, which the message then names."""
        write_rejections(path, self.index.rejected)
        self.rejections_file = path


class _IndexSummary(TypedDict):
    """Keys of `summary.json` that are read."""

    schema_version: int
    modality: Modality
    source: str
    site: NotRequired[str]
    classes: NotRequired[list[str]]
    class_values: NotRequired[list[int]]
    ignore_value: NotRequired[int | None]
    regions: NotRequired[list[str]]
    keep_names: NotRequired[bool]
    counts: NotRequired[dict[str, int]]
    where: NotRequired[str | None]


@dataclass(frozen=True, kw_only=True)
class Index:
    """Images of a source.

    Attributes:
        root: folder that paths are relative to.
        modality: "mri" or "xray".
        records: the images, sorted by path; all seeded operations depend on this order.
        rejected: all other files of the source.
        classes: names of the classes of the masks, by their number 1..K; without masks, the sorted class labels.
        class_values: value of each class in the mask files; empty if they are the numbers 1..K.
        ignore_value: value of voxels without a label in the mask files, or None.
        regions: names of regions of nnU-Net, which are unions of several values.
        identity_parts: parts of `root` that contain an identity.
        keep_names: whether names of files and folders that are not neutral were kept.
        n_inspected: number of files opened to build the index; the others were unchanged since the last time.
        n_files: number of files of the source that may be images or masks; 0 if unknown.
        unidentified: number of images without a subject ID, and of the subjects guessed for them.
        where: condition that the images satisfy, without texts that no image has; None for all images.
        selection: sentences on the images that the condition leaves; empty for all images, or as read from a folder.
    """

    root: Path
    modality: Modality
    records: tuple[ImageRecord, ...]
    rejected: tuple[Rejection, ...] = ()
    classes: tuple[str, ...] = ()
    class_values: tuple[int, ...] = ()
    ignore_value: int | None = None
    regions: tuple[str, ...] = ()
    identity_parts: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    keep_names: bool = field(default=False, repr=False, compare=False)
    n_inspected: int = field(default=0, repr=False, compare=False)
    n_files: int = field(default=0, repr=False, compare=False)
    unidentified: tuple[int, int] = field(default=(0, 0), repr=False, compare=False)
    where: str | None = field(default=None, repr=False, compare=False)
    selection: str = field(default="", repr=False, compare=False)
    _series: SeriesFiles = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def hash(self) -> str:
        """Hex digest of the records and classes, independent of the location of the source.

        Subjects and series enter by their order, not by their pseudonyms. The hash depends on the site key only if
        names in paths were replaced by pseudonyms.
        """
        numbers: dict[str | None, int] = {}

        def hash_row(record: ImageRecord) -> dict[str, object]:
            orders = {key: numbers.setdefault(getattr(record, key), len(numbers)) for key in ("subject", "series")}
            return asdict(record) | orders | {"quality": None}  # quality is derived from the files

        rows = [hash_row(record) for record in self.records]
        # identical to the hash of earlier versions where the values are the numbers of the classes
        return json_sha256([self.modality, self.classes, rows, *filter(None, [self.mask_mapping])])

    @property
    def mask_mapping(self) -> list[object]:
        """Values of the classes, and the ignored value; empty if all values are the numbers of the classes."""
        if is_identity(self.class_values) and self.ignore_value is None:
            return []
        return [list(self.class_values), self.ignore_value]

    @property
    def source_name(self) -> str:
        """Name of the source for messages, or its pseudonym."""
        return self.root.name if self.keep_names else format_path(self.root.name)

    @property
    def labels(self) -> tuple[str, ...]:
        """Findings in the labels, else the class labels, sorted (numbers by value)."""
        return _list_labels(self.records)

    @cached_property
    def findings(self) -> tuple[str, ...]:
        """Findings in the labels; empty if a label is a class."""
        return finding_names(record.label for record in self.records)

    def locate(self, record: ImageRecord) -> Path:
        """Find the file of an image, or the first file of its series.

        Raises:
            UserError: the file no longer exists.
        """
        return self._locate_item(record)[0]

    def plan_slices(self, record: ImageRecord) -> SlicePlan | None:
        """Find the slices of a DICOM image and their positions; None for an image of another format.

        Raises:
            ReadError: the file has changed and is no longer an image.
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
            ReadError: the file has changed and is no longer a valid image; the message contains the record's path.
        """
        try:
            item = self._locate_item(record)[1]
            files = self._list_source_files(record)
            reader = find_reader(files[0])
            if reader is None:
                raise ReadError("not-an-image", "no reader accepts this file any more")
            volume = DICOM.read_files(files) if len(files) > 1 else read_image(reader, files[0], item)
            check_voxels(volume.array)
            if volume.shape != record.shape:
                raise ReadError(
                    "changed", f"shape {volume.shape}; the index has {record.shape}. Run `medim index` again"
                )
        except ReadError as error:
            raise error.with_path(record.path) from error
        return volume

    def open_mask(self, record: ImageRecord) -> Volume:
        """Read the mask of an image: class numbers, uint8 (1, ...), on the grid of the image.

        The values of the file are converted to the numbers 1..K of the classes; voxels without a label become
        `IGNORE_INDEX`.

        Raises:
            ReadError: the record has no mask, or the mask cannot be read or contains values that are no class.
        """
        if record.mask is None:
            raise ReadError("no-mask", "expected a record with a mask", path=record.path)
        try:
            mask = read_mask(resolve_scrubbed_path(self.root, record.mask))
        except ReadError as error:
            raise error.with_path(record.mask) from error
        values = self.class_values or range(1, min(len(self.classes), MAX_CLASSES) + 1)
        try:
            return mask.with_array(to_class_numbers(mask.array, values, self.ignore_value))
        except ValueError as error:
            detail = f"the mask contains the value {error}; the classes of the index are {format_values(values)}"
            raise ReadError("unknown-class", detail, path=record.mask) from error

    def fingerprint(self, record: ImageRecord) -> str:
        """Compute a hex digest that changes with the size or time of the source files of an image or its mask."""
        files = [*self._list_source_files(record)] + (
            [resolve_scrubbed_path(self.root, record.mask)] if record.mask else []
        )
        states = [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in files)]
        return json_sha256([make_pseudonym(str(self.root)), record.path, record.mask, states])

    def write(self, out: Path, *, final_folder: Path | None = None) -> None:
        """Write `index.parquet` (`index.csv` in the light install), `rejected.csv`, and `summary.json` last.

        Args:
            out: folder to write to.
            final_folder: folder that the files will be read from, if they are moved there; None: `out`.
        """
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").unlink(missing_ok=True)
        write_records(out, self.records)
        write_rejections(out / REJECTIONS_FILE, self.rejected)
        write_json(out / "summary.json", self._summary(final_folder or out))

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read an index from its folder, or from its `index.parquet` or `index.csv`.

        The source is searched at its recorded position relative to the index.

        Raises:
            UserError: the index is missing, incomplete or of another schema version.
        """
        folder = path if path.is_dir() else path.parent
        table = next((folder / name for name in ("index.parquet", "index.csv") if (folder / name).is_file()), None)
        if path.is_file():
            table = path
        if table is None or not (folder / "summary.json").is_file():
            raise UserError(
                f"{format_path(path)}: expected an index (index.parquet or index.csv, and summary.json). "
                "Run `medim index`."
            )
        file = folder / "summary.json"
        summary = read_checked_json(file, None, _IndexSummary, place=format_result_path(file))
        version = summary["schema_version"]
        if version not in (_VERSION_WITH_NAMES, SCHEMA_VERSION):
            raise UserError(
                f"{format_result_path(file)}: expected an index of schema version {SCHEMA_VERSION}, got {version}. "
                "Run `medim index` again."
            )
        if version == _VERSION_WITH_NAMES:
            log.warning(
                "the index was written by an earlier version, which kept the names of NIfTI, PNG and other files. If "
                "they may identify people, run `medim index` again"
            )
        if summary.get("site") != make_pseudonym("site"):
            log.warning("the index was made with another site key: scrubbed paths cannot be resolved, subjects differ")
        source, counts = summary["source"], summary.get("counts", {})
        try:
            root = resolve_scrubbed_path(folder.resolve(), source).resolve()
        except UserError:
            root = (folder.resolve() / source).resolve()  # a missing source is reported when a file is opened
        return cls(
            root=root,
            modality=summary["modality"],
            records=read_records(table),
            rejected=read_rejections(folder / REJECTIONS_FILE),
            classes=tuple(summary.get("classes", ())),
            class_values=tuple(summary.get("class_values", ())),
            ignore_value=summary.get("ignore_value"),
            regions=tuple(summary.get("regions", ())),
            identity_parts=_find_identity_parts(root, source),
            keep_names=bool(summary.get("keep_names", version == _VERSION_WITH_NAMES)),
            n_files=counts.get("files", 0),
            where=summary.get("where"),
            unidentified=(counts.get("images_without_subject_id", 0), counts.get("guessed_subjects", 0)),
        )

    def select(self, where: str) -> Index:
        """Return the index of the images that satisfy a condition; the others are rejected with `not-selected`.

        Args:
            where: condition on the columns, see `medim.data.index.selection`.

        Raises:
            UsageError: the condition is invalid.
            UserError: no image satisfies it.
        """
        condition = parse_condition(where)
        records = tuple(record for record in self.records if condition(record))
        if not records:
            raise UserError(
                f"{self.source_name}: none of {len(self.records)} images satisfies --where {where[:200]!r}. "
                f"{describe_columns(self.records, where)}"
            )
        images = {record.image for record in records}
        others = tuple(
            Rejection(record.path, "not-selected", "an image that does not satisfy --where")
            for record in self.records
            if record.image not in images
        )
        scrubbed_where = scrub_condition(where, self.records)
        n_subjects, n_all = (len({record.subject for record in part}) for part in (records, self.records))
        selection = (
            f"--where {scrubbed_where[:200]!r} leaves {len(records)} of {len(self.records)} images and {n_subjects} of "
            f"{n_all} subjects. {describe_columns(self.records, where)}"
        )
        log.info("%s", selection)
        has_label_classes = self.classes == _list_labels(self.records)
        return replace(
            self,
            records=records,
            rejected=(*self.rejected, *others),
            classes=_list_labels(records) if has_label_classes else self.classes,
            where=scrubbed_where if self.where is None else f"({self.where}) and ({scrubbed_where})",
            selection=selection,
        )

    @property
    def public_where(self) -> str | None:
        """Condition without values that identify images or subjects; None for all images or an invalid condition."""
        with suppress(UsageError):
            return hide_names(self.where) if self.where is not None else None
        return None

    def append_selection(self, message: str) -> str:
        """Append the sentences on the images that `--where` leaves, if it was given, to a message."""
        return f"{message} {self.selection}" if self.selection else message

    def log_unidentified(self) -> None:
        """Log that nothing identifies the subjects of images, or that they were guessed."""
        n_images, n_subjects = self.unidentified
        if n_subjects < n_images:
            log.warning(
                "No subject IDs: guessed %d subjects for %d images from file and folder names. Check them, or give "
                "--subjects",
                n_subjects,
                n_images,
            )
        elif n_images > 1:
            log.warning(
                "No subject IDs: each of %d images counts as its own subject. If patients have several images, "
                "results are too good. Give --subjects",
                n_images,
            )

    def _summary(self, out: Path) -> dict[str, object]:
        relative = Path(os.path.relpath(self.root, out.resolve()))
        scrub = Scrubber(identity_tokens(self.identity_parts), keep_names=False)
        return {
            "schema_version": SCHEMA_VERSION,
            "modality": self.modality,
            "source": scrub.scrub_path(relative),
            "site": make_pseudonym("site"),
            "keep_names": self.keep_names,
            "counts": {
                "images": len(self.records),
                "subjects": len({record.subject for record in self.records}),
                "labelled": sum(record.label is not None for record in self.records),
                "masks": sum(record.mask is not None for record in self.records),
                "rejected": len(self.rejected),
                "files": self.n_files,
                "images_without_subject_id": self.unidentified[0],
                "guessed_subjects": self.unidentified[1],
            },
            "splits": dict(sorted(Counter(record.split for record in self.records if record.split).items())),
            "labels": dict(count_labels(record.label for record in self.records)),
            "reasons": dict(sorted(Counter(rejection.reason for rejection in self.rejected).items())),
            "classes": list(self.classes),
            "class_values": list(self.class_values),
            "ignore_value": self.ignore_value,
            "regions": list(self.regions),
            "where": self.where,
            "hash": self.hash,
        }

    def _locate_item(self, record: ImageRecord) -> tuple[Path, str | None]:
        """Find the file of an image, and the item in it; a `#` may be part of the file name.

        Raises:
            UserError: the file no longer exists.
        """
        file, item = split_item(record.path)
        with suppress(UserError):
            return resolve_scrubbed_path(self.root, record.path), None
        return resolve_scrubbed_path(self.root, file.as_posix()), item

    def _list_source_files(self, record: ImageRecord) -> tuple[Path, ...]:
        """List all files of an image, the first file first."""
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
            raise ReadError(
                "changed", "the series is no longer a valid image. Run `medim index` again", path=record.path
            )
        return self._series[first, record.shape]


def _list_labels(records: Sequence[ImageRecord]) -> tuple[str, ...]:
    """List the findings, or else the sorted classes."""
    labels = [record.label for record in records]
    return finding_names(labels) or sort_labels(labels)


def read_modality(path: Path) -> Modality:
    """Read the modality of an index without its records.

    Args:
        path: folder of the index, or its table.

    Raises:
        UserError: its `summary.json` cannot be read.
    """
    file = (path if path.is_dir() else path.parent) / "summary.json"
    return read_checked_json(file, None, _IndexSummary, place=format_result_path(file))["modality"]


def is_index(path: Path) -> bool:
    """Whether a path is an index written by `Index.write`: its folder, or its table."""
    if path.is_file():
        return path.name in {"index.parquet", "index.csv"} and (path.parent / "summary.json").is_file()
    return (path / "summary.json").is_file() and any((path / f"index.{kind}").is_file() for kind in ("parquet", "csv"))


def is_public_folder(path: Path) -> bool:
    """Whether a path is in a data set that `medim fetch` downloaded, so that its names are public."""
    return any((folder / "fetched.json").is_file() for folder in (path, *path.parents))


def build_index(
    source: Path | Sequence[Path],
    modality: Modality,
    *,
    labels: Path | TableFile | None = None,
    subjects: Path | TableFile | None = None,
    keep_names: bool = False,
    jobs: int = 1,
    remember: bool = True,
    progress: ProgressCallback | None = None,
) -> Index:
    """Find every image in a source.

    NIfTI files, pictures and arrays are read once in full; of DICOM files only the header is read. Results are cached
    until the size or time of a file changes. The subject of an image is taken from `subjects` or a `subjects.csv` in
    the source; else from the DICOM PatientID with its issuer, the BIDS `sub-` entity, or the file stem (or its folder,
    if stems repeat from folder to folder). It is recorded as a pseudonym, and so are parts of paths that contain an
    identity of a header or that are not neutral (`medim.neutral_names`).

    Args:
        source: files and folders in any layout of `docs/reference/cli.md`; several are combined in one index.
        modality: "mri" (3D) or "xray" (2D).
        labels: CSV with columns `image` or `subject`, and `label`, `mask` (path) or `split`; default: a `labels.csv`
            in the source. A `TableFile` names its columns.
        subjects: CSV with columns `image`, `subject`; or a `TableFile`.
        keep_names: keep names that are not neutral, except identities of headers; always for sets of `medim fetch`.
        jobs: number of processes; with more than one, a script needs the usual `if __name__ == "__main__":`.
        remember: skip files that have not changed; see `medim.data.index.scan_cache`.
        progress: called with the number of processed files, and of all files of the same format.

    Raises:
        UserError: a path is missing or empty, or a table is inconsistent or matches no image.
        AllRejectedError: files were found, but none is an image of this modality.

    Examples:
        >>> import nibabel, numpy as np
        >>> nibabel.save(nibabel.Nifti1Image(np.arange(27.0).reshape(3, 3, 3), np.eye(4)), "scan.nii")
        >>> index = build_index(Path("scan.nii"), "mri", remember=False)
        >>> index.records[0].shape
        (3, 3, 3)
    """
    if modality not in get_args(Modality):
        raise UsageError(f"modality: expected {' or '.join(get_args(Modality))}, got {modality!r}.")
    if jobs < 1:
        raise UsageError(f"--jobs: expected 1 or more processes, got {jobs}.")
    sources = resolve_sources([Path(source)] if isinstance(source, str | os.PathLike) else list(map(Path, source)))
    scanner = FileScanner(find_common_root(sources) if remember else None, jobs=jobs, progress=progress)
    keep_names |= all(map(is_public_folder, sources))
    content = build_records(sources, modality, scanner, labels=labels, subjects=subjects, keep_names=keep_names)
    index = _create_index(content, modality, keep_names=keep_names, n_inspected=scanner.n_inspected)
    if not index.records:
        raise _build_rejection_error(index)
    return index


def _create_index(content: IndexContent, modality: Modality, *, keep_names: bool, n_inspected: int) -> Index:
    """Create the index of images that were found."""
    has_masks = any(record.mask is not None for record in content.records)
    return Index(
        root=content.root,
        modality=modality,
        records=content.records,
        rejected=content.rejected,
        classes=content.mask_classes.names if has_masks else _list_labels(content.records),
        class_values=() if is_identity(content.mask_classes.values) else content.mask_classes.values,
        ignore_value=content.mask_classes.ignore_value,
        regions=content.mask_classes.regions,
        identity_parts=content.identity_parts,
        keep_names=keep_names,
        n_inspected=n_inspected,
        n_files=content.n_files,
        unidentified=content.unidentified,
        _series=content.series,
    )


def _build_rejection_error(index: Index) -> AllRejectedError:
    """Build the error about an index without images, with the number of files for each reason."""
    dims, (other_dims, other_modality) = DIMENSIONS[index.modality], _OTHER_MODALITY[index.modality]
    other_detail = describe_wrong_dimensions(other_dims, index.modality)
    labels = [rejection for rejection in index.rejected if rejection.reason.startswith(_LABEL_REASON_PREFIX)]
    files = [rejection for rejection in index.rejected if rejection not in labels]
    others = [rejection for rejection in files if rejection.detail == other_detail]
    rest = [rejection for rejection in files if rejection not in others]
    n_files = sum(rejection.n_files for rejection in files)
    problem = f"expected {dims}D {index.modality} images, got "
    problem += (
        f"{len(others)} {other_dims}D image{'s' * (len(others) > 1)}"
        if others
        else f"{n_files} file{'s' * (n_files != 1)} without such an image"
    )
    problem += f"; files: {_count_reasons(rest)}" if rest else ""
    problem += f"; labels: {_count_reasons(labels)}" if labels else ""
    remedy = f"Use them as modality {other_modality}." if others else "Check the path, or the files."
    return AllRejectedError(f"{index.source_name}: {problem}. {remedy}", index)


def _count_reasons(rejections: Sequence[Rejection]) -> str:
    """Format the number of rejected files for each reason, the most frequent first."""
    counts: Counter[str] = Counter()
    for rejection in rejections:
        counts[rejection.reason] += rejection.n_files
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _find_identity_parts(root: Path, source: str) -> frozenset[str]:
    """Find the parts of a source's path that are scrubbed in the index."""
    pairs = zip(reversed(root.parts), reversed(source.split("/")), strict=False)
    return frozenset(
        real_part
        for real_part, scrubbed_part in pairs
        if real_part != scrubbed_part and scrubbed_name(real_part) == scrubbed_part
    )
