"""Pictures (`.png`, `.jpg`, ...) and numpy arrays (`.npy`, MedMNIST's `.npz`)."""

from __future__ import annotations

import math
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
from PIL import ExifTags, Image, ImageOps

from medim.data.labels import format_findings
from medim.data.readers.base import (
    ReadError,
    as_class_numbers,
    as_float,
    check_compression,
    check_memory,
    check_not_empty,
    check_size,
    flat_volume,
    ras_volume,
    single_image,
)
from medim.data.readers.inspection import FileInspection, ImageInfo, RejectedFile
from medim.data.readers.medmnist import find_class_names
from medim.privacy import make_pseudonym
from medim.types import Array, Split, Volume

SPLITS: tuple[Split, ...] = get_args(Split)
_GREY_MODES = {"1", "L", "F", "I"}
_COLOUR_MODES = {"CMYK", "YCbCr", "LAB", "HSV"}  # the first band of these modes is not a grey image
_MAX_ARCHIVE_BYTES = 8 << 30  # of all arrays; the largest set of MedMNIST's 28-pixel images has 0.9 GB
_MAX_ARCHIVE_IMAGES = 1 << 19  # the largest set of MedMNIST has 236,386
_PALE_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX"}  # with eight bits per band
_VISIBLE_CHROMA = 24  # difference of the bands of a visible colour, of 255
_MIN_COLOURED = 0.05  # fraction of visibly coloured pixels in a coloured picture
_MIN_COLOURED_DRAWING = 0.001  # in a drawing, which may be of black lines with a coloured button
_FLAT_PICTURE_FRACTION = 0.7  # of equal neighbours outside the background; at most 0.4 in 4,778 X-rays as PNG and JPEG
_WHITE, _WHITE_FRACTION = 250, 0.6  # background of a page of text
# A film with a coloured marker: fraction of grey pixels beside the background, and levels of 80 % of them, if the
# background is white or not. At most (0.11, 6) and (0.26, 4) in plots, diagrams and screenshots.
_MIN_FILM = {True: (0.2, 32), False: (0.4, 6)}
_MAIN_FRACTION = 0.8
_MEASURED_ROWS = 256
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's mode L


