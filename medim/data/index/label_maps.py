"""Recognise label maps among the images of a source, and join them to the images that they belong to.

A label map has whole numbers of few levels or flat areas with large steps between them, a name or folder of labels
(`masks/`, `case_seg.nii.gz`), and the grid of the image beside it. No single property decides, except names that only
label maps have (`_dseg`).
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medim.data.index.decathlon import file_stem
from medim.data.index.layouts import Layout
from medim.data.index.masks import inspect_mask, is_on_grid
from medim.data.index.scan_cache import FileScanner
from medim.data.readers.inspection import ImageInfo, RejectedFile

log = logging.getLogger(__name__)
_LABEL_WORDS = {  # of file and folder names
    "annotation", "annotations", "aparc", "aseg", "atlas", "contour", "contours", "dseg", "groundtruth", "gt", "label",
    "labelmap", "labels", "labelstr", "labelsts", "mask", "masks", "parc", "parcellation", "probseg", "roi", "rois",
    "seg", "segm", "segmentation", "segmentations", "segs", "wmparc",
}  # fmt: skip
_GENERAL_WORDS = {  # of label maps that name no structure
    "annotation", "annotations", "dseg", "groundtruth", "gt", "label", "labelmap", "labels", "labelstr", "labelsts",
    "mask", "masks", "roi", "rois", "seg", "segm", "segmentation", "segmentations", "segs",
}  # fmt: skip
_LABEL_ENDINGS = ("mask", "masks", "seg", "segmentation", "labels")  # of words such as `brainmask`
_CERTAIN_WORDS = {"dseg", "probseg", "defacemask"}  # suffixes that images never have
_IMAGE_WORDS = {  # of file and folder names, left out where names are compared
    "cxr", "image", "images", "imagestr", "imagests", "img", "imgs", "mri", "orig", "png", "raw", "scan", "scans",
    "vol", "volume", "volumes", "xray", "xrays",
}  # fmt: skip
_MASK_SUFFIXES = {"dseg", "label", "mask", "roi", "seg"}  # BIDS suffixes of segmentations that are masks
_MASKS_OF_OTHER_READERS = {"constant", "not-an-image"}  # reasons for which a reader rejects a mask as an image
_MAX_JOINED_LEVELS = 64  # values of a mask that is joined without a table
_SEQUENCE_WORDS = {  # of images on one grid that may share a mask
    "adc", "dwi", "flair", "pd", "pdw", "swi", "t1", "t1c", "t1ce", "t1gd", "t1n", "t1post", "t1w", "t2", "t2f",
    "t2flair", "t2star", "t2w",
}  # fmt: skip
_ENTITIES = "sub|ses|acq|rec|run|dir|echo|part|chunk|hemi"  # of BIDS names, which a label map shares with its image
_MIN_FLATNESS = 0.6  # of a label map without a name of labels
_BINARY_LEVELS = 2  # of a mask that needs no flat areas, as of small lesions
_JOIN_REMEDY = "to use it, list it with its image in --labels (columns image, mask)"

Words = tuple[str, ...]


@dataclass(frozen=True)
class _FileName:
    """Words of a path below the source.

    Attributes:
        case: folders without those of images or labels.
        words: words of the file name without those of images and labels.
        in_label_folder: whether a folder has a name of labels.
        is_label: whether file or folder have a name of labels.
        is_certain: whether only label maps have such a name.
    """

    case: Words
    words: Words
    in_label_folder: bool
    is_label: bool
    is_certain: bool


@dataclass
class _LabelMap:
    """A file that is no image, with the images it belongs to."""

    path: Path
    name: _FileName
    info: ImageInfo
    rejection: RejectedFile
    images: list[ImageInfo] = field(default_factory=list)


def separate_label_maps(
    images: Sequence[ImageInfo],
    rejected: Sequence[RejectedFile],
    layout: Layout,
    scanner: FileScanner,
    *,
    root: Path,
    may_join: bool,
) -> tuple[list[ImageInfo], list[RejectedFile]]:
    """Remove label maps from the images, and add those with an image of their own to `layout.masks`.

    Args:
        images: images of the modality.
        rejected: all rejected files, with those that the layout rejects by their name.
        layout: masks by image; the joined label maps are added.
        scanner: reads the masks.
        root: common folder of the sources.
        may_join: whether masks are joined; otherwise they are all rejected.

    Returns:
        The other images, and the rejected files with the label maps that belong to no image.
    """
    names = {path: _parse_name(path, root) for path in [image.files[0] for image in images]}
    label_images = _find_label_maps(images, names, layout)
    label_paths = {image.files[0] for image in label_images}
    other_images = [image for image in images if image.files[0] not in label_paths]
    label_maps = [
        _LabelMap(image.files[0], names[image.files[0]], image, _reject_label(image)) for image in label_images
    ]
    label_maps += _find_rejected_masks(rejected, root, scanner)
    if may_join:
        _join_label_maps(label_maps, other_images, names, layout, scanner)
    paths, masks = {label_map.path for label_map in label_maps}, list(layout.masks.values())
    joined = paths.intersection(masks)
    if joined:
        n_images = sum(mask in joined for mask in masks)
        log.info(
            "%d label maps have the name and grid of %d images, and are used as their masks", len(joined), n_images
        )
    rejections = [rejection for rejection in rejected if rejection.path not in paths]
    rejections += [label_map.rejection for label_map in label_maps if label_map.path not in joined]
    return other_images, rejections


def _parse_name(path: Path, root: Path) -> _FileName:
    folders = Path(os.path.relpath(path.parent, root)).parts
    words = _split_words(file_stem(path.name))
    in_label_folder = any(map(_is_label_folder, folders))
    return _FileName(
        case=tuple(folder for folder in folders if not (_is_label_folder(folder) or _is_image_folder(folder))),
        words=tuple(word for word in words if not _is_label_word(word) and word not in _IMAGE_WORDS),
        in_label_folder=in_label_folder,
        is_label=in_label_folder or any(map(_is_label_word, words)),
        is_certain=bool(words) and words[-1] in _CERTAIN_WORDS,
    )


def _split_words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


def _is_label_word(word: str) -> bool:
    return word in _LABEL_WORDS or word.endswith(_LABEL_ENDINGS)


def _is_label_folder(folder: str) -> bool:
    """Whether a folder contains labels; `label_1` may be the folder of a class."""
    words = _split_words(folder)
    return bool(words) and not any(map(str.isdigit, words)) and (_is_label_word(words[0]) or _is_label_word(words[-1]))


def _is_image_folder(folder: str) -> bool:
    return any(word in _IMAGE_WORDS for word in _split_words(folder))


def _find_label_maps(images: Sequence[ImageInfo], names: dict[Path, _FileName], layout: Layout) -> list[ImageInfo]:
    """Find the images that are label maps, by their values, names and the images on the same grid."""
    real_images: dict[tuple[int, ...], list[ImageInfo]] = defaultdict(list)  # by shape
    for image in images:
        if not image.levels and not names[image.files[0]].is_label:
            real_images[image.shape].append(image)
    label_images = []
    for image in images:
        path, name = image.files[0], names[image.files[0]]
        if image.series or path in layout.masks or (image.item or "").count("/"):
            continue
        partners = (
            other
            for other in real_images[image.shape]
            if _share_case(name, names[other.files[0]]) and is_on_grid(image, other)
        )
        if name.is_certain or (name.is_label and image.levels):
            label_images.append(image)
        elif name.is_label:
            if any(name.words == names[other.files[0]].words for other in partners):
                label_images.append(image)
        elif (
            image.levels
            and image.item is None
            and len(image.shape) == 3
            and (image.levels == _BINARY_LEVELS or image.flatness >= _MIN_FLATNESS)
            and any(True for _ in partners)
        ):
            label_images.append(image)
    return label_images


def _share_case(label: _FileName, image: _FileName) -> bool:
    """Whether a label map is in the folder of an image, or in a folder of labels beside it."""
    return label.case == image.case or (label.in_label_folder and label.case == image.case[:-1])


def _reject_label(image: ImageInfo) -> RejectedFile:
    return RejectedFile(
        path=image.files[0],
        reason="looks-like-label",
        detail=f"a label map, by its name, values or the image beside it; {_JOIN_REMEDY}",
        identities=image.identities,
    )


def _find_rejected_masks(rejected: Iterable[RejectedFile], root: Path, scanner: FileScanner) -> list[_LabelMap]:
    """Find masks among the rejected files: segmentations of a BIDS tree, empty masks, and NIfTI files of labels."""
    candidates = []
    for rejection in rejected:
        name = _parse_name(rejection.path, root)
        suffix = file_stem(rejection.path.name).rpartition("_")[2]
        if (rejection.reason == "derived-label" and suffix in _MASK_SUFFIXES) or (
            rejection.reason in _MASKS_OF_OTHER_READERS and name.is_label and rejection.path.suffix
        ):
            candidates.append((rejection, name))
    inspections = scanner(inspect_mask, [rejection.path for rejection, _ in candidates])
    return [
        _LabelMap(rejection.path, name, inspection.images[0], rejection)
        for (rejection, name), inspection in zip(candidates, inspections, strict=True)
        if inspection.images
    ]


def _join_label_maps(
    label_maps: Sequence[_LabelMap],
    images: Sequence[ImageInfo],
    names: dict[Path, _FileName],
    layout: Layout,
    scanner: FileScanner,
) -> None:
    """Add masks to the layout: each image gets the one label map that fits, if there is exactly one."""
    by_shape: dict[tuple[int, ...], list[ImageInfo]] = defaultdict(list)
    for image in images:
        if image.files[0] not in layout.masks and not image.series:
            by_shape[image.shape].append(image)
    masks_by_image: dict[Path, list[_LabelMap]] = defaultdict(list)
    for label_map in label_maps:
        if max(label_map.info.levels, len(label_map.info.values)) <= _MAX_JOINED_LEVELS:
            label_map.images = _find_images(label_map, by_shape[label_map.info.shape], names)
            if not _may_share(label_map.images, names):
                label_map.rejection = replace(
                    label_map.rejection,
                    detail=f"fits {len(label_map.images)} images of perhaps several visits or views; {_JOIN_REMEDY}",
                )
                label_map.images = []
            for path in {image.files[0] for image in label_map.images}:
                masks_by_image[path].append(label_map)
    _reject_mixed_names(masks_by_image, names)
    unique_paths = {maps[0].path for maps in masks_by_image.values() if len(maps) == 1}
    paths = [label_map.path for label_map in label_maps if label_map.path in unique_paths]
    readable_paths = {
        path
        for path, inspection in zip(paths, scanner(inspect_mask, paths), strict=True)
        if inspection.images and len(inspection.images[0].values) <= _MAX_JOINED_LEVELS
    }
    for path, fitting_maps in masks_by_image.items():
        if len(fitting_maps) == 1:
            label_map = fitting_maps[0]
            if label_map.path in readable_paths:
                layout.masks[path] = label_map.path
            else:
                detail = (
                    f"the label map of an image, but not with whole numbers of at most {_MAX_JOINED_LEVELS} classes"
                )
                label_map.rejection = replace(label_map.rejection, detail=detail)
            continue
        for label_map in fitting_maps:
            label_map.rejection = RejectedFile(
                path=label_map.path,
                reason=label_map.rejection.reason,
                detail=f"{len(fitting_maps)} label maps fit its image; to use them, combine them into one file and "
                "list it in --labels (columns image, mask)",
                identities=label_map.rejection.identities,
            )


def _reject_mixed_names(masks_by_image: dict[Path, list[_LabelMap]], names: dict[Path, _FileName]) -> None:
    """Remove label maps that may be of different structures, which would become one class.

    Label maps that alone fit an image are named after several structures (`x_brainmask`, `y_lesion_mask`), or after one
    of several that another image has.
    """
    structures = {
        label_map.path: _name_structure(label_map, names[path])
        for path, maps in masks_by_image.items()
        for label_map in maps
    }
    single = {structures[maps[0].path] for maps in masks_by_image.values() if len(maps) == 1}
    several = {structures[m.path] for maps in masks_by_image.values() if len(maps) > 1 for m in maps} - {()}
    for path, maps in list(masks_by_image.items()):
        if len(maps) == 1 and (len(single) > 1 or structures[maps[0].path] in several):
            del masks_by_image[path]
            detail = f"label maps of this source may be of different structures, by their names; {_JOIN_REMEDY}"
            maps[0].rejection = replace(maps[0].rejection, detail=detail)


def _name_structure(label_map: _LabelMap, image: _FileName) -> Words:
    """Words of the name of a label map that its image does not have, without general ones such as `mask`."""
    words, length = label_map.name.words, len(image.words)
    extra_words = words[length:] if words[:length] == image.words and not label_map.path.name.startswith("sub-") else ()
    label_words = (word for word in _split_words(file_stem(label_map.path.name)) if _is_label_word(word))
    return (*extra_words, *(word for word in label_words if word not in _GENERAL_WORDS))


def _may_share(images: Sequence[ImageInfo], names: dict[Path, _FileName]) -> bool:
    """Whether a mask may belong to all of some images: to one, or to different sequences of a 3D scan in one folder."""
    if len({image.files[0] for image in images}) < 2:
        return True
    sequences = [names[image.files[0]].words[-1:] for image in images]
    is_one_folder = len({image.files[0].parent for image in images}) == 1
    starts = {names[image.files[0]].words[:-1] for image in images}
    is_named = all(words and words[0] in _SEQUENCE_WORDS for words in sequences) and len(set(sequences)) == len(images)
    return len(images[0].shape) == 3 and is_one_folder and len(starts) == 1 and is_named


def _find_images(label_map: _LabelMap, images: Sequence[ImageInfo], names: dict[Path, _FileName]) -> list[ImageInfo]:
    """Find the images that a label map belongs to: of its case and grid, with its name or the start of one."""
    label, entities = label_map.name, _parse_entities(label_map.path)
    images = [image for image in images if is_on_grid(label_map.info, image)]
    if entities:
        return [image for image in images if entities.items() <= _parse_entities(image.files[0]).items()]
    images = [image for image in images if _share_case(label, names[image.files[0]])]
    equal = [image for image in images if names[image.files[0]].words == label.words]
    if equal:
        return equal if label.words or len(equal) == 1 else []
    if not label.words:
        return images if len(images) == 1 or label.case else []
    return [image for image in images if _is_start(label.words, names[image.files[0]].words)]


def _is_start(words: Words, others: Words) -> bool:
    """Whether one name begins with the words of the other."""
    length = min(len(words), len(others))
    return length > 0 and words[:length] == others[:length]


def _parse_entities(path: Path) -> dict[str, str]:
    """Parse the entities of a BIDS name that identify an acquisition; empty for other names."""
    if not path.name.startswith("sub-"):
        return {}
    return dict(re.findall(rf"(?:^|_)({_ENTITIES})-([A-Za-z0-9]+)", path.name))
