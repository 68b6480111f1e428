"""How a source lies on the disk: which files are images, which are their masks, and what folders say."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medim.data.readers.sights import Refused
from medim.files import read_json
from medim.types import Split, UserError

_DESCRIPTIONS = {"dataset.json", "dataset_description.json", "participants.tsv", "participants.json", "DICOMDIR"}
_DESCRIPTIONS |= {"fetched.json", "SHA256SUMS", "LICENSE"}  # beside what `medim fetch` brought
_TABLES = {"labels.csv", "subjects.csv"}
_SIDECARS = {".json", ".bval", ".bvec", ".tsv", ".raw", ".zraw"}  # describe or feed the image of the same name
_DERIVED = {"mask", "dseg", "seg", "probseg", "label"}  # BIDS suffixes of what is no image
_SPLITS: dict[str, Split] = {"train": "train", "training": "train", "val": "val", "valid": "val"}
_SPLITS |= {"validation": "val", "test": "test", "testing": "test"}
_MAX_CLASSES = 100


@dataclass
class Layout:
    """What the folders of a source say.

    Attributes:
        images: files to look for images in, sorted.
        masks: mask by image.
        spare: masks that belong to no image, with what is wrong.
        decathlon: folders in Medical Segmentation Decathlon layout.
        classes: names of the mask values 1..K.
        tables: `labels.csv` and `subjects.csv` files.
        refused: files that are no images.
    """

    images: list[Path] = field(default_factory=list)
    masks: dict[Path, Path] = field(default_factory=dict)
    spare: dict[Path, Refused] = field(default_factory=dict)
    decathlon: list[Path] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    tables: list[Path] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


def walk(places: Iterable[Path]) -> list[Path]:
    """Every file of the sources, once and sorted; links are followed, names that start with a dot are left out."""

    def files(place: Path) -> Iterator[Path]:
        if place.is_file():
            yield place
            return
        seen: set[Path] = set()
        for folder, folders, names in os.walk(place, followlinks=True):
            real = Path(folder).resolve()
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from (Path(folder) / name for name in names if not name.startswith("."))

    return sorted({file for place in places for file in files(place)})


def lay_out(files: Sequence[Path], ignore: Iterable[Path] = ()) -> Layout:
    """Sort the files of a source by their part in it.

    Args:
        files: from `walk`.
        ignore: files that describe others, such as a table given on the command line.

    Raises:
        UserError: a `dataset.json` is damaged, or two name different classes.
    """
    layout = Layout()
    ignored = set(ignore)
    ignored |= _written(files)
    stems = {path.parent / stem(path.name) for path in files if path.suffix not in _SIDECARS}
    for path in files:
        if path.name in _TABLES and path not in ignored:
            layout.tables.append(path)
        elif path in ignored or path.name in _DESCRIPTIONS or _is_sidecar(path, stems):
            continue
        elif path.name.startswith("sub-") and stem(path.name).rpartition("_")[2] in _DERIVED:
            detail = "a segmentation of the BIDS tree, not an image; join it with --labels (columns image, mask)"
            layout.refused.append(Refused(path=path, reason="derived-label", detail=detail))
        else:
            layout.images.append(path)
    folders = {path.parent for path in files if path.name == "dataset.json"}
    folders |= {path.parent.parent for path in files if path.parent.name == "imagesTr"}
    for folder in sorted(folders):
        _decathlon(layout, folder, set(files))
    return layout


def _written(files: Sequence[Path]) -> set[Path]:
    """The files of an index that was written into the source."""
    names = ("summary.json", "index.parquet", "index.csv", "rejected.csv")
    folders = {path.parent for path in files if path.name in names[1:3]} & {
        path.parent for path in files if path.name == names[0]
    }
    return {folder / name for folder in folders for name in names}


def _is_sidecar(path: Path, stems: set[Path]) -> bool:
    """Whether a file only describes or feeds the image of the same name."""
    return path.suffix in _SIDECARS and path.parent / stem(path.name) in stems


def _decathlon(layout: Layout, folder: Path, files: set[Path]) -> None:
    """Pair images and masks of a Decathlon folder: as its `dataset.json` lists them, else by name."""
    description = read_json(folder / "dataset.json") if folder / "dataset.json" in files else {}
    listed = description.get("training")
    if description and not isinstance(listed, list) and not (folder / "imagesTr").is_dir():
        return  # another tool's dataset.json
    layout.decathlon.append(folder)
    classes = _classes(description.get("labels"), folder / "dataset.json")
    if classes and layout.classes not in ((), classes):
        raise UserError(f"{folder}: expected the classes {layout.classes} of the other folders, got {classes}.")
    layout.classes = layout.classes or classes
    masks = {path for path in layout.images if folder / "labelsTr" in path.parents}
    pairs = _listed(folder, listed) if isinstance(listed, list) else _by_name(folder, layout.images, masks)
    masks |= {mask for mask in pairs.values() if mask in files}
    layout.images = [path for path in layout.images if path not in masks]
    for image, mask in pairs.items():
        for path in (image, mask):
            if path is not None and path not in files:
                layout.refused.append(
                    Refused(path=path, reason="missing", detail="listed in dataset.json, not on the disk")
                )
        if mask is not None and mask in files:
            layout.masks[image] = mask
    for mask in masks - set(layout.masks.values()):
        known = isinstance(listed, list) and folder / "imagesTr" / mask.name in files
        reason, detail = "label-without-image", "a label without a readable image"
        if known:
            reason, detail = (
                "label-not-listed",
                "dataset.json does not list this label; its image is kept as unlabelled",
            )
        layout.spare[mask] = Refused(path=mask, reason=reason, detail=detail)


def _listed(folder: Path, items: Sequence[Any]) -> dict[Path, Path | None]:
    """Images and masks as `training` of a `dataset.json` lists them."""

    def place(name: object) -> Path:
        return folder / PurePosixPath(str(name))

    pairs: dict[Path, Path | None] = {}
    for item in items:
        if isinstance(item, dict) and "image" in item:
            pairs[place(item["image"])] = place(item["label"]) if item.get("label") else None
        elif isinstance(item, str):
            pairs[place(item)] = None
        else:
            raise UserError(
                f'{folder / "dataset.json"}: expected {{"image": path, "label": path}} under "training", got {item!r}.'
            )
    return pairs


def _by_name(folder: Path, images: Iterable[Path], masks: set[Path]) -> dict[Path, Path | None]:
    """Images of `imagesTr` with the mask of the same name; nnU-Net's first channel `_0000` counts as the image."""
    by_stem = {stem(mask.name): mask for mask in masks}
    inside = [path for path in images if folder / "imagesTr" in path.parents]
    return {path: by_stem.get(stem(path.name).removesuffix("_0000")) for path in inside}


