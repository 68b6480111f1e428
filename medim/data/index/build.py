"""The work behind `build_index`: from files to records, with every identity left behind."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

import numpy as np

from medim.data.index.decathlon import stem
from medim.data.index.join import Draft, check_listed, join_labels, join_subjects, tables_of, take_masks
from medim.data.index.layouts import Layout, Said, lay_out, said_by_folders
from medim.data.index.masks import check_masks
from medim.data.index.records import Record, Rejection
from medim.data.index.scan_cache import Looks
from medim.data.index.walk import survey
from medim.data.readers import gather, reader_of
from medim.data.readers.base import Reader
from medim.data.readers.dicom.reader import DicomReader
from medim.data.readers.inspection import Found, Refused, Scanned
from medim.data.readers.raster import NumpyReader, PictureReader
from medim.privacy import Scrubber, pseudonym
from medim.types import Modality, UserError

log = logging.getLogger(__name__)

Series = dict[tuple[Path, tuple[int, ...]], tuple[Path, ...]]  # every file of an image, by its first file and shape


@dataclass(frozen=True)
class Built:
    """What an `Index` is made of."""

    root: Path
    records: tuple[Record, ...]
    rejected: tuple[Rejection, ...]
    classes: tuple[str, ...]
    hidden: frozenset[str]
    series: Series = field(repr=False)


def build(
    places: Sequence[Path],
    modality: Modality,
    looks: Looks,
    *,
    labels: Path | None = None,
    subjects: Path | None = None,
) -> Built:
    """Find, join and scrub; see `medim.data.index.index.build_index`."""
    root = root_of(places)
    files, strays = survey(places)
    layout = lay_out(files, [path.resolve() for path in (labels, subjects) if path is not None])
    label_tables = tables_of(layout, "labels", labels)
    take_masks(layout, label_tables, root)
    layout.refused += strays
    if not layout.images and not layout.refused and not layout.spare:
        raise UserError(f"{', '.join(map(str, places))}: expected image files, found none. Choose another folder.")
    found, refused = _scan(layout.images, modality, looks)
    if several := sum("several-labels" in image.quality for image in found):
        log.warning("%d images carry several labels each that are no yes and no, so they are left out", several)
    found, wrong = _of_dimensions(found, modality)
    refused += wrong + layout.refused
    drafts = _drafts(found, layout, places)
    check_listed(drafts, layout)
    join_subjects(drafts, tables_of(layout, "subjects", subjects), layout, root)
    join_labels(drafts, label_tables, root)
    drafts, spoilt, highest = check_masks(drafts, layout, looks)
    refused += spoilt
    everything: list[Found | Refused] = [*found, *refused, *_unopened(layout, modality, looks)]
    scrub = Scrubber(identity for image in everything for identity in image.identities)
    names = tuple(
        layout.classes[value] if value < len(layout.classes) else f"label-{value + 1}" for value in range(highest)
    )
    return Built(
        root=root,
        records=_records(drafts, root, scrub, modality),
        rejected=tuple(
            Rejection(scrub.path(_relative(r.path, root)), r.reason, r.detail)
            for r in sorted(dict.fromkeys(refused), key=lambda r: r.path)
        ),
        classes=layout.classes or names,
        hidden=frozenset(part for part in root.parts if scrub.hides(part)),
        series={(d.found.files[0], d.found.shape): d.found.files for d in drafts if d.found.series},
    )


def sorted_labels(labels: Iterable[str | None]) -> tuple[str, ...]:
    """The different labels, sorted: numbers by value, else by name."""
    names = {label for label in labels if label is not None}
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def existing(places: Sequence[Path]) -> list[Path]:
    """The sources, resolved.

    Raises:
        UserError: none is given, or one is not there.
    """
    if not places:
        raise UserError("expected a file or folder to index, got none.")
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: expected a file or folder here, found none. Check the path.")
    return [place.resolve() for place in places]


def root_of(places: Sequence[Path]) -> Path:
    """The folder that holds all sources."""
    return Path(os.path.commonpath([place if place.is_dir() else place.parent for place in places]))


def _relative(path: Path, root: Path) -> PurePath:
    return PurePath(os.path.relpath(path, root))


def _scan(images: Sequence[Path], modality: Modality, looks: Looks) -> Scanned:
    """Let each file's reader look for images."""
    by_reader: dict[Reader, list[Path]] = defaultdict(list)
    found: list[Found] = []
    refused: list[Refused] = []
    for path in images:
        reader = reader_of(path)
        if reader is None:
            refused.append(_unread(path))
        else:
            by_reader[reader].append(path)
    for reader, paths in by_reader.items():
        images_of, others = gather(reader, looks(reader.look, paths), modality)
        found += images_of
        refused += others
    return found, refused


