"""Read Medical Segmentation Decathlon folders, and nnU-Net folders, which have one file per channel of a case.

`imagesTr` and `labelsTr` are paired as listed in `dataset.json`, else by name; `imagesTs` and `labelsTs` (if there are
labels of test images) are paired by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medim.data.mask_classes import MAX_MASK_VALUE, MaskClasses, check_class_count
from medim.data.readers.inspection import RejectedFile
from medim.files import read_json
from medim.privacy import format_path, format_result_path
from medim.types import UserError

_CHANNEL_PATTERN = re.compile(r"(.+)_(\d{4})")
_IGNORE_NAME = "ignore"  # reserved by nnU-Net for voxels without a label
_NON_SEQUENCE_NAMES = {"mri", "mr", "ct"}  # dataset.json of a single-channel task often contains only the modality


@dataclass(frozen=True, kw_only=True)
class DecathlonFolder:
    """Content of one folder in this layout.

    Attributes:
        path: path of the folder.
        classes: names of the mask values.
        channel_names: names of the channels, or of the volumes in a file.
        channels: case and channel number of each single-channel file.
        masks: mask by image.
        test_images: images with a mask in `labelsTs`.
        unmatched_masks: masks without an image, with the reason.
        rejected: files that are listed but missing.
    """

    path: Path
    classes: MaskClasses
    channel_names: tuple[str, ...]
    channels: dict[Path, tuple[str, int]] = field(default_factory=dict)
    masks: dict[Path, Path] = field(default_factory=dict)
    test_images: frozenset[Path] = frozenset()
    unmatched_masks: dict[Path, RejectedFile] = field(default_factory=dict)
    rejected: tuple[RejectedFile, ...] = ()

    def sequence(self, path: Path, item: str | None) -> str | None:
        """Name of the channel of a file, or of the volume in it, from `dataset.json`."""
        if item is None and path not in self.channels and len(self.channel_names) != 1:
            return None
        number = self.channels[path][1] if path in self.channels else int(item or 0)
        name = self.channel_names[number] if number < len(self.channel_names) else ""
        return name if name and name.lower() not in _NON_SEQUENCE_NAMES else None


def read_decathlon_folder(path: Path, files: Collection[Path], images: Iterable[Path]) -> DecathlonFolder | None:
    """Read a folder in this layout.

    Args:
        path: folder with a `dataset.json`, an `imagesTr`, or both.
        files: all files of the source.
        images: files that may be images or masks.

    Returns:
        The content of the folder, or None if the `dataset.json` belongs to another tool.

    Raises:
        UserError: the `dataset.json` is damaged.
    """
    description_path = path / "dataset.json"
    description = _read_description(description_path) if description_path in files else {}
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
        classes=_parse_mask_classes(description.get("labels"), description_path),
        channel_names=_parse_channel_names(description.get("channel_names") or description.get("modality")),
        channels=channels,
        masks=mask_by_image,
        test_images=frozenset(image for image, mask in test_pairs.items() if mask is not None),
        unmatched_masks={
            mask: _reject_unmatched_mask(mask, training_names) for mask in masks - set(mask_by_image.values())
        },
        rejected=tuple(
            RejectedFile(path=file, reason="missing", detail="listed in dataset.json, but the file does not exist")
            for file in missing_files
        ),
    )


def file_stem(name: str) -> str:
    """Return a file name without its suffix; `.nii.gz` is one suffix."""
    return name[:-7] if name.lower().endswith(".nii.gz") else Path(name).stem


def _read_description(path: Path) -> Mapping[str, Any]:
    """Read a `dataset.json`; a message contains no names of folders."""
    return read_json(path, place=format_result_path(path))


def _reject_unmatched_mask(mask: Path, training_names: set[str]) -> RejectedFile:
    """Build the rejection of a mask without an image."""
    if mask.name in training_names:
        detail = "dataset.json does not list this label; its image is included without a label"
        return RejectedFile(path=mask, reason="label-not-listed", detail=detail)
    return RejectedFile(path=mask, reason="label-without-image", detail="a label without a readable image")


def _find_channels(
    folder: Path, images: Iterable[Path], masks: Iterable[Path], *, nnunet: bool
) -> dict[Path, tuple[str, int]]:
    """Find files named `case_0000`, with case and channel number. Empty if the folder is not in nnU-Net format.

    Without a declaration in `dataset.json`, the folder counts as nnU-Net if for at least one file a mask has the name
    of the case and none has the name of the file; otherwise the number may be part of a patient ID.
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
    """Map images to the mask of the same name."""
    by_stem = {file_stem(mask.name): mask for mask in masks}
    return {path: by_stem.get(channels.get(path, (file_stem(path.name), 0))[0]) for path in images}


