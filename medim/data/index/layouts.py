"""How a source lies on the disk: which files are images, which are their masks, and what folders say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medim.data.index.decathlon import Folder, decathlon, stem
from medim.data.readers.inspection import Refused
from medim.types import Split, UserError

_DESCRIPTIONS = {"dataset.json", "dataset_description.json", "participants.tsv", "participants.json", "DICOMDIR"}
_DESCRIPTIONS |= {"fetched.json", "SHA256SUMS", "LICENSE"}  # beside what `medim fetch` brought
_TABLES = {"labels.csv", "subjects.csv"}
_SIDECARS = {".json", ".bval", ".bvec", ".tsv", ".raw", ".zraw"}  # describe or feed the image of the same name
_DERIVED = {"mask", "dseg", "seg", "probseg", "label"}  # BIDS suffixes of what is no image
_UNSTRUCTURED = {  # BIDS suffixes of func, dwi, perf and fmap
    "bold", "cbv", "sbref", "dwi", "asl", "m0scan", "epi", "fieldmap",
    "magnitude", "magnitude1", "magnitude2", "phase", "phase1", "phase2", "phasediff",
}  # fmt: skip
_BESIDE = {  # folders of a BIDS tree that hold its images a second time
    "derivatives": ("derivative", "made from the BIDS tree's images; to use it, index that folder alone"),
    "sourcedata": ("source-data", "what the BIDS tree's images were made from; to use it, index that folder alone"),
}
_SPLITS: dict[str, Split] = {"train": "train", "training": "train", "val": "val", "valid": "val"}
_SPLITS |= {"validation": "val", "test": "test", "testing": "test"}
_MAX_CLASSES = 100
_CLASS_SIZE = 10  # pictures of each; a patient's folder holds fewer


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
        participants: `participants.tsv` files.
        refused: files that are no images.
    """

    images: list[Path] = field(default_factory=list)
    masks: dict[Path, Path] = field(default_factory=dict)
    spare: dict[Path, Refused] = field(default_factory=dict)
    decathlon: list[Folder] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    tables: list[Path] = field(default_factory=list)
    participants: list[Path] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def folder(self, path: Path) -> Folder | None:
        """The Decathlon folder that a file lies in."""
        return next((folder for folder in self.decathlon if folder.path in path.parents), None)

    def case(self, path: Path) -> str:
        """Whose image a file is, by its name: without suffix, and without the number of nnU-Net's channel."""
        folder = self.folder(path)
        return folder.channels[path][0] if folder and path in folder.channels else stem(path.name)

    def take(self, masks: Iterable[Path]) -> None:
        """Files that turn out to be masks are no images, nor refused."""
        taken = set(masks)
        self.images = [path for path in self.images if path not in taken]
        self.refused = [file for file in self.refused if file.path not in taken]


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
    stems = {path.parent / stem(path.name) for path in files if path.suffix.lower() not in _SIDECARS}
    trees = [path.parent for path in files if path.name == "dataset_description.json"]
    beside = {tree / name: why for tree in trees for name, why in _BESIDE.items()}
    for path in files:
        if path.name in _TABLES and path not in ignored:
            layout.tables.append(path)
        elif path.name == "participants.tsv" and path not in ignored:
            layout.participants.append(path)
        elif path in ignored or path.name in _DESCRIPTIONS or _is_sidecar(path, stems):
            continue
        elif why := _no_image_of_bids(path, beside):
            layout.refused.append(Refused(path=path, reason=why[0], detail=why[1]))
        else:
            layout.images.append(path)
    folders = {path.parent for path in files if path.name == "dataset.json"}
    folders |= {path.parent.parent for path in files if path.parent.name == "imagesTr"}
    there = set(files)
    for place in sorted(folders):
        folder = decathlon(place, there, layout.images)
        if folder is not None:
            _add(layout, folder)
    return layout


def _add(layout: Layout, folder: Folder) -> None:
    """Take over what a Decathlon folder says.

    Raises:
        UserError: it names other classes than the folders before it.
    """
    if folder.classes and layout.classes not in ((), folder.classes):
        raise UserError(
            f"{folder.path}: expected the classes {layout.classes} of the other folders, got {folder.classes}."
        )
    layout.decathlon.append(folder)
    layout.classes = layout.classes or folder.classes
    layout.masks |= folder.masks
    layout.spare |= folder.spare
    layout.refused += folder.refused
    layout.take([*folder.masks.values(), *folder.spare])


def _no_image_of_bids(path: Path, beside: dict[Path, tuple[str, str]]) -> tuple[str, str] | None:
    """Why a file of a BIDS tree is no structural image; None where it may be one."""
    suffix = stem(path.name).rpartition("_")[2] if path.name.startswith("sub-") else ""
    if suffix in _DERIVED:
        detail = "a segmentation of the BIDS tree, not an image; join it with --labels (columns image, mask)"
        return "derived-label", detail
    if suffix in _UNSTRUCTURED:
        return "not-structural", f"a functional, diffusion or field-map run of the BIDS tree ({suffix})"
    return next((beside[folder] for folder in path.parents if folder in beside), None) if beside else None


def _written(files: Sequence[Path]) -> set[Path]:
    """The files of an index that was written into the source."""
    names = ("summary.json", "index.parquet", "index.csv", "rejected.csv")
    folders = {path.parent for path in files if path.name in names[1:3]} & {
        path.parent for path in files if path.name == names[0]
    }
    return {folder / name for folder in folders for name in names}


def _is_sidecar(path: Path, stems: set[Path]) -> bool:
    """Whether a file only describes or feeds the image of the same name."""
    return path.suffix.lower() in _SIDECARS and path.parent / stem(path.name) in stems


class Said(NamedTuple):
    """What the folder of a picture says of it: its class or its subject, and its split."""

    label: str | None = None
    split: Split | None = None
    subject: str | None = None


def said_by_folders(paths: Iterable[Path], places: Sequence[Path]) -> dict[Path, Said]:
    """Of pictures, from the folders they lie in: `CLASS/x.png`, `train/CLASS/x.png`, `train/x.png` or `SUBJECT/x.png`.

    Folders are classes where every picture of a source lies in one, there are 2 to 100 of them, and each holds ten
    pictures or more. Else, where they hold several, a folder is a patient's: its name is nobody's class.
    """
    result: dict[Path, Said] = {}
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
        sizes = Counter(parts[0] for parts in folders.values() if parts)
        sorted_in = all(folders.values()) and len(sizes) >= 2
        classes = sorted_in and len(sizes) <= _MAX_CLASSES and min(sizes.values()) >= _CLASS_SIZE
        for path, parts in folders.items():
            name = parts[0] if sorted_in else None
            result[path] = Said(name, splits.get(path)) if classes else Said(None, splits.get(path), name)
    return result
