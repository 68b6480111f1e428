"""Detect the layout of a source: images, their masks, and labels from folder names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medim.data.index.decathlon import DecathlonFolder, file_stem, read_decathlon_folder
from medim.data.index.tables import SPLIT_NAMES
from medim.data.mask_classes import MaskClasses
from medim.data.readers.inspection import RejectedFile
from medim.output_folder import REJECTIONS_FILE
from medim.privacy import format_path
from medim.types import Split, UserError

_DESCRIPTION_FILES = {"dataset.json", "dataset_description.json", "participants.tsv", "participants.json", "DICOMDIR"}
_DESCRIPTION_FILES |= {"fetched.json", "SHA256SUMS", "LICENSE"}  # added by `medim fetch`
_TABLE_FILES = {"labels.csv", "subjects.csv"}
_SIDECAR_SUFFIXES = {".json", ".bval", ".bvec", ".tsv", ".raw", ".zraw"}  # metadata or data of the image of that name
_DERIVATIVE_SUFFIXES = {"mask", "dseg", "seg", "probseg", "label"}  # BIDS suffixes of segmentations
_NON_STRUCTURAL_SUFFIXES = {  # BIDS suffixes of func, dwi, perf and fmap
    "bold", "cbv", "sbref", "dwi", "asl", "m0scan", "epi", "fieldmap",
    "magnitude", "magnitude1", "magnitude2", "phase", "phase1", "phase2", "phasediff",
}  # fmt: skip
_DUPLICATE_FOLDERS = {  # folders of a BIDS tree with other versions of its images
    "derivatives": ("derivative", "derived from the images of the BIDS tree; to use it, index that folder alone"),
    "sourcedata": ("source-data", "source of the images of the BIDS tree; to use it, index that folder alone"),
}
_MAX_CLASSES = 100
_MIN_CLASS_SIZE = 10  # pictures per class; folders of patients contain fewer


@dataclass(kw_only=True)
class Layout:
    """Files of a source, sorted by their role.

    Attributes:
        images: files to inspect for images, sorted.
        masks: mask by image.
        unmatched_masks: masks without an image, with the reason.
        decathlon_folders: folders in Medical Segmentation Decathlon layout.
        classes: names of the mask values.
        tables: `labels.csv` and `subjects.csv` files.
        participants: `participants.tsv` files.
        rejected: files that are not images.
    """

    images: list[Path] = field(default_factory=list)
    masks: dict[Path, Path] = field(default_factory=dict)
    unmatched_masks: dict[Path, RejectedFile] = field(default_factory=dict)
    decathlon_folders: list[DecathlonFolder] = field(default_factory=list)
    classes: MaskClasses = field(default_factory=MaskClasses)
    tables: list[Path] = field(default_factory=list)
    participants: list[Path] = field(default_factory=list)
    rejected: list[RejectedFile] = field(default_factory=list)

    def find_folder(self, path: Path) -> DecathlonFolder | None:
        """Find the Decathlon folder that contains a file."""
        return next((folder for folder in self.decathlon_folders if folder.path in path.parents), None)

    def case_name(self, path: Path) -> str:
        """Name of the case of a file: its name without suffix and without an nnU-Net channel number."""
        folder = self.find_folder(path)
        return folder.channels[path][0] if folder and path in folder.channels else file_stem(path.name)

    def drop_masks(self, masks: Iterable[Path]) -> None:
        """Remove masks from the images and from the rejected files."""
        mask_paths = set(masks)
        self.images = [path for path in self.images if path not in mask_paths]
        self.rejected = [rejected_file for rejected_file in self.rejected if rejected_file.path not in mask_paths]


def detect_layout(files: Sequence[Path], ignore: Iterable[Path] = ()) -> Layout:
    """Sort the files of a source by their role.

    Args:
        files: from `walk.list_files`.
        ignore: files that are not images, such as a table given on the command line.

    Raises:
        UserError: a `dataset.json` is damaged, or two list different classes.
    """
    layout = Layout()
    ignored_files = set(ignore)
    ignored_files |= _find_index_files(files)
    stems = {path.parent / file_stem(path.name) for path in files if path.suffix.lower() not in _SIDECAR_SUFFIXES}
    trees = [path.parent for path in files if path.name == "dataset_description.json"]
    duplicate_folders = {tree / name: rejection for tree in trees for name, rejection in _DUPLICATE_FOLDERS.items()}
    for path in files:
        if path.name in _TABLE_FILES and path not in ignored_files:
            layout.tables.append(path)
        elif path.name == "participants.tsv" and path not in ignored_files:
            layout.participants.append(path)
        elif path in ignored_files or path.name in _DESCRIPTION_FILES or _is_sidecar(path, stems):
            continue
        elif rejection := _explain_bids_rejection(path, duplicate_folders):
            layout.rejected.append(RejectedFile(path=path, reason=rejection[0], detail=rejection[1]))
        else:
            layout.images.append(path)
    folders = {path.parent for path in files if path.name == "dataset.json"}
    folders |= {path.parent.parent for path in files if path.parent.name == "imagesTr"}
    existing_files = set(files)
    for folder_path in sorted(folders):
        folder = read_decathlon_folder(folder_path, existing_files, layout.images)
        if folder is not None:
            _add_decathlon_folder(layout, folder)
    return layout


def _add_decathlon_folder(layout: Layout, folder: DecathlonFolder) -> None:
    """Add the content of a Decathlon folder to the layout.

    Raises:
        UserError: the folder has other classes than the folders before it.
    """
    if folder.classes and layout.classes and layout.classes != folder.classes:
        raise UserError(
            f"{format_path(folder.path)}: expected the classes {_list_names(layout.classes)} of the other folders, got "
            f"{_list_names(folder.classes)}. Index folders with different classes separately."
        )
    layout.decathlon_folders.append(folder)
    layout.classes = layout.classes or folder.classes
    layout.masks |= folder.masks
    layout.unmatched_masks |= folder.unmatched_masks
    layout.rejected += folder.rejected
    layout.drop_masks([*folder.masks.values(), *folder.unmatched_masks])


def _list_names(classes: MaskClasses) -> str:
    """List the names of mask values with the values, for a message."""
    return ", ".join(f"{name} ({value})" for name, value in zip(classes.names, classes.values, strict=True))


def _explain_bids_rejection(path: Path, duplicate_folders: dict[Path, tuple[str, str]]) -> tuple[str, str] | None:
    """Explain why a file of a BIDS tree is not a structural image; None if it may be one."""
    suffix = file_stem(path.name).rpartition("_")[2] if path.name.startswith(("sub-", "tpl-", "atlas-")) else ""
    if suffix in _DERIVATIVE_SUFFIXES:
        detail = "a segmentation of the BIDS tree, not an image; join it with --labels (columns image, mask)"
        return "derived-label", detail
    if suffix in _NON_STRUCTURAL_SUFFIXES:
        return "not-structural", f"a functional, diffusion or field-map run of the BIDS tree ({suffix})"
    return (
        next((duplicate_folders[folder] for folder in path.parents if folder in duplicate_folders), None)
        if duplicate_folders
        else None
    )


def _find_index_files(files: Sequence[Path]) -> set[Path]:
    """Find the files of an index that was written into the source."""
    names = ("summary.json", "index.parquet", "index.csv", REJECTIONS_FILE)
    folders = {path.parent for path in files if path.name in names[1:3]} & {
        path.parent for path in files if path.name == names[0]
    }
    return {folder / name for folder in folders for name in names}


def _is_sidecar(path: Path, stems: set[Path]) -> bool:
    """Whether a file contains only metadata or data of the image of the same name."""
    return path.suffix.lower() in _SIDECAR_SUFFIXES and path.parent / file_stem(path.name) in stems


class FolderLabels(NamedTuple):
    """Information from the folders of a picture: class or subject, and split."""

    label: str | None = None
    split: Split | None = None
    subject: str | None = None


def labels_from_folders(paths: Iterable[Path], sources: Sequence[Path]) -> dict[Path, FolderLabels]:
    """Infer labels from folders: `CLASS/x.png`, `train/CLASS/x.png`, `train/x.png` or `SUBJECT/x.png`.

    Folders count as classes if every picture of a source is in a folder, there are 2 to 100 folders, and each contains
    at least ten pictures. Otherwise, if there are several, each folder counts as one subject.
    """
    result: dict[Path, FolderLabels] = {}
    paths_by_source: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        source = next((source for source in sources if source in path.parents), None)
        if source is not None:
            paths_by_source[source].append(path)
    for source, source_paths in paths_by_source.items():
        folders = {path: list(path.relative_to(source).parts[:-1]) for path in source_paths}
        splits: dict[Path, Split] = {}
        if all(parts and parts[0].lower() in SPLIT_NAMES for parts in folders.values()):
            splits = {path: SPLIT_NAMES[parts.pop(0).lower()] for path, parts in folders.items()}
        sizes = Counter(parts[0] for parts in folders.values() if parts)
        has_subfolders = all(folders.values()) and len(sizes) >= 2
        are_classes = has_subfolders and len(sizes) <= _MAX_CLASSES and min(sizes.values()) >= _MIN_CLASS_SIZE
        for path, parts in folders.items():
            name = parts[0] if has_subfolders else None
            result[path] = (
                FolderLabels(name, splits.get(path)) if are_classes else FolderLabels(None, splits.get(path), name)
            )
    return result
