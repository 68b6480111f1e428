"""Medical Segmentation Decathlon folders, and nnU-Net's, which give each channel of a case a file of its own.

`imagesTr` and `labelsTr` are paired as `dataset.json` lists them, else by name; `imagesTs` and `labelsTs`, where there
are labels of test images, by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medim.data.readers.inspection import RejectedFile
from medim.files import read_json
from medim.types import UserError

_CHANNEL_PATTERN = re.compile(r"(.+)_(\d{4})")
_NON_SEQUENCE_NAMES = {"mri", "mr", "ct"}  # dataset.json of a task with one channel often names the modality alone


@dataclass(frozen=True)
class DecathlonFolder:
    """One folder in this layout.

    Attributes:
        path: of the folder.
        classes: names of the mask values 1..K.
        channel_names: of the channels, or of the volumes in a file.
        channels: case and number of each file that holds one channel.
        masks: mask by image.
        test_images: images whose mask stands in `labelsTs`.
        unmatched_masks: masks that belong to no image, with what is wrong.
        rejected: files that are listed and not there.
    """

    path: Path
    classes: tuple[str, ...]
    channel_names: tuple[str, ...]
    channels: dict[Path, tuple[str, int]] = field(default_factory=dict)
    masks: dict[Path, Path] = field(default_factory=dict)
    test_images: frozenset[Path] = frozenset()
    unmatched_masks: dict[Path, RejectedFile] = field(default_factory=dict)
    rejected: tuple[RejectedFile, ...] = ()

    def sequence(self, path: Path, item: str | None) -> str | None:
        """What `dataset.json` calls the channel of a file, or the volume in it."""
        if item is None and path not in self.channels and len(self.channel_names) != 1:
            return None
        number = self.channels[path][1] if path in self.channels else int(item or 0)
        name = self.channel_names[number] if number < len(self.channel_names) else ""
        return name if name and name.lower() not in _NON_SEQUENCE_NAMES else None


def read_decathlon_folder(path: Path, files: Collection[Path], images: Iterable[Path]) -> DecathlonFolder | None:
    """Read a folder in this layout.

    Args:
        path: it holds a `dataset.json`, an `imagesTr`, or both.
        files: every file of the source.
        images: those that may be images or masks.

    Returns:
        what it says, or None where the `dataset.json` is another tool's.

    Raises:
        UserError: the `dataset.json` is damaged.
    """
    description_path = path / "dataset.json"
    description = read_json(description_path) if description_path in files else {}
    training_items = description.get("training")
    if description and not isinstance(training_items, list) and not (path / "imagesTr").is_dir():
        return None
    folder_images = [image for image in images if path in image.parents]
    masks = {image for image in folder_images if {path / "labelsTr", path / "labelsTs"} & set(image.parents)}
    channels = _find_channels(
        path, folder_images, masks, nnunet=bool({"channel_names", "file_ending"} & set(description))
    )
    training_images = [image for image in folder_images if path / "imagesTr" in image.parents]
    pairs = _pair_by_name(training_images, [mask for mask in masks if path / "labelsTr" in mask.parents], channels)
    if isinstance(training_items, list):
        pairs = _expand_channels(_parse_training_pairs(path, training_items), files, channels)
    test_pairs = _pair_by_name(
        [image for image in folder_images if path / "imagesTs" in image.parents],
        [mask for mask in masks if path / "labelsTs" in mask.parents],
        channels,
    )
    training_names = {image.name for image in training_images} if isinstance(training_items, list) else set()
    pairs |= {image: mask for image, mask in test_pairs.items() if mask is not None}
    mask_by_image = {image: mask for image, mask in pairs.items() if mask is not None and mask in files}
    masks |= set(mask_by_image.values())
    missing_files = dict.fromkeys(
        file for pair in pairs.items() for file in pair if file is not None and file not in files
    )
    return DecathlonFolder(
        path=path,
        classes=_parse_class_names(description.get("labels"), description_path),
        channel_names=_parse_channel_names(description.get("channel_names") or description.get("modality")),
        channels=channels,
        masks=mask_by_image,
        test_images=frozenset(image for image, mask in test_pairs.items() if mask is not None),
        unmatched_masks={
            mask: _reject_unmatched_mask(mask, training_names) for mask in masks - set(mask_by_image.values())
        },
        rejected=tuple(
            RejectedFile(path=file, reason="missing", detail="listed in dataset.json, not on the disk")
            for file in missing_files
        ),
    )


def file_stem(name: str) -> str:
    """A file's name without its suffix; `.nii.gz` is one suffix."""
    return name[:-7] if name.lower().endswith(".nii.gz") else Path(name).stem