class PictureReader:
    """Reader of grey 2D images, one per file, 1 mm per pixel. Colour becomes luminance; transparency is dropped.

    The resolution in the file (pHYs, JFIF, EXIF) refers to print or screen, not to the patient, and is ignored.
    """

    name = "PNG, JPEG, TIFF, BMP"
    class_folders = True

    def accepts(self, path: Path) -> bool:
        """Whether the file name has a supported suffix."""
        return path.suffix.lower() in {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}

    def inspect(self, path: Path) -> FileInspection:
        """Read the whole file once."""
        volume, quality = self._read_picture(path)
        return single_image(volume, quality=quality)

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read the image, rows by columns, rotated according to its EXIF orientation.

        Raises:
            ReadError: the file is damaged or truncated, or has several frames.
        """
        return self._read_picture(path)[0]

    def read_mask(self, path: Path, item: str | None = None) -> Volume:
        """Read a mask. Class numbers are the grey values, or the palette indices independent of their colours.

        Raises:
            ReadError: as `read`, or the image is in colour without a palette, or a value is above 65535, or the
                file is a JPEG with more than two values.
        """
        volume = self._read_picture(path, classes=True)[0]
        return volume.with_array(as_class_numbers(volume.array))

    def _read_picture(self, path: Path, *, classes: bool = False) -> tuple[Volume, tuple[str, ...]]:
        """Read the image and its quality codes."""
        check_not_empty(path)
        quality = ["no-spacing"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                warnings.filterwarnings("ignore", category=UserWarning)  # about tags that Pillow cannot read
                # an open file, because Pillow maps a path into memory and then rotates it wrongly
                with path.open("rb") as file, Image.open(file) as image:
                    n_bytes = check_size(image.size, 1) * _count_pixel_bytes(image)
                    if not classes:
                        check_compression(image.width * image.height, n_bytes, path.stat().st_size)
                    check_memory(3 * n_bytes + 4 * image.width * image.height)  # Pillow's copies, then float32
                    if getattr(image, "n_frames", 1) > 1:
                        raise ReadError("several-volumes", "the file has several frames; expected one image")
                    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                        quality.append("exif-turned")
                    upright = ImageOps.exif_transpose(image)
                    if not classes and upright.mode in _PALE_MODES:
                        quality += _detect_drawing(upright)
                    if classes:
                        array = _read_class_numbers(upright)
                        if image.format == "JPEG" and len(np.unique(array)) > 2:
                            raise ReadError("not-a-mask", "JPEG compression changes the values; use PNG for masks")
                    elif image.mode not in _GREY_MODES and image.mode[:2] != "I;":
                        quality.append("colour-to-grey")
                        array = np.asarray(upright.convert("L"))
                    else:
                        array = np.asarray(upright)
        except (ReadError, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ReadError("too-large", f"more than {Image.MAX_IMAGE_PIXELS} pixels; X-rays are smaller") from error
        except Exception as error:  # decoders raise many exception types for damaged files
            raise ReadError("unreadable", f"the image is damaged or truncated ({type(error).__name__})") from error
        return flat_volume(as_float(array)), tuple(quality)


def _detect_drawing(picture: Image.Image) -> list[str]:
    """List quality codes of a picture that is coloured, or has flat areas or a white background as in a drawing."""
    colours = np.asarray(picture.convert("RGB"))
    rows = colours[:: max(1, len(colours) // _MEASURED_ROWS)].astype(np.int32)
    is_visibly_coloured = np.ptp(rows, axis=-1) > _VISIBLE_CHROMA
    coloured_fraction = is_visibly_coloured.mean()
    numbers = rows @ np.array([1 << 16, 1 << 8, 1])
    values, counts = np.unique(numbers, return_counts=True)
    background = values[counts.argmax()]
    left, right = numbers[:, :-1], numbers[:, 1:]
    is_foreground = (left != background) | (right != background)
    flat_fraction = (is_foreground & (left == right)).sum() / max(1, is_foreground.sum())
    is_page = background & 255 >= _WHITE and counts.max() >= _WHITE_FRACTION * numbers.size
    is_drawing = flat_fraction >= _FLAT_PICTURE_FRACTION or is_page
    grey = rows[~is_visibly_coloured & (numbers != background)].mean(axis=-1).astype(np.int64)
    min_grey_fraction, min_levels = _MIN_FILM[bool(is_page)]
    is_film = grey.size >= min_grey_fraction * numbers.size and _count_main_levels(grey) >= min_levels
    is_coloured = coloured_fraction >= (_MIN_COLOURED_DRAWING if is_drawing and not is_film else _MIN_COLOURED)
    return ["coloured"] * bool(is_coloured) + ["drawing-like"] * bool(is_drawing)


def _count_main_levels(grey: Array) -> int:
    """Count the most frequent grey levels that together have 80 % of the pixels."""
    counts = np.sort(np.bincount(grey))[::-1]
    return int(np.searchsorted(np.cumsum(counts), _MAIN_FRACTION * grey.size)) + 1


def _count_pixel_bytes(picture: Image.Image) -> int:
    """Count the bytes per pixel in memory, where Pillow stores colours in four bytes."""
    if picture.mode in {"1", "L", "P"}:
        return 1
    return 2 if picture.mode.startswith("I;16") else 4


def _read_class_numbers(picture: Image.Image) -> Array:
    """Read the (H, W) class numbers of a mask. Transparency is dropped; an RGB image with equal bands counts as grey.

    Raises:
        ReadError: the image has colours, whose classes are not defined.
    """
    bands = np.atleast_3d(np.asarray(picture))
    numbers = bands[..., : 3 if picture.mode.startswith("RGB") else 1]
    if picture.mode in _COLOUR_MODES or (numbers != numbers[..., :1]).any():
        raise ReadError("not-a-mask", "an image in colour; expected grey values or a palette, one number per class")
    return np.asarray(numbers[..., 0])


class NumpyReader:
    """Reader of `.npy` with one image, and `.npz` in MedMNIST's layout (`train_images`, `train_labels`, ...).

    Never unpickles. The geometry is unknown: 1 mm per voxel, axes as stored. An image of an archive is selected by
    split and position (`train/12`), or by its position among all images (`12`).
    """

    name = "npy, MedMNIST npz"
    class_folders = True

    def accepts(self, path: Path) -> bool:
        """Whether the suffix is `.npy` or `.npz`."""
        return path.suffix.lower() in {".npy", ".npz"}

    def inspect(self, path: Path) -> FileInspection:
        """Read the whole file once; an archive gives one entry per image."""
        if path.suffix.lower() == ".npz":
            return _inspect_archive(path)
        volume = self.read(path)
        return single_image(volume, quality=_list_missing_geometry(volume))

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read one image.

        Raises:
            ReadError: the file is damaged or of unknown layout, or the item does not exist.
        """
        check_not_empty(path)
        if path.suffix.lower() == ".npy":
            return _array_to_volume(_load_npy(path))
        images = _load_npz(path)
        if item is None:
            raise ReadError("several-volumes", "the archive has many images; select one, as in file.npz#train/0")
        split, _, index = item.rpartition("/")
        try:
            if split:
                return _array_to_volume(images[split][_parse_index(index)])
            return _array_to_volume(
                [image for name in SPLITS if name in images for image in images[name]][_parse_index(index)]
            )
        except (KeyError, IndexError, ValueError):
            counts = ", ".join(f"{name}/0..{len(array) - 1}" for name, array in images.items() if name in SPLITS)
            raise ReadError("no-such-item", f"no image '{item}' in the archive; it has {counts}") from None


