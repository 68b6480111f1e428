"""Store of preprocessed images on disk, compressed in small blocks, so that a crop is read without the rest.

Each image and each mask is one `.b2nd` file (Blosc2, LZ4, with a checksum), and so is the list of the foreground voxels
of a mask. Its key is derived from the fingerprint of the source file and the steps, so a changed file or step has a new
key. Two processes with the same key write the same
content, and the final rename is atomic. A store may therefore be filled by several processes and interrupted at any
time.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

import blosc2
import numpy as np

from medim.data.fingerprints import compute_fingerprint
from medim.data.index.index import ImageRecord, Index, Rejection
from medim.data.loading.foreground import ForegroundVoxels, list_foreground
from medim.data.parallel import map_in_processes
from medim.data.preprocessing.quality import QualityMetrics, measure_quality
from medim.data.preprocessing.steps import check_steps, preprocess, resample_mask
from medim.data.readers import ReadError
from medim.files import cache_folder, json_sha256, read_json, write_bytes, write_json
from medim.migrations import rename_keys
from medim.types import Array, Step, UsageError, UserError, Volume

SCHEMA_VERSION = 4
KEY_VERSION = 3  # part of every key; unchanged by a version that changes the header only
READABLE_VERSIONS = frozenset({3, SCHEMA_VERSION})
CHUNK_SIDE, BLOCK_SIDE = 64, 16  # voxels per side: of a chunk (unit of access) and of a block (unit of decompression)
MAX_FLOAT16_ERROR = 1 / 200  # largest rounding error, in standard deviations of the image, for storage as float16
MAX_OPEN_FILES = 64
SEAL = b"medim-1\0"  # at the end of every file, followed by the CRC-32 of the content; Blosc2 ignores both

Box = tuple[slice, ...]


def locate_default_store() -> Path:
    """Return the folder of the store in the user's cache folder; another schema version has another folder."""
    return cache_folder() / f"store-{SCHEMA_VERSION}"


class ImageHeader(TypedDict):
    """Metadata in the file of an image; see `StoreEntry`."""

    schema_version: int
    affine: list[float]
    native_affine: list[float]
    native_shape: list[int]
    minimum: list[float]
    mask: bool
    fingerprint: str
    metrics: Mapping[str, Any] | None  # fields of QualityMetrics


@dataclass(frozen=True, kw_only=True)
class StoreEntry:
    """Metadata of an image in a store, without its voxels.

    Attributes:
        shape: spatial shape in voxels.
        channels: number of channels.
        minimum: smallest value of each channel, used for padding.
        affine: (4, 4) affine of the preprocessed grid.
        native_affine: (4, 4) affine of the file's grid.
        native_shape: spatial shape of the file's grid.
        has_mask: whether a mask is stored too.
        fingerprint: fingerprint of the image before preprocessing; see `medim.data.fingerprints`.
        nbytes: size in memory as stored (float16 or float32), without the mask.
        metrics: metrics of the image as read, before the steps; None if `put` received none.
    """

    shape: tuple[int, ...]
    channels: int
    minimum: tuple[float, ...]
    affine: Array
    native_affine: Array
    native_shape: tuple[int, ...]
    has_mask: bool
    fingerprint: str
    nbytes: int
    metrics: QualityMetrics | None