def _unopened(layout: Layout, modality: Modality, looks: Looks) -> list[Found | Refused]:
    """What DICOM files hold that the layout refused: their paths are written, and may hold whom they are of."""
    files = [refused.path for refused in layout.refused if isinstance(reader_of(refused.path), DicomReader)]
    found, refused = _scan(files, modality, looks)
    return [*found, *refused]


def _unread(path: Path) -> Refused:
    """Why a file has no reader."""
    try:
        empty = path.stat().st_size == 0
    except OSError:
        return Refused(path=path, reason="missing", detail="the file was here and is gone")
    reason = "empty-file" if empty else "not-an-image"
    return Refused(path=path, reason=reason, detail="a file of no format that medim reads")


def _of_dimensions(found: Sequence[Found], modality: Modality) -> tuple[list[Found], list[Refused]]:
    """MRI is 3D, X-rays are 2D."""
    dims = 3 if modality == "mri" else 2
    wrong: dict[Path, Refused] = {}
    for image in found:
        if len(image.shape) != dims:
            detail = f"an image of {len(image.shape)} dimensions; {modality} has {dims}"
            wrong[image.files[0]] = Refused(
                path=image.files[0], reason="wrong-dimensions", detail=detail, identities=image.identities
            )
    return [image for image in found if len(image.shape) == dims], list(wrong.values())


def _drafts(found: Sequence[Found], layout: Layout, places: Sequence[Path]) -> list[Draft]:
    """One draft an image, sorted by path, with what folders say of it."""
    pictures = (PictureReader(), NumpyReader())
    flat = [image.files[0] for image in found if not image.item and any(r.accepts(image.files[0]) for r in pictures)]
    told = said_by_folders(flat, places)
    drafts = []
    for image in sorted(found, key=_order):
        path = image.files[0]
        said = told.get(path, Said())
        split = said.split
        folder = layout.folder(path)
        if folder:
            image = replace(image, sequence=image.sequence or folder.sequence(path, image.item))
            split = "test" if path in folder.tests else split
        drafts.append(
            Draft(
                found=image,
                subject=image.subject or (pseudonym(said.subject) if said.subject else None),
                label=image.label or said.label,
                mask=layout.masks.get(path),
                split=image.split or split,
            )
        )
    return drafts


def _order(found: Found) -> tuple[tuple[str, ...], int, int]:
    """By path; images of one archive by split and number."""
    split, _, place = (found.item or "").rpartition("/")
    return found.files[0].parts, ("train", "val", "test").index(split) if split else 0, int(place or 0)


def _records(drafts: Sequence[Draft], root: Path, scrub: Scrubber, modality: Modality) -> tuple[Record, ...]:
    """Drafts without identities."""
    keys = _keys(drafts, root, scrub)
    records = []
    for draft, key in zip(drafts, keys, strict=True):
        image = draft.found
        path = scrub.path(_relative(image.files[0], root))
        dims = len(image.shape)
        records.append(
            Record(
                image=key,
                path=f"{path}#{image.item}" if image.item else path,
                subject=draft.subject or "",
                session=image.session,
                series=image.series,
                modality=modality,
                sequence=scrub.text(image.sequence),
                shape=tuple(int(length) for length in image.shape),
                spacing=tuple(float(length) for length in np.linalg.norm(image.affine[:3, :dims], axis=0)),
                affine=tuple(float(value) for value in image.affine.ravel()),
                scanner=scrub.text(image.scanner),
                field_strength=image.field_strength,
                label=draft.label,
                mask=scrub.path(_relative(draft.mask, root)) if draft.mask else None,
                split=draft.split,
                quality=" ".join(image.quality) or None,
            )
        )
    return tuple(records)


def _keys(drafts: Sequence[Draft], root: Path, scrub: Scrubber) -> list[str]:
    """A key an image: its path without suffix, the folder of a series; the whole path where that names two."""

    def short(found: Found) -> PurePath:
        """The path without suffix, and the item inside a file of several; of a series its folder."""
        path = found.files[0]
        if found.item:
            return _relative(path.with_name(stem(path.name)), root) / found.item
        if len(found.files) > 1:
            return _relative(path.parent, root) if path.parent != root else PurePath(root.name)
        return _relative(path.with_name(stem(path.name)), root)

    names = [short(draft.found) for draft in drafts]
    counts = Counter(names)
    whole = [_relative(draft.found.files[0], root) / (draft.found.item or "") for draft in drafts]
    return [scrub.path(name if counts[name] == 1 else path) for name, path in zip(names, whole, strict=True)]