def _list_missing_geometry(volume: Volume) -> tuple[str, ...]:
    """List quality codes for geometry that arrays do not contain."""
    return ("no-spacing", "no-place") if volume.spatial_dims == 3 else ("no-spacing",)


def _parse_index(text: str) -> int:
    """Parse a position from digits only, so that `-1` is an error."""
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def _array_to_volume(array: Array) -> Volume:
    """Convert a (H, W), (H, W, 3) or (D, H, W) array to a volume."""
    if array.dtype.kind not in "buif":
        raise ReadError("not-scalar", f"values of type {array.dtype}; expected real numbers")
    numbers = as_float(array)
    if numbers.ndim == 2:
        return flat_volume(numbers)
    if numbers.ndim == 3 and numbers.shape[-1] == 3:
        return flat_volume(numbers @ _LUMINANCE)
    if numbers.ndim == 3:
        return ras_volume(numbers, np.eye(4))
    raise ReadError("wrong-dimensions", f"an array of shape {array.shape}; expected (H, W), (H, W, 3) or (D, H, W)")


def _load_npy(path: Path) -> Array:
    """Load the array of a `.npy` file, without unpickling."""
    try:
        with path.open("rb") as file:
            shape, dtype = _read_npy_header(file)
            check_memory(check_size(shape or (1,), dtype.itemsize) + 4 * math.prod(shape))
            file.seek(0)
            array = np.asarray(np.load(file, allow_pickle=False))
            has_rest = bool(file.read(1))
    except (ReadError, MemoryError):
        raise
    except Exception as error:  # numpy raises many exception types for damaged files
        raise ReadError("unreadable", f"not a complete numpy array of numbers ({type(error).__name__})") from error
    if has_rest:
        raise ReadError("length-mismatch", "bytes follow the array that the header specifies")
    return array


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read shape and type of the array in a `.npy` file.

    Raises:
        ValueError: the header is damaged.
        ReadError: the values are not numbers.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:  # written for structured types only
        raise ReadError("not-scalar", "an array with named fields; expected real numbers")
    return shape, dtype


