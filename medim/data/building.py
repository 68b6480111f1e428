"""The work behind `build_index`: from files to records, with every identity left behind."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

import numpy as np

from medim.data.decathlon import stem
from medim.data.identity import Scrubber, pseudonym
from medim.data.layouts import Layout, folder_labels, lay_out
from medim.data.looks import Looks
from medim.data.readers import ReadError, gather, read_mask, reader_of
from medim.data.readers.base import Reader
from medim.data.readers.raster import NumpyReader, PictureReader
from medim.data.readers.sights import Found, Refused, Scanned, Sight
from medim.data.records import Record, Rejection
from medim.data.tables import Names, Table, check_participants, joined, read_table
from medim.data.walking import survey
from medim.types import Array, Modality, UserError

log = logging.getLogger(__name__)

_ON_GRID = 0.05  # of a voxel: how far a mask's corners may lie from its image's


Series = dict[tuple[Path, tuple[int, ...]], tuple[Path, ...]]  # every file of an image, by its first file and shape


@dataclass
class Draft:
    """An image on its way to a record; holds identities."""

    found: Found
    subject: str | None
    label: str | None = None
    mask: Path | None = None
    split: str | None = None


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
    """Find, join and scrub; see `medim.data.index.build_index`."""
    root = root_of(places)
    files, strays = survey(places)
    layout = lay_out(files, [path.resolve() for path in (labels, subjects) if path is not None])
    label_tables = _tables(layout, "labels", labels)
    _take_masks(layout, label_tables, root)
    layout.refused += strays
    if not layout.images and not layout.refused and not layout.spare:
        raise UserError(f"{', '.join(map(str, places))}: expected image files, found none. Choose another folder.")
    found, refused = _scan(layout.images, modality, looks)
    if several := sum("several-labels" in image.quality for image in found):
        log.warning("%d images carry several labels each that are no yes and no, so they are left out", several)
    found, wrong = _of_dimensions(found, modality)
    refused += wrong + layout.refused
    drafts = _drafts(found, layout, places)
    _check_participants(drafts, layout)
    _join_subjects(drafts, _tables(layout, "subjects", subjects), layout)
    _join_labels(drafts, label_tables, root)
    drafts, spoilt, highest = _check_masks(drafts, layout, looks)
    refused += spoilt
    everything: list[Found | Refused] = [*found, *refused]
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


def _tables(layout: Layout, kind: str, given: Path | None) -> list[tuple[Table, Path | None]]:
    """The tables of a kind with the folder they speak of: the one the user named, else those in the source."""
    if given is not None:
        table = read_table(given.resolve(), kind, given=True)
        return [(table, None)] if table else []
    tables = [
        (read_table(path, kind, given=False), path.parent) for path in layout.tables if path.name == f"{kind}.csv"
    ]
    return [(table, folder) for table, folder in tables if table]


def _take_masks(layout: Layout, tables: Sequence[tuple[Table, Path | None]], root: Path) -> None:
    """Files that a table names as masks are no images."""
    cells = ((table, line, cells["mask"]) for table, _ in tables for line, cells in table.rows if cells.get("mask"))
    masks: set[Path] = set()
    for table, line, cell in cells:
        path = table.mask(cell, root)
        if path is None:
            raise UserError(
                f"{table.path}, line {line}: expected the path of a mask, relative to this table or to the source."
            )
        masks.add(path)
        layout.spare.setdefault(
            path, Refused(path=path, reason="label-without-image", detail="a label without a readable image")
        )
    layout.take(masks)


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
    said = folder_labels(flat, places)
    drafts = []
    for image in sorted(found, key=_order):
        path = image.files[0]
        label, split = said.get(path, (None, None))
        folder = layout.folder(path)
        if folder:
            image = replace(image, sequence=image.sequence or folder.sequence(path, image.item))
            split = "test" if path in folder.tests else split
        drafts.append(
            Draft(
                found=image,
                subject=image.subject,
                label=image.label or label,
                mask=layout.masks.get(path),
                split=image.split or split,
            )
        )
    return drafts


def _order(found: Found) -> tuple[tuple[str, ...], int, int]:
    """By path; images of one archive by split and number."""
    split, _, place = (found.item or "").rpartition("/")
    return found.files[0].parts, ("train", "val", "test").index(split) if split else 0, int(place or 0)


def _check_participants(drafts: Sequence[Draft], layout: Layout) -> None:
    """Compare each BIDS tree with its `participants.tsv`."""
    for path in layout.participants:
        inside = [draft for draft in drafts if path.parent in draft.found.files[0].parents]
        check_participants(path, ((draft.subject, *draft.found.aliases) for draft in inside))


def _join_subjects(drafts: Sequence[Draft], tables: Sequence[tuple[Table, Path | None]], layout: Layout) -> None:
    """Give each draft its subject: a table's, else the file's own, else its stem."""
    said = joined(_with_names(tables, drafts), {}, ("subject", "split"))
    folders: dict[str, set[Path]] = defaultdict(set)
    for draft in drafts:
        folders[layout.case(draft.found.files[0])].add(draft.found.files[0].parent)
    for place, draft in enumerate(drafts):
        path = draft.found.files[0]
        name = layout.case(path)
        if len(folders[name]) > 1 and layout.folder(path) is None:
            name = str(path.parent)
        cells = said.get(place, {})
        draft.subject = pseudonym(cells["subject"][0]) if "subject" in cells else draft.subject or pseudonym(name)
        draft.split = cells["split"][0] if "split" in cells else draft.split


def _join_labels(drafts: Sequence[Draft], tables: Sequence[tuple[Table, Path | None]], root: Path) -> None:
    """Give drafts the label, mask and split that a table gives them, by image or by subject."""
    by_subject: dict[str, set[int]] = defaultdict(set)
    for place, draft in enumerate(drafts):
        for name in (draft.subject, *draft.found.aliases):
            by_subject[name or ""].add(place)
    for place, cells in joined(_with_names(tables, drafts), by_subject, ("label", "mask", "split")).items():
        draft = drafts[place]
        draft.label = cells["label"][0] if "label" in cells else draft.label
        draft.split = cells["split"][0] if "split" in cells else draft.split
        if "mask" in cells:
            cell, table = cells["mask"]
            draft.mask = table.mask(cell, root)


def _with_names(tables: Sequence[tuple[Table, Path | None]], drafts: Sequence[Draft]) -> list[tuple[Table, Names]]:
    """Tables with the images they speak of: all, or those under the folder they lie in."""
    return [
        (
            table,
            Names(
                (place, draft.found)
                for place, draft in enumerate(drafts)
                if folder is None or folder in draft.found.files[0].parents
            ),
        )
        for table, folder in tables
    ]


def look_at_mask(path: Path) -> Sight:
    """The grid of a mask, and its highest value."""
    mask = read_mask(path)
    return Sight(found=(Found(shape=mask.shape, affine=mask.affine, highest=int(mask.array.max())),))


def _check_masks(drafts: Sequence[Draft], layout: Layout, looks: Looks) -> tuple[list[Draft], list[Refused], int]:
    """Refuse image and mask where the mask cannot be read or lies on another grid.

    Returns:
        the drafts that stay, what is refused, and the highest value in a mask.
    """
    paths = list(dict.fromkeys(draft.mask for draft in drafts if draft.mask is not None))
    sights = dict(zip(paths, looks(look_at_mask, paths), strict=True))
    kept, refused, highest = [], [], 0
    for draft in drafts:
        image = draft.found
        try:
            value = _highest(sights[draft.mask], image, layout) if draft.mask is not None else 0
        except ReadError as error:
            reason = error.reason if error.reason in {"label-off-grid", "unknown-class"} else "label-unreadable"
            detail = f"its label: {error.detail}"
            refused.append(Refused(path=image.files[0], reason=reason, detail=detail, identities=image.identities))
            refused.append(Refused(path=draft.mask or Path(), reason=error.reason, detail=error.detail))
            continue
        kept.append(draft)
        highest = max(highest, value)
    spare = set(layout.spare) | set(layout.masks.values())
    for path in spare - set(paths):
        default = Refused(path=path, reason="label-without-image", detail="a label without a readable image")
        refused.append(layout.spare.get(path, default))
    return kept, refused, highest


def _highest(mask: Sight, image: Found, layout: Layout) -> int:
    """The highest value in an image's mask.

    Raises:
        ReadError: the mask cannot be read, lies on another grid, or holds a class without a name.
    """
    if mask.refused:
        raise ReadError(mask.refused[0].reason, mask.refused[0].detail)
    _check_grid(mask.found[0], image)
    highest = mask.found[0].highest
    if layout.classes and highest > len(layout.classes):
        raise ReadError(
            "unknown-class", f"the label holds the value {highest}, dataset.json names {len(layout.classes)}"
        )
    return highest


def _check_grid(mask: Found, image: Found) -> None:
    """Refuse a mask that is not on its image's grid.

    Raises:
        ReadError: in that case.
    """
    if mask.shape != image.shape:
        shapes = "x".join(map(str, mask.shape)), "x".join(map(str, image.shape))
        raise ReadError("label-off-grid", f"the label has {shapes[0]} voxels, the image {shapes[1]}")
    away = np.abs(_corners(mask.affine, mask.shape) - _corners(image.affine, image.shape)).max()
    if away > _ON_GRID * np.linalg.norm(mask.affine[:3, : len(mask.shape)], axis=0).min():
        raise ReadError("label-off-grid", f"the corners of label and image lie up to {away:.2f} mm apart")


def _corners(affine: Array, shape: Sequence[int]) -> Array:
    """(8, 3) places of a grid's corners in mm."""
    ends = np.array([*shape, *[1] * (3 - len(shape))]) - 1
    indices = np.array(np.meshgrid(*[(0, end) for end in ends], indexing="ij")).reshape(3, -1)
    return np.asarray((affine[:3, :3] @ indices + affine[:3, 3:]).T)


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
