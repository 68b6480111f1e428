"""MetaImage and NRRD through SimpleITK."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medim.data.readers import ReadError, read_volume
from medim.data.readers.itk import ItkReader
from tests.data.synthetic import noise


def write(path: Path, *, compress: bool = False) -> np.ndarray[Any, Any]:
    sitk: Any = pytest.importorskip("SimpleITK")
    array = noise(6, 5, 4)  # (k, j, i)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((10.0, 20.0, 30.0))
    sitk.WriteImage(image, str(path), compress)
    return array.transpose(2, 1, 0)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
def test_a_volume_is_turned_from_lps_to_ras(tmp_path: Path, name: str) -> None:
    array = write(tmp_path / name)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.array[0], array[::-1, ::-1])
    assert volume.spacing == (1.0, 2.0, 3.0)
    np.testing.assert_allclose(volume.native_affine @ [1, 1, 1, 1], [-11, -22, 33, 1])
    np.testing.assert_allclose(volume.affine @ [2, 3, 1, 1], [-11, -22, 33, 1])


def test_without_simple_itk_the_message_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.mha")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ReadError, match=r'pip install "\.\[train\]".* \[reader-missing\]'):
        read_volume(tmp_path / "a.mha")


def test_a_truncated_volume_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.nrrd")
    whole = (tmp_path / "a.nrrd").read_bytes()
    (tmp_path / "a.nrrd").write_bytes(whole[: len(whole) // 2])
    assert reason_of(tmp_path / "a.nrrd") == "truncated"
    (tmp_path / "a.nrrd").write_bytes(whole[:40])
    assert reason_of(tmp_path / "a.nrrd") == "unreadable"


def reason_of(path: Path) -> str:
    with pytest.raises(ReadError) as caught:
        read_volume(path)
    return caught.value.reason


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
def test_voxels_of_another_number_than_announced_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    voxels = next((path for path in tmp_path.glob("*.raw")), tmp_path / name)
    whole = voxels.read_bytes()
    if name != "a.nrrd":  # attached NRRD is gzipped by default
        voxels.write_bytes(whole + bytes(20))
        assert reason_of(tmp_path / name) == "length-mismatch"
    voxels.write_bytes(whole[:-20])
    assert reason_of(tmp_path / name) == "truncated"


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
def test_compressed_voxels_with_one_flipped_bit_are_rejected(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, compress=True)
    voxels, start = find_voxels(tmp_path / name)
    whole = voxels.read_bytes()
    expected, reasons = read_volume(tmp_path / name).array, set()
    for position in range(start, len(whole), 5):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        voxels.write_bytes(damaged)
        try:  # some bits of a gzip header, such as the time, do not concern the voxels
            np.testing.assert_array_equal(read_volume(tmp_path / name).array, expected)
        except ReadError as error:
            reasons.add(error.reason)
    assert reasons
    assert reasons <= {"unreadable", "truncated", "length-mismatch"}


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
def test_compressed_voxels_of_another_length_are_rejected(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, compress=True)
    voxels, _ = find_voxels(tmp_path / name)
    whole, header = voxels.read_bytes(), (tmp_path / name).read_bytes()
    for damaged, reason in ((whole[:-2], "truncated"), (whole + b"abc", "length-mismatch")):
        voxels.write_bytes(damaged)
        assert reason_of(tmp_path / name) == reason
    for size, reason in ((b"4 5 5", "length-mismatch"), (b"4 5 7", "truncated")):
        voxels.write_bytes(whole)
        (tmp_path / name).write_bytes(header.replace(b"4 5 6", size))
        assert reason_of(tmp_path / name) == reason


def find_voxels(path: Path) -> tuple[Path, int]:
    """Find the file with the voxels of a volume, and the offset of the first one."""
    detached = [file for file in path.parent.iterdir() if file != path]
    if detached:
        return detached[0], 0
    end_of_header = b"LOCAL\n" if path.suffix == ".mha" else b"\n\n"
    return path, path.read_bytes().index(end_of_header) + len(end_of_header)


def test_the_length_of_voxels_after_skipped_bytes_is_checked(tmp_path: Path) -> None:
    write(tmp_path / "a.mhd")
    voxels, header = (tmp_path / "a.raw"), (tmp_path / "a.mhd").read_text()
    whole = voxels.read_bytes()
    expected = read_volume(tmp_path / "a.mhd").array
    voxels.write_bytes(b"some header" + whole)
    for skip in ("11", "-1"):
        (tmp_path / "a.mhd").write_text(header.replace("ElementDataFile", f"HeaderSize = {skip}\nElementDataFile"))
        np.testing.assert_array_equal(read_volume(tmp_path / "a.mhd").array, expected)
    (tmp_path / "a.mhd").write_text(header.replace("ElementDataFile", "HeaderSize = 15\nElementDataFile"))
    assert reason_of(tmp_path / "a.mhd") == "truncated"
    (tmp_path / "a.mhd").write_text(header.replace("ElementDataFile", "HeaderSize = 3\nElementDataFile"))
    assert reason_of(tmp_path / "a.mhd") == "length-mismatch"


@pytest.mark.parametrize(("name", "field"), [("a.mhd", "ElementDataFile = "), ("a.nhdr", "data file: ")])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("../a.raw", "outside-folder"),
        ("/etc/passwd", "outside-folder"),
        ("..\\a.raw", "outside-folder"),
        ("none.raw", "missing"),
        ("LIST", "several-files"),
        ("a%d.raw 1 3 1", "several-files"),
    ],
)
def test_a_header_sends_nobody_to_another_folder(tmp_path: Path, name: str, field: str, data: str, reason: str) -> None:
    path = tmp_path / "s" / name
    path.parent.mkdir()
    write(path)
    (path.parent / "a.raw").rename(tmp_path / "a.raw")
    path.write_text(path.read_text().replace(f"{field}a.raw", field + data))
    assert reason_of(path) == reason


@pytest.mark.parametrize(
    ("space", "signs", "quality"),
    [
        ("left-posterior-superior", (-1, -1, 1), ()),
        ("right-anterior-superior", (1, 1, 1), ()),
        ("LAS", (-1, 1, 1), ()),
        ("scanner-xyz", (-1, -1, 1), ("no-place",)),
    ],
)
def test_the_space_of_a_nrrd_file_is_followed(
    tmp_path: Path, space: str, signs: tuple[int, ...], quality: tuple[str, ...]
) -> None:
    write(tmp_path / "a.nhdr")
    text = (tmp_path / "a.nhdr").read_text()
    (tmp_path / "a.nhdr").write_text(text.replace("left-posterior-superior", space))
    affine = read_volume(tmp_path / "a.nhdr").native_affine
    np.testing.assert_allclose(
        affine[:3], np.diag([*signs, 1])[:3] @ [[1, 0, 0, 10], [0, 2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]]
    )
    assert ItkReader().inspect(tmp_path / "a.nhdr").images[0].quality == quality


def test_what_a_header_leaves_out_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.mhd")
    lines = (tmp_path / "a.mhd").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("TransformMatrix", "ElementSpacing"))]
    (tmp_path / "a.mhd").write_text("\n".join(kept))
    assert ItkReader().inspect(tmp_path / "a.mhd").images[0].quality == ("no-spacing", "no-place")


def test_vectors_and_series_are_refused(tmp_path: Path) -> None:
    sitk: Any = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.GetImageFromArray(noise(4, 5, 6, 3), isVector=True), str(tmp_path / "v.mha"))
    assert reason_of(tmp_path / "v.mha") == "not-scalar"
    sitk.WriteImage(sitk.GetImageFromArray(noise(3, 4, 5, 6), isVector=False), str(tmp_path / "t.nrrd"))
    assert reason_of(tmp_path / "t.nrrd") == "wrong-dimensions"
