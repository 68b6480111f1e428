"""Preprocessed images on disk, compressed in small blocks, so that a crop is read without the rest.

One `.b2nd` file an image (Blosc2, LZ4, sealed with a checksum) and one a mask, named by what they were made from: the
source's fingerprint and the steps. A changed file or step is another key; two processes that make the same key write
the same content, and the rename at the end is atomic, so a store may be filled twice at once and interrupted at any
time.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from medim.data.fingerprints import fingerprint
from medim.data.index.index import Index, Record, Rejection
from medim.data.parallel import in_processes
from medim.data.preprocessing.quality import Figures, measure
from medim.data.preprocessing.steps import check_steps, onto, preprocess
from medim.data.readers import ReadError
from medim.files import cache_folder, hash_of, read_json, write_bytes, write_json
from medim.types import Array, Step, UsageError, UserError, Volume

SCHEMA_VERSION = 3
CHUNK, BLOCK = 64, 16  # voxels a side: what is found at once, and what is decompressed at once
HALF_ERROR = 1 / 200  # standard deviations an intensity may be off by before float16 is too coarse for an image
OPEN_FILES = 64
SEAL = b"medim-1\0"  # ends every file, before the CRC-32 of what stands above; Blosc2 reads past neither

Box = tuple[slice, ...]


def default_folder() -> Path:
    """`store` in the user's cache folder."""
    return cache_folder() / "store"


@dataclass(frozen=True)
class Entry:
    """What a store knows of an image without reading its voxels.

    Attributes:
        shape: spatial shape in voxels.
        channels: number of channels.
        minimum: smallest value of each channel; padding takes it.
        affine: (4, 4) of the preprocessed grid.
        native_affine: (4, 4) of the file's grid.
        native_shape: spatial shape of the file's grid.
        mask: a mask is stored too.
        fingerprint: of the image before preprocessing; see `medim.data.fingerprints`.
        nbytes: size in RAM, as stored (float16 or float32), without the mask.
        figures: of the image as read, before the steps; None where `put` was given none.
    """

    shape: tuple[int, ...]
    channels: int
    minimum: tuple[float, ...]
    affine: Array
    native_affine: Array
    native_shape: tuple[int, ...]
    mask: bool
    fingerprint: str
    nbytes: int
    figures: Figures | None


