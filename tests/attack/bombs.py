"""Small files that unpack to much, and headers that claim much."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from tests.attack.case import EXIT_CODE, Case, Finding, Outcome, copy_parts, expect_refusal, run_command
from tests.data.readers.test_bombs import pack_zeros
from tests.data.synthetic import noise, save, write_nifti, xray

SHAPE = (1024, 512, 1024)
INDEX = ("index", "source", "--jobs", "1", "--out", "OUT", "--modality")
PREDICT = ("predict", "pkg", "source", "--out", "OUT")
PREDICT_3D = ("predict", "pkgseg", "source", "--out", "OUT")


def _write_nifti_bomb(path: Path) -> None:
    header = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).header
    header.set_data_shape(SHAPE)
    header["vox_offset"] = 352
    path.write_bytes(pack_zeros(header.binaryblock + bytes(4) + b"\1", int(np.prod(SHAPE)), 16 + zlib.MAX_WBITS))


def _write_sparse_nifti(path: Path) -> None:
    header = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).header
    header.set_data_shape((4096, 4096, 2500))
    header["vox_offset"] = 352
    with path.open("wb") as file:
        file.write(header.binaryblock + bytes(4) + b"\1")
        file.truncate(352 + 4096 * 4096 * 2500)


def _write_metaimage_bomb(path: Path) -> None:
    text = "ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nElementSpacing = 1 1 1\n"
    text += f"DimSize = {' '.join(map(str, SHAPE))}\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    path.write_bytes(text.encode() + pack_zeros(b"\1", int(np.prod(SHAPE))))


def _write_nrrd_bomb(path: Path) -> None:
    text = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: {' '.join(map(str, SHAPE))}\nencoding: gzip\n\n"
    path.write_bytes(text.encode() + pack_zeros(b"\1", int(np.prod(SHAPE)), 16 + zlib.MAX_WBITS))


def _write_archive_bomb(path: Path, *, n_images: int, side: int) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("train_images.npy", "w", force_zip64=True) as file,
    ):
        shape = (n_images, side, side)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        block = bytes(1 << 24)
        rest = n_images * side * side
        while rest:
            rest -= file.write(block[: min(rest, len(block))])


def _write_dicom_bomb(path: Path, *, side: int = 20_000, private_bytes: int = 0) -> None:
    """A deflated X-ray, or one with a large private element."""
    made = xray(noise(28, 28))
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    if not private_bytes:
        made.Rows = made.Columns = side
    plain_path = path.with_suffix(".plain")
    plain = save(made, plain_path).read_bytes()
    plain_path.unlink()
    start = 144 + int.from_bytes(plain[140:144], "little")
    inner = zlib.decompressobj(-zlib.MAX_WBITS).decompress(plain[start:])
    tag = b"\x11\0\x10\x10OB\0\0" if private_bytes else b"\xe0\x7f\x10\x00OW\0\0"
    length = private_bytes or side * side * 2
    place = (
        inner.index(b"\x18\0\x64\x11") if private_bytes and b"\x18\0\x64\x11" in inner else inner.rindex(b"\xe0\x7f")
    )
    head = inner[:place] + tag + struct.pack("<I", length)
    path.write_bytes(plain[:start] + pack_zeros(head, length, -zlib.MAX_WBITS))


def _write_png_bomb(path: Path, *, side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    _write_png(path, [(b"IHDR", header), (b"IDAT", pack_zeros(b"", side * (side + 1)))])


def _write_png_text_bomb(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(28, 28).astype(np.uint8)).save(buffer, "png")
    text = b"Comment\0\0" + pack_zeros(b"", 1 << 30)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    data = buffer.getvalue()
    path.write_bytes(data[:33] + chunk + data[33:])


def _write_png(path: Path, chunks: list[tuple[bytes, bytes]]) -> None:
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in [*chunks, (b"IEND", b"")]:
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(data)


def _write_lying_npy(path: Path, *, shape: tuple[int, ...], descr: str = "|u1", n_bytes: int = 100) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + n_bytes)


def _write_tiff_bomb(path: Path) -> None:
    """A TIFF of 30,000 x 30,000 pixels in one deflated strip."""
    side = 30_000
    strip = pack_zeros(b"", side * side)
    tags = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8 + 2 + 12 * 8 + 4)]
    tags += [(278, 4, side), (279, 4, len(strip))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + strip)


def _write_lying_bmp(path: Path) -> None:
    head = (
        b"BM" + struct.pack("<IHHI", 1078, 0, 0, 1078) + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 8, *[0] * 6)
    )
    path.write_bytes(head + bytes(2000))


def _write_lying_jpeg(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(28, 28).astype(np.uint8)).save(buffer, "jpeg")
    data = bytearray(buffer.getvalue())
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", 65_000, 65_000)
    path.write_bytes(data)


def _write_lying_nifti(path: Path) -> None:
    write_nifti(path, noise(4, 5, 6))
    data = bytearray(path.read_bytes())
    data[40:56] = struct.pack("<8h", 3, 32_767, 32_767, 32_767, 1, 1, 1, 1)
    path.write_bytes(data)


def _write_json(path: Path, *, labels: dict[str, str]) -> None:
    write_nifti(path.parent / "imagesTr/a.nii.gz", noise(4, 5, 6))
    write_nifti(path.parent / "labelsTr/a.nii.gz", (noise(4, 5, 6) % 2).astype(np.uint8))
    pair = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    path.write_text(json.dumps({"labels": labels, "training": [pair]}))


_Bomb = tuple[str, Callable[[Path], None], tuple[str, ...]]
_BOMBS: list[_Bomb] = [
    ("bomb.nii.gz", _write_nifti_bomb, (*INDEX, "mri")),
    ("bomb.nii.gz", _write_nifti_bomb, PREDICT_3D),
    ("sparse.nii", _write_sparse_nifti, (*INDEX, "mri")),
    ("sparse.nii", _write_sparse_nifti, PREDICT_3D),
    ("lying.nii", _write_lying_nifti, (*INDEX, "mri")),
    ("bomb.mha", _write_metaimage_bomb, (*INDEX, "mri")),
    ("bomb.mha", _write_metaimage_bomb, PREDICT_3D),
    ("bomb.nrrd", _write_nrrd_bomb, (*INDEX, "mri")),
    ("bomb.nrrd", _write_nrrd_bomb, PREDICT_3D),
    ("images.npz", partial(_write_archive_bomb, n_images=1_400_000, side=8), (*INDEX, "xray")),
    ("images.npz", partial(_write_archive_bomb, n_images=10, side=20_000), (*INDEX, "xray")),
    ("images.npz", partial(_write_archive_bomb, n_images=10, side=20_000), PREDICT),
    ("bomb.dcm", _write_dicom_bomb, (*INDEX, "xray")),
    ("bomb.dcm", _write_dicom_bomb, PREDICT),
    ("bomb.dcm", _write_dicom_bomb, (*PREDICT, "--format", "dicom")),
    ("private.dcm", partial(_write_dicom_bomb, private_bytes=1 << 30), (*INDEX, "xray")),
    ("private.dcm", partial(_write_dicom_bomb, private_bytes=1 << 30), PREDICT),
    ("bomb.png", partial(_write_png_bomb, side=30_000), (*INDEX, "xray")),
    ("bomb.png", partial(_write_png_bomb, side=12_000), PREDICT),
    ("text.png", _write_png_text_bomb, (*INDEX, "xray")),
    ("lying.npy", partial(_write_lying_npy, shape=(100_000, 100_000)), (*INDEX, "xray")),
    ("sparse.npy", partial(_write_lying_npy, shape=(200_000, 200_000), n_bytes=40 * 10**9), (*INDEX, "xray")),
    ("object.npy", partial(_write_lying_npy, shape=(10,), descr="|O"), (*INDEX, "xray")),
    ("bomb.tif", _write_tiff_bomb, (*INDEX, "xray")),
    ("lying.bmp", _write_lying_bmp, (*INDEX, "xray")),
    ("lying.jpg", _write_lying_jpeg, (*INDEX, "xray")),
    ("dataset.json", partial(_write_json, labels={"0": "b", "99999999": "x"}), (*INDEX, "mri")),
    ("dataset.json", partial(_write_json, labels={str(n): f"c{n}" for n in range(300_000)}), (*INDEX, "mri")),
]


def list_bomb_cases(base: Path, _: int) -> list[Case]:
    """List files that unpack to much, each with a command, and two good pictures beside them for `predict`."""
    return [
        Case(
            name=f"{name}: {' '.join(command[:2])}",
            kind=command[0],
            prepare=partial(_prepare, base, name, write, command),
            act=partial(run_command, *command),
            check=_expect_answers if command[0] == "predict" else _expect_rejection,
        )
        for name, write, command in _BOMBS
        if command[0] != "predict" or (base / command[1]).is_dir()
    ]


def _prepare(base: Path, name: str, write: Callable[[Path], None], command: tuple[str, ...], folder: Path) -> None:
    (folder / "source").mkdir()
    write(folder / "source" / name)
    if command[0] == "predict":
        copy_parts(base, folder, [command[1]])
        copy_parts(base, folder / "source", ["xray.dcm"] if command[1] == "pkg" else ["scan.nii.gz"])


def _expect_rejection(folder: Path, outcome: Outcome) -> Finding | None:
    if any((folder / "source").glob("*.json")) or any((folder / "source").glob("text.png")):
        return None  # either end is right
    return expect_refusal(1, 4)(folder, outcome)


def _expect_answers(folder: Path, outcome: Outcome) -> Finding | None:
    if outcome.exit_code != 0 or not (folder / "OUT/predictions.csv").is_file():
        return Finding(EXIT_CODE, f"{outcome.exit_code}, no answer for the good image: {outcome.output[-160:]}")
    return None