def _classes(labels: object, where: Path) -> tuple[str, ...]:
    """Names of the mask values 1..K, from {"0": "background", "1": name} or {name: 1}."""
    if not isinstance(labels, dict):
        return ()
    try:
        names = {int(key): str(value) for key, value in labels.items()}
    except ValueError:
        try:
            names = {int(value): str(key) for key, value in labels.items()}
        except (TypeError, ValueError) as error:
            raise UserError(f'{where}: expected "labels" as {{"0": "background", "1": name}}, got {labels}.') from error
    return tuple(names.get(value, f"label-{value}") for value in range(1, max(names, default=0) + 1))


def folder_labels(paths: Iterable[Path], places: Sequence[Path]) -> dict[Path, tuple[str | None, Split | None]]:
    """Class and split of pictures, from the folders they lie in: `CLASS/x.png`, `train/CLASS/x.png` or `train/x.png`.

    Folders are classes where every picture of a source lies in one, there are 2 to 100 of them, and they hold two
    pictures or more on average: a folder a patient is no class.
    """
    result: dict[Path, tuple[str | None, Split | None]] = {}
    by_place: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        place = next((place for place in places if place in path.parents), None)
        if place is not None:
            by_place[place].append(path)
    for place, inside in by_place.items():
        folders = {path: list(path.relative_to(place).parts[:-1]) for path in inside}
        splits: dict[Path, Split] = {}
        if all(parts and parts[0].lower() in _SPLITS for parts in folders.values()):
            splits = {path: _SPLITS[parts.pop(0).lower()] for path, parts in folders.items()}
        classes = {parts[0] for parts in folders.values() if parts}
        named = all(folders.values()) and 2 <= len(classes) <= min(_MAX_CLASSES, len(inside) // 2)
        for path, parts in folders.items():
            result[path] = (parts[0] if named else None, splits.get(path))
    return result


def stem(name: str) -> str:
    """A file's name without its suffix; `.nii.gz` is one suffix."""
    return name[:-7] if name.lower().endswith(".nii.gz") else Path(name).stem