class Store:
    """A folder of preprocessed images; see the module.

    Args:
        folder: made when the first image comes; None takes `default_folder`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self._open: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._entries: dict[str, Entry] = {}
        mark = self.folder / "store.json"
        self._marked = mark.is_file() and read_json(mark).get("schema_version") == SCHEMA_VERSION

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay in the process that opened them."""
        return {**self.__dict__, "_open": OrderedDict(), "_entries": {}}

    def key(self, index: Index, record: Record, steps: Sequence[Step]) -> str:
        """The name of an image after these steps: 32 hex digits that change when the source or a step does."""
        return hash_of([SCHEMA_VERSION, index.fingerprint(record), record.mask is not None, list(steps)])[:32]

    def add(self, index: Index, record: Record, steps: Sequence[Step]) -> str:
        """Preprocess an image (and its mask) into the store, unless a whole copy is there; damaged ones are redone.

        Returns:
            The key.

        Raises:
            UserError: the image cannot be read or preprocessed, or the store cannot be written.
        """
        key = self.key(index, record, steps)
        if not self.whole(key):
            self.put(key, *_prepared(index, record, steps))
        return key

    def put(
        self,
        key: str,
        image: Volume,
        mask: Volume | None = None,
        figures: Figures | None = None,
        fingerprint: str = "",
    ) -> None:
        """Write an image (C, ...) and its mask (1, ...) on the same grid; the image last, as the sign of both."""
        voxels = _halved(image.array)
        spatial = tuple(range(1, image.array.ndim))
        if mask is not None:
            labels = mask.array.astype(np.uint8, casting="unsafe")
            if not np.array_equal(labels, mask.array):
                raise UserError("mask: expected whole numbers from 0 to 255, got others. Renumber the labels.")
            write_bytes(self._path(key, "mask"), _frame(labels, {"schema_version": SCHEMA_VERSION}))
        header = {
            "schema_version": SCHEMA_VERSION,
            "affine": image.affine.ravel().tolist(),
            "native_affine": image.native_affine.ravel().tolist(),
            "native_shape": list(image.native_shape),
            "minimum": voxels.min(axis=spatial).tolist(),
            "mask": mask is not None,
            "fingerprint": fingerprint,
            "figures": None if figures is None else asdict(figures),
        }
        if not self._marked:
            write_json(self.folder / "store.json", {"schema_version": SCHEMA_VERSION, "kind": "medim-store"})
            self._marked = True
        write_bytes(self._path(key, "image"), _frame(voxels, header))
        self._forget(key)

    def whole(self, key: str) -> bool:
        """True where the key is stored, and image and mask are as they were written, byte by byte."""
        if not _sealed(self._path(key, "image")):
            return False
        self._forget(key)
        try:
            return not self.entry(key).mask or _sealed(self._path(key, "mask"))
        except UserError:  # another schema version
            return False

    def entry(self, key: str) -> Entry:
        """Shape, grid and padding values of an image.

        Raises:
            UserError: the key is not stored, or its file is damaged.
        """
        if key not in self._entries:
            array = self._array(key, "image")
            try:
                self._entries[key] = _entry(array, array.schunk.vlmeta["medim"])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise self._damaged(key, "image") from error
        return self._entries[key]

    def image(self, key: str, box: Box | None = None) -> Array:
        """An image, or a box of it: (C, ...), float16 or float32 as stored.

        Args:
            key: from `add`.
            box: a slice for each spatial axis, within the image; None reads all.
        """
        return self._read(key, "image", box)

    def mask(self, key: str, box: Box | None = None) -> Array:
        """A mask, or a box of it: (1, ...), uint8; see `image`."""
        return self._read(key, "mask", box)

    def volume(self, key: str) -> Volume:
        """A whole image in float32 with its place in space."""
        entry = self.entry(key)
        array = self.image(key).astype(np.float32)
        return Volume(array, entry.affine.copy(), entry.native_affine.copy(), entry.native_shape)

    def _path(self, key: str, kind: str) -> Path:
        return self.folder / key[:2] / (f"{key}.b2nd" if kind == "image" else f"{key}.mask.b2nd")

    def _read(self, key: str, kind: str, box: Box | None) -> Array:
        array = self._array(key, kind)
        try:
            return np.asarray(array[...] if box is None else array[(slice(None), *box)])
        except RuntimeError as error:
            raise self._damaged(key, kind) from error

    def _array(self, key: str, kind: str) -> Any:
        array = self._open.get((key, kind))
        if array is not None:
            self._open.move_to_end((key, kind))
            return array
        path = self._path(key, kind)
        if not path.is_file():
            raise UserError(f"{path}: not in the store. Run `medim preprocess` again; it adds what is missing.")
        if not _ends_sealed(path):  # nothing unfinished goes to the parser
            raise self._damaged(key, kind)
        try:
            array = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
        except (RuntimeError, ValueError, OSError) as error:
            raise self._damaged(key, kind) from error
        self._open[key, kind] = array
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return array

    def _forget(self, key: str) -> None:
        self._entries.pop(key, None)
        for kind in ("image", "mask"):
            self._open.pop((key, kind), None)

    def _damaged(self, key: str, kind: str) -> UserError:
        return UserError(f"{self._path(key, kind)}: damaged. Run `medim preprocess` again; it redoes damaged images.")


def fill(
    store: Store,
    index: Index,
    records: Sequence[Record],
    steps: Sequence[Step],
    *,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, str], tuple[Rejection, ...]]:
    """Bring images into a store; what is whole is kept.

    Args:
        store: where to.
        index: what the records are of.
        records: the images wanted.
        steps: preprocessing, the same for all.
        jobs: processes; 1 works in this one. With more, a script needs the usual `if __name__ == "__main__":`.
        progress: called with the number of images done, and of all.

    Returns:
        Image key to store key, in the order of `records`, and those that failed with their reasons: a reader's
        code, `preprocessing-failed`, or `worker-died` where a file brought its process down.

    Raises:
        UsageError: the steps are wrong.
        UserError: the store cannot be written.
    """
    check_steps(steps)
    if jobs < 1:
        raise UsageError(f"--jobs: expected 1 or more processes, got {jobs}.")
    places = {record.image: place for place, record in enumerate(records)}
    keys: dict[str, str] = {}
    failed: dict[str, Rejection] = {}
    done = _here(store, index, records, steps) if jobs == 1 else _in_processes(store, index, records, steps, jobs)
    for count, (image, outcome) in enumerate(done, start=1):
        if isinstance(outcome, str):
            keys[image] = outcome
        else:
            failed[image] = outcome
        if progress is not None:
            progress(count, len(records))
    ordered = sorted(keys, key=lambda image: places[image])
    return {image: keys[image] for image in ordered}, tuple(failed[i] for i in sorted(failed, key=lambda i: places[i]))


