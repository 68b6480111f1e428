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

from medim.data.readers.inspection import Refused
from medim.files import read_json
from medim.types import UserError

_CHANNEL = re.compile(r"(.+)_(\d{4})")
_NO_SEQUENCE = {"mri", "mr", "ct"}  # dataset.json of a task with one channel often names the modality alone


@dataclass(frozen=True)
class Folder:
    """One folder in this layout.

    Attributes:
        path: of the folder.
        classes: names of the mask values 1..K.
        names: of the channels, or of the volumes in a file.
        channels: case and number of each file that holds one channel.
        masks: mask by image.
        tests: images whose mask stands in `labelsTs`.
        spare: masks that belong to no image, with what is wrong.
        refused: files that are listed and not there.
    """

    path: Path
    classes: tuple[str, ...]
    names: tuple[str, ...]
    channels: dict[Path, tuple[str, int]] = field(default_factory=dict)
    masks: dict[Path, Path] = field(default_factory=dict)
    tests: frozenset[Path] = frozenset()
    spare: dict[Path, Refused] = field(default_factory=dict)
    refused: tuple[Refused, ...] = ()

    def sequence(self, path: Path, item: str | None) -> str | None:
        """What `dataset.json` calls the channel of a file, or the volume in it."""
        if item is None and path not in self.channels and len(self.names) != 1:
            return None
        number = self.channels[path][1] if path in self.channels else int(item or 0)
        name = self.names[number] if number < len(self.names) else ""
        return name if name and name.lower() not in _NO_SEQUENCE else None


def decathlon(path: Path, files: Collection[Path], images: Iterable[Path]) -> Folder | None:
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
    where = path / "dataset.json"
    description = read_json(where) if where in files else {}
    listed = description.get("training")
    if description and not isinstance(listed, list) and not (path / "imagesTr").is_dir():
        return None
    inside = [image for image in images if path in image.parents]
    masks = {image for image in inside if {path / "labelsTr", path / "labelsTs"} & set(image.parents)}
    channels = _channels(path, inside, masks, nnunet=bool({"channel_names", "file_ending"} & set(description)))
    trained = [image for image in inside if path / "imagesTr" in image.parents]
    pairs = _by_name(trained, [mask for mask in masks if path / "labelsTr" in mask.parents], channels)
    if isinstance(listed, list):
        pairs = _in_channels(_listed(path, listed), files, channels)
    tests = _by_name(
        [image for image in inside if path / "imagesTs" in image.parents],
        [mask for mask in masks if path / "labelsTs" in mask.parents],
        channels,
    )
    known = {image.name for image in trained} if isinstance(listed, list) else set()
    pairs |= {image: mask for image, mask in tests.items() if mask is not None}
    joined = {image: mask for image, mask in pairs.items() if mask is not None and mask in files}
    masks |= set(joined.values())
    lost = dict.fromkeys(file for pair in pairs.items() for file in pair if file is not None and file not in files)
    return Folder(
        path=path,
        classes=_classes(description.get("labels"), where),
        names=_names(description.get("channel_names") or description.get("modality")),
        channels=channels,
        masks=joined,
        tests=frozenset(image for image, mask in tests.items() if mask is not None),
        spare={mask: _spare(mask, known) for mask in masks - set(joined.values())},
        refused=tuple(
            Refused(path=file, reason="missing", detail="listed in dataset.json, not on the disk") for file in lost
        ),
    )


def stem(name: str) -> str:
    """A file's name without its suffix; `.nii.gz` is one suffix."""
    return name[:-7] if name.lower().endswith(".nii.gz") else Path(name).stem


def _spare(mask: Path, known: set[str]) -> Refused:
    """Why a mask has no image."""
    if mask.name in known:
        detail = "dataset.json does not list this label; its image is kept as unlabelled"
        return Refused(path=mask, reason="label-not-listed", detail=detail)
    return Refused(path=mask, reason="label-without-image", detail="a label without a readable image")


def _channels(
    folder: Path, images: Iterable[Path], masks: Iterable[Path], *, nnunet: bool
) -> dict[Path, tuple[str, int]]:
    """Case and number of files named `case_0000`: all in a folder of nnU-Net's, which one file may show.

    It shows it where a mask has the case's name and none has the file's own: a number may also be a patient's.
    """
    named = {stem(mask.name) for mask in masks}
    found: dict[Path, tuple[str, int]] = {}
    for image in images:
        match = _CHANNEL.fullmatch(stem(image.name))
        if match and image.parent.parent == folder and image.parent.name.startswith("images"):
            found[image] = (match[1], int(match[2]))
    shown = any(case in named and stem(image.name) not in named for image, (case, _) in found.items())
    return found if nnunet or shown else {}


def _by_name(
    images: Iterable[Path], masks: Iterable[Path], channels: dict[Path, tuple[str, int]]
) -> dict[Path, Path | None]:
    """Images with the mask of the same name."""
    by_stem = {stem(mask.name): mask for mask in masks}
    return {path: by_stem.get(channels.get(path, (stem(path.name), 0))[0]) for path in images}


def _in_channels(
    pairs: dict[Path, Path | None], files: Collection[Path], channels: dict[Path, tuple[str, int]]
) -> dict[Path, Path | None]:
    """The first nnU-Net lists `case.nii.gz` and has `case_0000.nii.gz`: each channel takes the case's mask."""
    cases: dict[tuple[Path, str], list[Path]] = {}
    for path, (case, _) in channels.items():
        cases.setdefault((path.parent, case), []).append(path)
    return {
        path: mask
        for image, mask in pairs.items()
        for path in ([image] if image in files else cases.get((image.parent, stem(image.name)), [image]))
    }


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


def _names(channels: object) -> tuple[str, ...]:
    """Names of the channels 0..n-1, from {"0": name}; none where they are not numbered so."""
    if not isinstance(channels, dict) or set(channels) != {str(k) for k in range(len(channels))}:
        return ()
    return tuple(str(channels[str(k)]) for k in range(len(channels)))


def _classes(labels: object, where: Path) -> tuple[str, ...]:
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
            raise UserError(f'{where}: expected "labels" as {{"0": "background", "1": name}}, got {labels}.') from error
    return tuple(names.get(value, f"label-{value}") for value in range(1, max(names, default=0) + 1))