class Store:
    """Folder of preprocessed images; for the format, see the module docstring.

    Args:
        folder: folder of the store, created with the first image; None for `locate_default_store`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else locate_default_store()
        self._open: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._entries: dict[str, StoreEntry] = {}
        marker = self.folder / "store.json"
        self._has_marker = marker.is_file() and read_json(marker).get("schema_version") == SCHEMA_VERSION

    def __getstate__(self) -> dict[str, object]:
        """Exclude open files, which belong to one process."""
        return {**self.__dict__, "_open": OrderedDict(), "_entries": {}}

    def compute_key(self, index: Index, record: ImageRecord, steps: Sequence[Step]) -> str:
        """Compute the key of an image after these steps: 32 hex digits that depend on the source and the steps."""
        mask_mapping = [index.mask_mapping] if record.mask is not None and index.mask_mapping else []
        parts = [KEY_VERSION, index.fingerprint(record), record.mask is not None, list(steps), *mask_mapping]
        return json_sha256(parts)[:32]

    def add(self, index: Index, record: ImageRecord, steps: Sequence[Step]) -> str:
        """Preprocess an image (and its mask) into the store, unless an intact copy exists; replaces damaged copies.

        Returns:
            The key.

        Raises:
            UserError: the image cannot be read or preprocessed, or the store cannot be written.
        """
        key = self.compute_key(index, record, steps)
        if not self.is_intact(key):
            self.put(key, *_prepare_image(index, record, steps))
        return key

    def put(
        self,
        key: str,
        image: Volume,
        mask: Volume | None = None,
        metrics: QualityMetrics | None = None,
        fingerprint: str = "",
    ) -> None:
        """Write an image (C, ...) and its mask (1, ...) on the same grid; the image last, as it marks completion."""
        voxels = _reduce_precision(image.array)
        spatial = tuple(range(1, image.array.ndim))
        if mask is not None:
            labels = mask.array.astype(np.uint8, casting="unsafe")
            if not np.array_equal(labels, mask.array):
                raise UserError("mask: expected integers from 0 to 255, got other values. Renumber the labels.")
            write_bytes(self._locate_file(key, "mask"), _encode_frame(labels, {"schema_version": SCHEMA_VERSION}))
            self._write_foreground(key, list_foreground(labels[0]))
        header: ImageHeader = {
            "schema_version": SCHEMA_VERSION,
            "affine": image.affine.ravel().tolist(),
            "native_affine": image.native_affine.ravel().tolist(),
            "native_shape": list(image.native_shape),
            "minimum": voxels.min(axis=spatial).tolist(),
            "mask": mask is not None,
            "fingerprint": fingerprint,
            "metrics": None if metrics is None else asdict(metrics),
        }
        if not self._has_marker:
            write_json(self.folder / "store.json", {"schema_version": SCHEMA_VERSION, "kind": "medim-store"})
            self._has_marker = True
        write_bytes(self._locate_file(key, "image"), _encode_frame(voxels, header))
        self._drop_cached(key)

    def is_intact(self, key: str) -> bool:
        """Whether the key is stored, and image, mask and list of foreground voxels pass their checksums.

        A missing list, as in stores of earlier versions, is no damage; see `read_foreground`.
        """
        if not _has_valid_seal(self._locate_file(key, "image")):
            return False
        self._drop_cached(key)
        try:
            if not self.get_entry(key).has_mask:
                return True
        except UserError:  # another schema version
            return False
        foreground = self._locate_file(key, "foreground")
        return _has_valid_seal(self._locate_file(key, "mask")) and (
            not foreground.is_file() or _has_valid_seal(foreground)
        )

    def get_entry(self, key: str) -> StoreEntry:
        """Read shape, grid and padding values of an image.

        Raises:
            UserError: the key is not stored, or its file is damaged.
        """
        if key not in self._entries:
            array = self._open_array(key, "image")
            try:
                self._entries[key] = _parse_entry(array, array.schunk.vlmeta["medim"])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise self._damage_error(key, "image") from error
        return self._entries[key]

    def read_image(self, key: str, box: Box | None = None) -> Array:
        """Read an image, or a box of it: (C, ...), float16 or float32 as stored.

        Args:
            key: key from `add`.
            box: one slice per spatial axis, inside the image; None reads the whole image.
        """
        return self._read_box(key, "image", box)

    def read_mask(self, key: str, box: Box | None = None) -> Array:
        """Read a mask, or a box of it: (1, ...), uint8; see `read_image`."""
        return self._read_box(key, "mask", box)

    def read_foreground(self, key: str) -> ForegroundVoxels:
        """Read the foreground voxels of a mask.

        A missing list, as in stores of earlier versions, is computed from the mask. It is also written, unless the
        store cannot be written.

        Raises:
            UserError: the key has no mask in the store, or a file is damaged.
        """
        if not self._locate_file(key, "foreground").is_file():
            foreground = list_foreground(self.read_mask(key)[0])
            with suppress(UserError):
                self._write_foreground(key, foreground)
            return foreground
        shape = self.get_entry(key).shape
        array = self._open_array(key, "foreground")
        try:
            header = array.schunk.vlmeta["medim"]
            classes, counts = (np.asarray(header[name], np.int64) for name in ("classes", "counts"))
            foreground = ForegroundVoxels(shape=shape, classes=classes, counts=counts, indices=np.asarray(array[0]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._damage_error(key, "foreground") from error
        if not foreground.is_valid():
            raise self._damage_error(key, "foreground")
        return foreground

    def load_volume(self, key: str) -> Volume:
        """Load a whole image as float32 with its affine."""
        entry = self.get_entry(key)
        array = self.read_image(key).astype(np.float32)
        return Volume(array, entry.affine.copy(), entry.native_affine.copy(), entry.native_shape)

    def _locate_file(self, key: str, kind: str) -> Path:
        return self.folder / key[:2] / (f"{key}.b2nd" if kind == "image" else f"{key}.{kind}.b2nd")

    def _write_foreground(self, key: str, foreground: ForegroundVoxels) -> None:
        header = {
            "schema_version": SCHEMA_VERSION,
            "classes": foreground.classes.tolist(),
            "counts": foreground.counts.tolist(),
        }
        write_bytes(self._locate_file(key, "foreground"), _encode_frame(foreground.indices[None], header))

    def _read_box(self, key: str, kind: str, box: Box | None) -> Array:
        array = self._open_array(key, kind)
        try:
            return np.asarray(array[...] if box is None else array[(slice(None), *box)])
        except RuntimeError as error:
            raise self._damage_error(key, kind) from error

    def _open_array(self, key: str, kind: str) -> Any:
        array = self._open.get((key, kind))
        if array is not None:
            self._open.move_to_end((key, kind))
            return array
        path = self._locate_file(key, kind)
        if not path.is_file():
            raise UserError(f"{path}: not in the store. Run `medim preprocess` again to add missing images.")
        if not _has_seal(path):  # Blosc2 must not parse incomplete files
            raise self._damage_error(key, kind)
        try:
            array = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
        except (RuntimeError, ValueError, OSError) as error:
            raise self._damage_error(key, kind) from error
        self._open[key, kind] = array
        if len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return array

    def _drop_cached(self, key: str) -> None:
        self._entries.pop(key, None)
        for kind in ("image", "mask", "foreground"):
            self._open.pop((key, kind), None)

    def _damage_error(self, key: str, kind: str) -> UserError:
        return UserError(
            f"{self._locate_file(key, kind)}: damaged. Run `medim preprocess` again to replace damaged images."
        )


def fill_store(
    store: Store,
    index: Index,
    records: Sequence[ImageRecord],
    steps: Sequence[Step],
    *,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, str], tuple[Rejection, ...]]:
    """Preprocess images into a store; intact images are kept.

    Args:
        store: target store.
        index: index of the records.
        records: images to preprocess.
        steps: preprocessing steps, the same for all images.
        jobs: number of processes; 1 uses this process. With more, a script needs the usual
            `if __name__ == "__main__":`.
        progress: called with the number of processed images, and of all.

    Returns:
        Image key to store key, in the order of `records`, and the failed images with their reasons: the code of a
        reader, `too-much-memory`, `preprocessing-failed`, or `worker-died` for a file that crashed its process.

    Raises:
        UsageError: the steps are invalid.
        UserError: the store cannot be written.
    """
    check_steps(steps)
    if jobs < 1:
        raise UsageError(f"--jobs: expected 1 or more processes, got {jobs}.")
    positions = {record.image: position for position, record in enumerate(records)}
    keys: dict[str, str] = {}
    rejections: dict[str, Rejection] = {}
    outcomes = (
        _process_records(store, index, records, steps)
        if jobs == 1
        else _process_in_parallel(store, index, records, steps, jobs)
    )
    for count, (image, outcome) in enumerate(outcomes, start=1):
        if isinstance(outcome, str):
            keys[image] = outcome
        else:
            rejections[image] = outcome
        if progress is not None:
            progress(count, len(records))
    images = sorted(keys, key=lambda image: positions[image])
    return {image: keys[image] for image in images}, tuple(
        rejections[i] for i in sorted(rejections, key=lambda i: positions[i])
    )


FillOutcome = tuple[str, str | Rejection]


def _process_records(
    store: Store, index: Index, records: Sequence[ImageRecord], steps: Sequence[Step]
) -> Iterator[FillOutcome]:
    for record in records:
        try:
            key = store.compute_key(index, record, steps)
            content = None if store.is_intact(key) else _prepare_image(index, record, steps)
        except UsageError:
            raise
        except Exception as error:  # decoders raise many exception types, and one file must not stop the others
            yield record.image, build_rejection(record, error)
            continue
        if content is not None:
            store.put(key, *content)
        yield record.image, key


def build_rejection(record: ImageRecord, error: Exception) -> Rejection:
    """Build a rejection: code and detail of a reader, else only the error type, as messages may contain paths."""
    if isinstance(error, ReadError):
        return Rejection(record.path, error.reason, error.detail)
    if isinstance(error, MemoryError):
        return Rejection(record.path, "too-much-memory", "the image does not fit into memory")
    detail = str(error) if isinstance(error, UserError) else type(error).__name__
    return Rejection(record.path, "preprocessing-failed", detail)


def _process_batch(
    store: Store, index: Index, records: Sequence[ImageRecord], *, steps: Sequence[Step]
) -> list[FillOutcome]:
    return list(_process_records(store, index, records, steps))


def _process_in_parallel(
    store: Store, index: Index, records: Sequence[ImageRecord], steps: Sequence[Step], jobs: int
) -> Iterator[FillOutcome]:
    empty_index = replace(index, records=(), rejected=())
    for record, outcome in map_in_processes(
        partial(_process_batch, store, empty_index, steps=list(steps)), records, jobs
    ):
        crash = Rejection(record.path, "worker-died", "The process that read the file was killed or crashed.")
        yield outcome or (record.image, crash)


def _prepare_image(
    index: Index, record: ImageRecord, steps: Sequence[Step]
) -> tuple[Volume, Volume | None, QualityMetrics, str]:
    """Compute the arguments of `Store.put` for an image."""
    volume = index.open(record)
    image = preprocess(volume, steps)
    mask = resample_mask(index.open_mask(record), image) if record.mask is not None else None
    return image, mask, measure_quality(volume), compute_fingerprint(volume)


def _reduce_precision(array: Array) -> Array:
    """Convert to float16 if the error stays within `MAX_FLOAT16_ERROR` standard deviations, else to float32."""
    array = np.ascontiguousarray(array, np.float32)
    if np.abs(array).max(initial=0) < np.finfo(np.float16).max:
        half = array.astype(np.float16)
        if np.abs(half - array).max(initial=0) <= MAX_FLOAT16_ERROR * array.std(dtype=np.float64):
            return half
    return array


def _has_valid_seal(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    body = content[: -len(SEAL) - 4]
    return content[len(body) :] == SEAL + zlib.crc32(body).to_bytes(4)


def _has_seal(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(SEAL) - 4))
        return file.read(len(SEAL)) == SEAL


def _encode_frame(array: Array, header: Mapping[str, object]) -> bytes:
    array = np.ascontiguousarray(array)
    chunks = (1, *(min(n, CHUNK_SIDE) for n in array.shape[1:]))
    blocks = (1, *(min(n, BLOCK_SIDE) for n in array.shape[1:])) if max(chunks) >= CHUNK_SIDE else chunks
    compression = blosc2.CParams(
        codec=blosc2.Codec.LZ4,
        clevel=5,
        nthreads=1,
        typesize=array.itemsize,
        filters=[blosc2.Filter.SHUFFLE],
        filters_meta=[0],
    )
    decompression = blosc2.DParams(nthreads=1)  # more threads are slower for small images
    blosc_array = blosc2.asarray(array, chunks=chunks, blocks=blocks, cparams=compression, dparams=decompression)
    blosc_array.schunk.vlmeta["medim"] = header
    frame = bytes(blosc_array.to_cframe())
    return frame + SEAL + zlib.crc32(frame).to_bytes(4)


def _parse_entry(array: Any, content: Any) -> StoreEntry:
    if content["schema_version"] not in READABLE_VERSIONS:
        raise ValueError(f"schema_version {content['schema_version']}")
    header = cast(ImageHeader, rename_keys(content, "store_entry"))
    return StoreEntry(
        shape=tuple(array.shape[1:]),
        channels=int(array.shape[0]),
        minimum=tuple(header["minimum"]),
        affine=np.asarray(header["affine"], np.float64).reshape(4, 4),
        native_affine=np.asarray(header["native_affine"], np.float64).reshape(4, 4),
        native_shape=tuple(header["native_shape"]),
        has_mask=bool(header["mask"]),
        fingerprint=str(header["fingerprint"]),
        nbytes=int(np.prod(array.shape)) * array.dtype.itemsize,
        metrics=None if header["metrics"] is None else QualityMetrics(**header["metrics"]),
    )