def _expand_channels(
    pairs: dict[Path, Path | None], files: Collection[Path], channels: dict[Path, tuple[str, int]]
) -> dict[Path, Path | None]:
    """Assign the mask of a case to each channel: nnU-Net v1 lists `case.nii.gz`, but has `case_0000.nii.gz`."""
    cases: dict[tuple[Path, str], list[Path]] = {}
    for path, (case, _) in channels.items():
        cases.setdefault((path.parent, case), []).append(path)
    return {
        path: mask
        for image, mask in pairs.items()
        for path in ([image] if image in files else cases.get((image.parent, file_stem(image.name)), [image]))
    }


def _parse_training_pairs(folder: Path, items: Sequence[Any]) -> dict[Path, Path | None]:
    """Parse the images and masks listed under `training` in a `dataset.json`."""

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
                f'{format_path(folder / "dataset.json")}: expected {{"image": path, "label": path}} under "training", '
                f"got {type(item).__name__}."
            )
    return pairs


def _parse_channel_names(channels: object) -> tuple[str, ...]:
    """Parse the names of the channels 0..n-1 from {"0": name}; empty if they are not numbered this way."""
    if not isinstance(channels, dict) or set(channels) != {str(k) for k in range(len(channels))}:
        return ()
    return tuple(str(channels[str(k)]) for k in range(len(channels)))


def _parse_mask_classes(labels: object, description_path: Path) -> MaskClasses:
    """Parse the names of the mask values from {"0": "background", "1": name} or {name: 1}.

    The value named `ignore` marks voxels without a label, as in nnU-Net. A list of several values is a region of
    nnU-Net; a value that occurs only in regions gets a name from them.

    Raises:
        UserError: a value is not an integer of a mask, or two names or values are equal.
    """
    if not isinstance(labels, dict):
        return MaskClasses()
    place = format_path(description_path)
    pairs = _parse_value_names(labels, place)
    names: dict[int, str] = {}
    for name, values in pairs:
        if not values or not all(0 <= value <= MAX_MASK_VALUE for value in values):
            raise UserError(
                f'{place}: expected mask values from 0 to {MAX_MASK_VALUE} in "labels", got {name!r}: '
                f"{', '.join(map(str, values)) or 'none'}."
            )
        if len(values) > 1 or values == (0,):
            continue
        if values[0] in names or name in names.values():
            raise UserError(
                f'{place}: expected one name per mask value in "labels", got value {values[0]} and name {name!r} twice.'
            )
        names[values[0]] = name
    regions = {name: values for name, values in pairs if len(values) > 1}
    for value in sorted({value for values in regions.values() for value in values} - {0, *names}):
        names[value] = f"part of {' and '.join(name for name, values in regions.items() if value in values)}"
    ignore_value = next((value for value, name in names.items() if name.strip().lower() == _IGNORE_NAME), None)
    class_values = tuple(sorted(value for value in names if value != ignore_value))
    check_class_count(place, class_values)
    return MaskClasses(
        names=tuple(names[value] for value in class_values),
        values=class_values,
        ignore_value=ignore_value,
        regions=tuple(regions),
    )


def _is_integer(text: str) -> bool:
    """Whether `int` accepts a text.

    Examples:
        >>> _is_integer("-1"), _is_integer("left"), _is_integer("1.0")
        (True, False, False)
    """
    return re.fullmatch(r"\s*[+-]?\d+(_\d+)*\s*", text) is not None


def _parse_value_names(labels: Mapping[str, Any], place: str) -> list[tuple[str, tuple[int, ...]]]:
    """Parse {"1": name} or {name: 1} or {name: [1, 2]} to names with their values.

    Raises:
        UserError: the labels have another form.
    """
    is_numbered_by_value = all(map(_is_integer, labels))
    try:
        if is_numbered_by_value:
            return [(str(name), (int(value),)) for value, name in labels.items()]
        values = [value if isinstance(value, list) else [value] for value in labels.values()]
        return [(str(name), tuple(map(int, numbers))) for name, numbers in zip(labels, values, strict=True)]
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(f'{place}: expected "labels" as {{"0": "background", "1": name}}, got {labels}.') from error