Outcome = tuple[str, str | Rejection]


def _here(store: Store, index: Index, records: Sequence[Record], steps: Sequence[Step]) -> Iterator[Outcome]:
    for record in records:
        try:
            key = store.key(index, record, steps)
            prepared = None if store.whole(key) else _prepared(index, record, steps)
        except UsageError:
            raise
        except Exception as error:  # a decoder may raise anything; one bad file must not end the rest
            yield record.image, _rejection(record, error)
            continue
        if prepared is not None:
            store.put(key, *prepared)
        yield record.image, key


def _rejection(record: Record, error: Exception) -> Rejection:
    """A reader's own code and words; of other errors the kind alone, since their messages may name paths."""
    if isinstance(error, ReadError):
        return Rejection(record.path, error.reason, error.detail)
    detail = str(error) if isinstance(error, UserError) else type(error).__name__
    return Rejection(record.path, "preprocessing-failed", detail)


def _batch(store: Store, index: Index, records: Sequence[Record], *, steps: Sequence[Step]) -> list[Outcome]:
    return list(_here(store, index, records, steps))


def _in_processes(
    store: Store, index: Index, records: Sequence[Record], steps: Sequence[Step], jobs: int
) -> Iterator[Outcome]:
    small = replace(index, records=(), rejected=())
    for record, outcome in in_processes(partial(_batch, store, small, steps=list(steps)), records, jobs):
        died = Rejection(record.path, "worker-died", "The process that read it was killed or crashed.")
        yield outcome or (record.image, died)


def _prepared(index: Index, record: Record, steps: Sequence[Step]) -> tuple[Volume, Volume | None, Figures, str]:
    """What `Store.put` takes of an image."""
    read = index.open(record)
    image = preprocess(read, steps)
    mask = onto(index.open_mask(record), image) if record.mask is not None else None
    return image, mask, measure(read), fingerprint(read)


def _halved(array: Array) -> Array:
    """The array in float16 where that moves no value by more than `HALF_ERROR` standard deviations, else in float32."""
    array = np.ascontiguousarray(array, np.float32)
    if np.abs(array).max(initial=0) < np.finfo(np.float16).max:
        half = array.astype(np.float16)
        if np.abs(half - array).max(initial=0) <= HALF_ERROR * array.std(dtype=np.float64):
            return half
    return array


def _sealed(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    body = content[: -len(SEAL) - 4]
    return content[len(body) :] == SEAL + zlib.crc32(body).to_bytes(4)


def _ends_sealed(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(SEAL) - 4))
        return file.read(len(SEAL)) == SEAL


def _frame(array: Array, header: dict[str, Any]) -> bytes:
    array = np.ascontiguousarray(array)
    chunks = (1, *(min(n, CHUNK) for n in array.shape[1:]))
    blocks = (1, *(min(n, BLOCK) for n in array.shape[1:])) if max(chunks) >= CHUNK else chunks
    compression = blosc2.CParams(
        codec=blosc2.Codec.LZ4,
        clevel=5,
        nthreads=1,
        typesize=array.itemsize,
        filters=[blosc2.Filter.SHUFFLE],
        filters_meta=[0],
    )
    alone = blosc2.DParams(nthreads=1)  # threads cost more than they save on a small image
    packed = blosc2.asarray(array, chunks=chunks, blocks=blocks, cparams=compression, dparams=alone)
    packed.schunk.vlmeta["medim"] = header
    frame = bytes(packed.to_cframe())
    return frame + SEAL + zlib.crc32(frame).to_bytes(4)


def _entry(array: Any, header: dict[str, Any]) -> Entry:
    if header["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version {header['schema_version']}")
    return Entry(
        shape=tuple(array.shape[1:]),
        channels=int(array.shape[0]),
        minimum=tuple(header["minimum"]),
        affine=np.asarray(header["affine"], np.float64).reshape(4, 4),
        native_affine=np.asarray(header["native_affine"], np.float64).reshape(4, 4),
        native_shape=tuple(header["native_shape"]),
        mask=bool(header["mask"]),
        fingerprint=str(header["fingerprint"]),
        nbytes=int(np.prod(array.shape)) * array.dtype.itemsize,
        figures=None if header["figures"] is None else Figures(**header["figures"]),
    )
