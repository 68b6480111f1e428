"""Implementation of `build_index`: from image files to records without identities."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path, PurePath

import numpy as np

from medim.data.index.decathlon import file_stem
from medim.data.index.join import (
    PendingRecord,
    check_participant_tables,
    exclude_masks,
    join_labels,
    join_subjects,
    load_join_tables,
)
from medim.data.index.label_maps import separate_label_maps
from medim.data.index.layouts import FolderLabels, Layout, detect_layout, labels_from_folders
from medim.data.index.masks import check_masks
from medim.data.index.records import ImageRecord, Rejection
from medim.data.index.scan_cache import FileScanner
from medim.data.index.tables import TableFile
from medim.data.index.walk import is_system_path, list_files
from medim.data.mask_classes import MaskClasses, describe_classes
from medim.data.readers import READERS, collect_images, find_reader
from medim.data.readers.base import Reader
from medim.data.readers.dicom.reader import DicomReader, mark_damaged_neighbours
from medim.data.readers.inspection import CollectionResult, ImageInfo, RejectedFile
from medim.neutral_names import is_neutral_name
from medim.privacy import Scrubber, format_path, make_pseudonym, scrubbed_name
from medim.types import Modality, UserError

log = logging.getLogger(__name__)
DIMENSIONS: dict[Modality, int] = {"mri": 3, "xray": 2}  # of the images of each modality

# all files of an image, by its first file and shape
SeriesFiles = dict[tuple[Path, tuple[int, ...]], tuple[Path, ...]]


@dataclass(frozen=True, kw_only=True)
class IndexContent:
    """Content of an `Index`."""

    root: Path
    records: tuple[ImageRecord, ...]
    rejected: tuple[Rejection, ...]
    mask_classes: MaskClasses
    identity_parts: frozenset[str]
    n_files: int
    unidentified: tuple[int, int]
    series: SeriesFiles = field(repr=False)


def build_records(
    sources: Sequence[Path],
    modality: Modality,
    scanner: FileScanner,
    *,
    labels: Path | TableFile | None = None,
    subjects: Path | TableFile | None = None,
    keep_names: bool = False,
) -> IndexContent:
    """Find images, join the tables and remove identities; see `medim.data.index.index.build_index`."""
    root = find_common_root(sources)
    files, unreadable = list_files(sources)
    layout = detect_layout(files, [TableFile.of(table).path for table in (labels, subjects) if table is not None])
    label_tables = load_join_tables(layout, "labels", labels)
    exclude_masks(layout, label_tables, root)
    layout.rejected += unreadable
    if not layout.images and not layout.rejected and not layout.unmatched_masks:
        raise UserError(
            f"{', '.join(map(format_path, sources))}: expected image files, found none. Choose another folder."
        )
    n_files = len({*layout.images, *layout.masks.values(), *layout.unmatched_masks}) + len(layout.rejected)
    images, rejected = _inspect_files(layout.images, modality, scanner)
    if n_multi_valued := sum("several-labels" in image.quality for image in images):
        log.warning(
            "%d images have multi-valued labels, which are not supported; the labels are ignored", n_multi_valued
        )
    images, wrong_dimensions = _filter_dimensions(images, modality)
    rejected += wrong_dimensions + layout.rejected
    lists_masks = any(cells.get("mask") for table, _ in label_tables for _, cells in table.rows)
    images, rejected = separate_label_maps(images, rejected, layout, scanner, root=root, may_join=not lists_masks)
    images, drawings = _reject_drawings(images)
    rejected += drawings
    pending_records = _create_pending_records(images, layout, sources, keep_names=keep_names)
    check_participant_tables(pending_records, layout)
    subject_tables = load_join_tables(layout, "subjects", subjects)
    join_subjects(pending_records, subject_tables, label_tables, layout, root)
    join_labels(pending_records, label_tables, root)
    pending_records, mask_rejected, mask_classes = check_masks(pending_records, layout, scanner)
    rejected += mask_rejected
    guessed_subjects = [pending.subject for pending in pending_records if pending.is_subject_guessed]
    all_files: list[ImageInfo | RejectedFile] = [*images, *rejected, *_identities_of_skipped(layout, modality, scanner)]
    scrubber = Scrubber((token for image in all_files for token in image.identities), keep_names=keep_names)
    if any(pending.mask is not None for pending in pending_records):
        log.info("%s", describe_classes(mask_classes))
    return IndexContent(
        root=root,
        records=_create_image_records(pending_records, root, scrubber, modality),
        rejected=_create_rejections(rejected, root, scrubber),
        mask_classes=mask_classes,
        identity_parts=frozenset(part for part in root.parts if scrubber.contains_identity(part)),
        n_files=n_files,
        unidentified=(len(guessed_subjects), len(set(guessed_subjects))),
        series={(d.image.files[0], d.image.shape): d.image.files for d in pending_records if d.image.series},
    )


def sort_labels(labels: Iterable[str | None]) -> tuple[str, ...]:
    """List the distinct labels, sorted by value if all are numbers, else by name."""
    names = {label for label in labels if label is not None}
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def resolve_sources(sources: Sequence[Path]) -> list[Path]:
    """Resolve the paths of the sources.

    Raises:
        UserError: there are none, or one does not exist.
    """
    if not sources:
        raise UserError("expected a file or folder to index, got none.")
    for source in sources:
        if not source.exists():
            raise UserError(f"{format_path(source)}: expected a file or folder here, found none. Check the path.")
        if is_system_path(source.resolve()) or source.resolve() == Path("/"):
            raise UserError(f"{format_path(source)}: expected a folder of images, got one of the operating system.")
    return [source.resolve() for source in sources]


def find_common_root(sources: Sequence[Path]) -> Path:
    """Find the deepest folder that contains all sources."""
    return Path(os.path.commonpath([source if source.is_dir() else source.parent for source in sources]))


def _relative_path(path: Path, root: Path) -> PurePath:
    return PurePath(os.path.relpath(path, root))


def _inspect_files(images: Sequence[Path], modality: Modality, scanner: FileScanner) -> CollectionResult:
    """Inspect each file with its reader, and assemble the images."""
    by_reader: dict[Reader, list[Path]] = defaultdict(list)
    image_infos: list[ImageInfo] = []
    rejected: list[RejectedFile] = []
    for path in images:
        reader = find_reader(path)
        if reader is None:
            rejected.append(_reject_unknown_file(path))
        else:
            by_reader[reader].append(path)
    for reader, paths in by_reader.items():
        reader_images, reader_rejected = collect_images(reader, scanner(reader.inspect, paths), modality)
        image_infos += reader_images
        rejected += reader_rejected
    return mark_damaged_neighbours(image_infos, rejected), rejected


def _identities_of_skipped(layout: Layout, modality: Modality, scanner: FileScanner) -> list[ImageInfo | RejectedFile]:
    """Inspect DICOM files that the layout rejected: their recorded paths may contain identities of their headers."""
    files = [rejected.path for rejected in layout.rejected if isinstance(find_reader(rejected.path), DicomReader)]
    images, rejected = _inspect_files(files, modality, scanner)
    return [*images, *rejected]


def _reject_unknown_file(path: Path) -> RejectedFile:
    """Build the rejection of a file that no reader accepts."""
    try:
        empty = path.stat().st_size == 0
    except OSError:
        return RejectedFile(path=path, reason="missing", detail="the file was removed during indexing")
    reason = "empty-file" if empty else "not-an-image"
    return RejectedFile(path=path, reason=reason, detail="a file of no supported format")


def describe_wrong_dimensions(dims: int, modality: Modality) -> str:
    """Describe an image that has not the number of dimensions of its modality."""
    return f"an image of {dims} dimensions; {modality} has {DIMENSIONS[modality]}"


def _filter_dimensions(images: Sequence[ImageInfo], modality: Modality) -> tuple[list[ImageInfo], list[RejectedFile]]:
    """Reject images with the wrong number of dimensions: MRI is 3D, X-rays are 2D."""
    dims = DIMENSIONS[modality]
    rejected: dict[Path, RejectedFile] = {}
    for image in images:
        if len(image.shape) != dims:
            detail = describe_wrong_dimensions(len(image.shape), modality)
            rejected[image.files[0]] = RejectedFile(
                path=image.files[0], reason="wrong-dimensions", detail=detail, identities=image.identities
            )
    return [image for image in images if len(image.shape) == dims], list(rejected.values())


def _reject_drawings(images: Sequence[ImageInfo]) -> tuple[list[ImageInfo], list[RejectedFile]]:
    """Reject coloured pictures with flat areas: screenshots and drawings in a tree of X-rays."""
    drawings = [image for image in images if {"coloured", "drawing-like"} <= set(image.quality)]
    paths = {image.files[0] for image in drawings}
    detail = "a coloured picture with flat areas, such as a screenshot or a drawing; an X-ray is grey: save it as such"
    rejected = [RejectedFile(path=path, reason="looks-like-drawing", detail=detail) for path in sorted(paths)]
    return [image for image in images if image.files[0] not in paths], rejected


def _create_rejections(rejected: Sequence[RejectedFile], root: Path, scrubber: Scrubber) -> tuple[Rejection, ...]:
    """Convert rejected files to rejections without identities, sorted by their written paths."""
    rejections = (
        Rejection(scrubber.scrub_path(_relative_path(file.path, root)), file.reason, file.detail, file.n_files)
        for file in sorted(dict.fromkeys(rejected), key=lambda file: file.path)
    )
    return tuple(sorted(rejections, key=lambda rejection: rejection.path.split("/")))


def _create_pending_records(
    images: Sequence[ImageInfo], layout: Layout, sources: Sequence[Path], *, keep_names: bool
) -> list[PendingRecord]:
    """Create one pending record per image, with the labels and splits of its folders."""
    pictures = [reader for reader in READERS if reader.class_folders]
    picture_paths = [
        image.files[0] for image in images if not image.item and any(r.accepts(image.files[0]) for r in pictures)
    ]
    labels_by_path = labels_from_folders(picture_paths, sources)
    pending_records = []
    for image in sorted(images, key=_image_sort_key):
        path = image.files[0]
        folder_labels = labels_by_path.get(path, FolderLabels())
        folder_label, split = folder_labels.label, folder_labels.split
        if folder_label and not (keep_names or is_neutral_name(folder_label)):
            folder_label = scrubbed_name(folder_label)  # the folder of a class may be that of a patient
        folder = layout.find_folder(path)
        if folder:
            image = replace(image, sequence=image.sequence or folder.sequence(path, image.item))
            split = "test" if path in folder.test_images else split
        pending_records.append(
            PendingRecord(
                image=image,
                subject=image.subject or (make_pseudonym(folder_labels.subject) if folder_labels.subject else None),
                label=image.label or folder_label,
                mask=layout.masks.get(path),
                split=image.split or split,
            )
        )
    return pending_records


def _image_sort_key(image: ImageInfo) -> tuple[tuple[str, ...], int, int]:
    """Sort key of an image: its path; inside an archive, its split and number."""
    return image.files[0].parts, *_item_sort_key(image)


def _item_sort_key(image: ImageInfo) -> tuple[int, int]:
    """Sort key of an image inside an archive: its split and number."""
    split, _, number = (image.item or "").rpartition("/")
    return ("train", "val", "test").index(split) if split else 0, int(number or 0)


def _create_image_records(
    pending_records: Sequence[PendingRecord], root: Path, scrubber: Scrubber, modality: Modality
) -> tuple[ImageRecord, ...]:
    """Convert pending records to records without identities.

    They are sorted by their written paths, because the order of the real ones would reveal that of the names.
    """
    keys = _assign_image_keys(pending_records, root, scrubber)
    records: list[tuple[tuple[list[str], int, int], ImageRecord]] = []
    for pending, key in zip(pending_records, keys, strict=True):
        image = pending.image
        path = scrubber.scrub_path(_relative_path(image.files[0], root))
        dims = len(image.shape)
        record = ImageRecord(
            image=key,
            path=f"{path}#{image.item}" if image.item else path,
            subject=pending.subject or "",
            session=image.session,
            series=image.series,
            modality=modality,
            sequence=scrubber.scrub_text(image.sequence),
            shape=tuple(int(length) for length in image.shape),
            spacing=tuple(float(length) for length in np.linalg.norm(image.affine[:3, :dims], axis=0)),
            affine=tuple(float(value) for value in image.affine.ravel()),
            scanner=scrubber.scrub_text(image.scanner),
            field_strength=image.field_strength,
            label=pending.label,
            mask=scrubber.scrub_path(_relative_path(pending.mask, root)) if pending.mask else None,
            split=pending.split,
            quality=" ".join(image.quality) or None,
        )
        records.append(((path.split("/"), *_item_sort_key(image)), record))
    return tuple(record for _, record in sorted(records, key=itemgetter(0)))


def _assign_image_keys(pending_records: Sequence[PendingRecord], root: Path, scrubber: Scrubber) -> list[str]:
    """Assign a unique key to each image: its path without suffix, or the folder of a series; else the whole path."""

    def short_name(image: ImageInfo) -> PurePath:
        """Build the path without suffix, plus the item in a file of several; for a series, its folder."""
        path = image.files[0]
        if image.item:
            return _relative_path(path.with_name(file_stem(path.name)), root) / image.item
        if len(image.files) > 1:
            return _relative_path(path.parent, root) if path.parent != root else PurePath(root.name)
        return _relative_path(path.with_name(file_stem(path.name)), root)

    names = [short_name(pending.image) for pending in pending_records]
    counts = Counter(names)
    full_paths = [
        _relative_path(pending.image.files[0], root) / (pending.image.item or "") for pending in pending_records
    ]
    return [
        scrubber.scrub_path(name if counts[name] == 1 else path) for name, path in zip(names, full_paths, strict=True)
    ]