def _load_npz(path: Path) -> dict[str, Array]:
    """Load images by split, and labels by `<split>_labels`; cached in memory until the file changes."""
    status = path.stat()
    return _load_archive(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _load_archive(name: str, size: int, modification_ns: int) -> dict[str, Array]:
    content: dict[str, Array] = {}
    try:
        _check_archive(name, size)
        with np.load(name, allow_pickle=False) as archive:
            for split in SPLITS:
                if f"{split}_images" in archive:
                    content[split] = archive[f"{split}_images"]
                if f"{split}_labels" in archive:
                    content[f"{split}_labels"] = archive[f"{split}_labels"]
    except (ReadError, MemoryError):
        raise
    except Exception as error:  # numpy raises many exception types for damaged files
        raise ReadError("unreadable", f"not a complete numpy archive of numbers ({type(error).__name__})") from error
    if not any(split in content for split in SPLITS):
        raise ReadError("unknown-layout", "expected MedMNIST's arrays (train_images, val_images, test_images)")
    for split in SPLITS:
        images, labels = content.get(split), content.get(f"{split}_labels")
        if images is not None and (images.ndim not in {3, 4} or images.dtype.kind not in "buif"):
            raise ReadError("wrong-dimensions", f"{split}_images has shape {images.shape} and type {images.dtype}")
        if images is not None and labels is not None and len(images) != len(labels):
            raise ReadError("unknown-layout", f"{len(images)} {split}_images but {len(labels)} {split}_labels")
    return content


def _check_archive(name: str, packed_bytes: int) -> None:
    """Compare the headers of an archive with the limits, before an array is unpacked.

    Raises:
        ReadError: a limit is exceeded.
    """
    n_images = n_voxels = 0
    with zipfile.ZipFile(name) as archive:
        n_bytes = sum(info.file_size for info in archive.infolist())
        for split in SPLITS:
            if f"{split}_images.npy" in archive.namelist():
                with archive.open(f"{split}_images.npy") as file:
                    shape, _ = _read_npy_header(file)
                check_size(shape[1:], 1)
                n_images += shape[0] if shape else 0
                n_voxels += math.prod(shape)
    if n_bytes > _MAX_ARCHIVE_BYTES:
        limit = f"the limit is {_MAX_ARCHIVE_BYTES / 2**30:.3g} GiB"
        raise ReadError("too-large", f"the archive unpacks to {n_bytes / 2**30:.3g} GiB; {limit}")
    if n_images > _MAX_ARCHIVE_IMAGES:
        raise ReadError("too-many-images", f"{n_images:,} images in one file; the limit is {_MAX_ARCHIVE_IMAGES:,}")
    check_compression(n_voxels, n_bytes, packed_bytes)
    check_memory(n_bytes)


def _inspect_archive(path: Path) -> FileInspection:
    """Inspect every image of an archive."""
    check_not_empty(path)
    content = _load_npz(path)
    image_infos, rejected = [], []
    for split in SPLITS:
        images = content.get(split)
        if images is None or len(images) == 0:
            continue
        labels = content.get(f"{split}_labels")
        classes = None if labels is None else labels.reshape(len(labels), -1)  # (N, 1), or (N, K) for K findings
        volume = _array_to_volume(images[0])
        quality = _list_missing_geometry(volume)
        if classes is not None and classes.shape[1] > 1 and not np.isin(classes, (0, 1)).all():
            quality, classes = (*quality, "several-labels"), None
        names = None if classes is None else _select_class_names(path, classes)
        flat = images.reshape(len(images), -1)
        finite = np.isfinite(flat.sum(axis=1, dtype=np.float64))
        constant = flat.min(axis=1) == flat.max(axis=1)
        for index in range(len(images)):
            if not finite[index] or constant[index]:
                detail = f"image {split}/{index} " + ("is constant" if finite[index] else "is not finite")
                rejected.append(RejectedFile(reason="constant" if finite[index] else "not-finite", detail=detail))
                continue
            image = ImageInfo(
                item=f"{split}/{index}",
                shape=volume.shape,
                affine=volume.affine,
                subject=make_pseudonym(f"{path.name}#{split}/{index}"),
                label=None if classes is None else _encode_label(classes[index], names),
                split=split,
                quality=quality,
            )
            image_infos.append(image)
    return FileInspection(images=tuple(image_infos), rejected=tuple(rejected))


def _select_class_names(path: Path, classes: Array) -> tuple[str, ...] | None:
    """Select the published names of the classes (N, 1) or findings (N, K); None if they do not fit the numbers."""
    names = find_class_names(path.stem)
    if names is None:
        return None
    if classes.shape[1] > 1:
        return names if len(names) == classes.shape[1] else None
    return names if np.isin(classes, range(len(names))).all() else None


def _encode_label(row: Array, names: tuple[str, ...] | None) -> str | None:
    """Encode the label of an image: its class (1,), or its findings (K,); by number without names."""
    if len(row) == 1:
        return f"{row[0]:g}" if names is None else names[int(row[0])]
    names = names or tuple(map(str, range(len(row))))
    return format_findings({name: bool(is_present) for name, is_present in zip(names, row, strict=True)})
