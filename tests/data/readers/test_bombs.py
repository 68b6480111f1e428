"""Small files that unpack to a lot, and the memory that an image takes."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medim.data.index.scan_cache import inspect_file
from medim.data.readers import ReadError, base, find_reader, itk, nifti, read_mask, read_volume
from medim.data.readers.base import MIN_RATIO_VOXELS
from tests.data.synthetic import dataset, noise, save, write_nifti

SHAPE = (512, 513, 256)  # just above MIN_RATIO_VOXELS
BLOCK = 1 << 24


@contextmanager
def traced_memory() -> Iterator[list[int]]:
    """Yield a list that receives the peak of the memory allocated by Python and numpy in the block, in bytes."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def pack_zeros(head: bytes, n_bytes: int, wbits: int = zlib.MAX_WBITS) -> bytes:
    """A zlib, gzip or raw stream of a head and zeros, packed once per block and without the true checksum."""
    start, block = zlib.compressobj(9, zlib.DEFLATED, wbits), zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = start.compress(head) + start.flush(zlib.Z_FULL_FLUSH)
    zeros = block.compress(bytes(BLOCK)) + block.flush(zlib.Z_FULL_FLUSH)
    return packed + zeros * (-(-n_bytes // BLOCK)) + b"\x03\0" + bytes(8)


def nifti_bomb(path: Path) -> Path:
    header = nibabel.Nifti1Image(noise(2, 2, 2).astype(np.uint8), np.eye(4)).header
    header.set_data_shape(SHAPE)
    header["vox_offset"] = 352
    path.write_bytes(pack_zeros(header.binaryblock + bytes(4), int(np.prod(SHAPE)), 16 + zlib.MAX_WBITS))
    return path


def metaimage_bomb(path: Path) -> Path:
    text = "ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nElementSpacing = 1 1 1\n"
    text += f"DimSize = {' '.join(map(str, SHAPE))}\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    path.write_bytes(text.encode() + pack_zeros(b"", int(np.prod(SHAPE))))
    return path


def nrrd_bomb(path: Path) -> Path:
    text = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: {' '.join(map(str, SHAPE))}\nencoding: gzip\n\n"
    path.write_bytes(text.encode() + pack_zeros(b"", int(np.prod(SHAPE)), 16 + zlib.MAX_WBITS))
    return path


def archive_bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("train_images.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (SHAPE[0], *SHAPE[1:])}
        )
        for _ in range(SHAPE[0]):
            file.write(bytes(SHAPE[1] * SHAPE[2]))
    return path


def dicom_bomb(path: Path) -> Path:
    """A deflated X-ray of 8,193 x 8,192 pixels."""
    made = dataset(noise(4, 6).astype(np.uint16))
    made.Rows, made.Columns = 8193, 8192
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    plain = save(made, path.with_suffix(".plain")).read_bytes()
    path.with_suffix(".plain").unlink()
    start = 144 + int.from_bytes(plain[140:144], "little")
    inner = zlib.decompressobj(-zlib.MAX_WBITS).decompress(plain[start:])
    length = 8193 * 8192 * 2
    head = inner[: inner.rindex(b"\xe0\x7f\x10\x00")] + b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<I", length)
    path.write_bytes(plain[:start] + pack_zeros(head, length, -zlib.MAX_WBITS))
    return path


BOMBS: dict[str, Callable[[Path], Path]] = {
    "bomb.nii.gz": nifti_bomb,
    "bomb.mha": metaimage_bomb,
    "bomb.nrrd": nrrd_bomb,
    "bomb.npz": archive_bomb,
    "bomb.dcm": dicom_bomb,
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_image_that_is_compressed_too_much_is_refused_before_it_is_unpacked(tmp_path: Path, name: str) -> None:
    path = BOMBS[name](tmp_path / name)
    assert path.stat().st_size < MIN_RATIO_VOXELS // 200
    reader = find_reader(path)
    assert reader is not None
    with traced_memory() as peak:
        assert [file.reason for file in inspect_file(reader.inspect, path).rejected] == ["compression-ratio"]
        with pytest.raises(ReadError, match=r"\[compression-ratio\]"):
            read_volume(f"{path}#train/0" if name.endswith(".npz") else path)
    assert peak[0] < MIN_RATIO_VOXELS


def sparse_nifti(path: Path, shape: tuple[int, int, int], dtype: type = np.uint8) -> Path:
    """An uncompressed file of zeros and one other voxel, which takes no space on the disk."""
    header = nibabel.Nifti1Image(np.zeros((2, 2, 2), dtype), np.eye(4)).header
    header.set_data_shape(shape)
    header["vox_offset"] = 352
    with path.open("wb") as file:
        file.write(header.binaryblock + bytes(4) + b"\1")
        file.truncate(352 + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return path


def test_a_nifti_is_inspected_in_constant_memory_and_read_with_one_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nifti, "CHUNK_BYTES", 1 << 18)
    path, n_voxels = sparse_nifti(tmp_path / "a.nii", (128, 128, 256), np.int16), 128 * 128 * 256
    reader = nifti.NiftiReader()
    peaks: list[int] = []
    for read in (reader.inspect, reader.read, reader.read_mask):
        with traced_memory() as peak:
            read(path)
        peaks += peak
    assert peaks[0] < 2 << 20
    assert peaks[1] < 4 * n_voxels + (2 << 20)
    assert peaks[2] < n_voxels + (2 << 20)


def test_a_metaimage_is_inspected_as_stored_and_read_with_one_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    monkeypatch.setattr(itk, "CHUNK_BYTES", 1 << 18)
    array = np.zeros((128, 128, 64), np.int16)
    array[0, 0, 0] = 1
    sitk.WriteImage(sitk.GetImageFromArray(array), tmp_path / "a.mha")
    reader = itk.ItkReader()
    peaks: list[int] = []
    for read in (reader.inspect, reader.read):  # tracemalloc does not count the memory of SimpleITK
        with traced_memory() as peak:
            read(tmp_path / "a.mha")
        peaks += peak
    assert peaks[0] < 2 << 20
    assert peaks[1] < 4 * array.size + (2 << 20)


def test_a_mask_may_be_compressed_more_than_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MIN_RATIO_VOXELS", 1000)
    mask = np.zeros((128, 128, 64), np.uint8)
    mask[20:30, 20:30, 20:30] = 1
    path = write_nifti(tmp_path / "a.nii.gz", mask)
    assert mask.nbytes > 200 * path.stat().st_size
    np.testing.assert_array_equal(read_mask(path).array[0], mask)
    with pytest.raises(ReadError, match=r"\[compression-ratio\]"):
        read_volume(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.npy", "a.npz", "a.mha", "a.png"])
def test_an_image_that_does_not_fit_into_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    if name.startswith("a.nii"):
        write_nifti(path, noise(16, 16, 16))
    elif name.startswith("a.np"):
        (np.save if name == "a.npy" else np.savez)(
            path, **{"arr" if name == "a.npy" else "train_images": noise(16, 16, 16)}
        )
    elif name == "a.mha":
        sitk = pytest.importorskip("SimpleITK")
        sitk.WriteImage(sitk.GetImageFromArray(noise(16, 16, 16)), path)
    else:
        Image.fromarray(noise(64, 64).astype(np.uint8)).save(path)
    item = f"{path}#train/0" if name == "a.npz" else path
    read_volume(item)
    monkeypatch.setattr(base, "MIN_CHECKED_BYTES", 1 << 10)
    monkeypatch.setattr(base, "available_memory", lambda: 1 << 10)
    path.touch()  # an archive is cached until it changes
    with pytest.raises(ReadError, match=r"\[too-much-memory\]"):
        read_volume(item)