def _reject_unmatched_mask(mask: Path, training_names: set[str]) -> RejectedFile:
    """Why a mask has no image."""
    if mask.name in training_names:
        detail = "dataset.json does not list this label; its image is kept as unlabelled"
        return RejectedFile(path=mask, reason="label-not-listed", detail=detail)
    return RejectedFile(path=mask, reason="label-without-image", detail="a label without a readable image")


def _find_channels(
    folder: Path, images: Iterable[Path], masks: Iterable[Path], *, nnunet: bool
) -> dict[Path, tuple[str, int]]:
    """Case and number of files named `case_0000`: all in a folder of nnU-Net's, which one file may show.

    It shows it where a mask has the case's name and none has the file's own: a number may also be a patient's.
    """
    mask_stems = {file_stem(mask.name) for mask in masks}
    channel_files: dict[Path, tuple[str, int]] = {}
    for image in images:
        match = _CHANNEL_PATTERN.fullmatch(file_stem(image.name))
        if match and image.parent.parent == folder and image.parent.name.startswith("images"):
            channel_files[image] = (match[1], int(match[2]))
    is_nnunet_folder = any(
        case in mask_stems and file_stem(image.name) not in mask_stems for image, (case, _) in channel_files.items()
    )
    return channel_files if nnunet or is_nnunet_folder else {}


def _pair_by_name(
    images: Iterable[Path], masks: Iterable[Path], channels: dict[Path, tuple[str, int]]
) -> dict[Path, Path | None]:
    """Images with the mask of the same name."""
    by_stem = {file_stem(mask.name): mask for mask in masks}
    return {path: by_stem.get(channels.get(path, (file_stem(path.name), 0))[0]) for path in images}


def _expand_channels(
    pairs: dict[Path, Path | None], files: Collection[Path], channels: dict[Path, tuple[str, int]]
) -> dict[Path, Path | None]:
    """The first nnU-Net lists `case.nii.gz` and has `case_0000.nii.gz`: each channel takes the case's mask."""
    cases: dict[tuple[Path, str], list[Path]] = {}
    for path, (case, _) in channels.items():
        cases.setdefault((path.parent, case), []).append(path)
    return {
        path: mask
        for image, mask in pairs.items()
        for path in ([image] if image in files else cases.get((image.parent, file_stem(image.name)), [image]))
    }


def _parse_training_pairs(folder: Path, items: Sequence[Any]) -> dict[Path, Path | None]:
    """Images and masks as `training` of a `dataset.json` lists them."""

    def resolve_path(name: object) -> Path:
        return folder / PurePosixPath(str(name))

    pairs: dict[Path, Path | None] = {}
    for item in items:
        if isinstance(item, dict) and "image" in item:
            pairs[resolve_path(item["image"])] = resolve_path(item["label"]) if item.get("label") else None
        elif isinstance(item, str):
            pairs[resolve_path(item)] = None
        else:
            raise UserError(
                f'{folder / "dataset.json"}: expected {{"image": path, "label": path}} under "training", got {item!r}.'
            )
    return pairs


def _parse_channel_names(channels: object) -> tuple[str, ...]:
    """Names of the channels 0..n-1, from {"0": name}; none where they are not numbered so."""
    if not isinstance(channels, dict) or set(channels) != {str(k) for k in range(len(channels))}:
        return ()
    return tuple(str(channels[str(k)]) for k in range(len(channels)))


def _parse_class_names(labels: object, description_path: Path) -> tuple[str, ...]:
    """Names of the mask values 1..K, from {"0": "background", "1": name} or {name: 1}; regions have no value."""
    if not isinstance(labels, dict):
        return ()
    try:
        names = {int(key): str(value) for key, value in labels.items()}
    except ValueError:
        try:
            names = {int(value): str(key) for key, value in labels.items() if not isinstance(value, list)}
            regions = [int(part) for value in labels.values() if isinstance(value, list) for part in value]
            names.setdefault(max(regions, default=0), f"label-{max(regions, default=0)}")
        except (TypeError, ValueError) as error:
            raise UserError(
                f'{description_path}: expected "labels" as {{"0": "background", "1": name}}, got {labels}.'
            ) from error
    return tuple(names.get(value, f"label-{value}") for value in range(1, max(names, default=0) + 1))
