from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from medim.data.public import archives
from medim.data.public.archives import unpack_archive
from medim.types import UserError

SYMLINK = 0o120777 << 16


def tar(path: Path, members: dict[str, bytes], *, mode: str = "w", **odd: object) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in odd.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(path: Path, members: dict[str, bytes], *, attributes: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = attributes
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_becomes_the_folder_that_it_holds(mode: str, tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "a", {"./set/a/1.txt": b"1", "set/2.txt": b"2", "._set": b"fork", "set/._2.txt": b"x"}, mode=mode
    )
    unpack_archive(archive, tmp_path / "set")
    assert files(tmp_path / "set") == {"a/1.txt": b"1", "2.txt": b"2"}


def test_a_zip_of_loose_files_becomes_a_folder(tmp_path: Path) -> None:
    unpack_archive(zipped(tmp_path / "a.zip", {"1.dcm": b"1", "LICENSE": b"CC"}), tmp_path / "1.2.3")
    assert files(tmp_path / "1.2.3") == {"1.dcm": b"1", "LICENSE": b"CC"}


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"x": b"x"}).read_bytes()
    unpack_archive(tar(tmp_path / "a.tar", {"set/inner.zip": inner}), tmp_path / "set")
    assert files(tmp_path / "set") == {"inner.zip": inner}


@pytest.mark.parametrize("write", [tar, zipped])
@pytest.mark.parametrize("name", ["../out.txt", "set/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:/out.txt"])
def test_a_name_that_leads_outside_is_refused(write: Callable[..., Path], name: str, tmp_path: Path) -> None:
    archive = write(tmp_path / "a", {"set/fine.txt": b"fine", name: b"evil"})
    with pytest.raises(UserError, match="expected names inside"):
        unpack_archive(archive, tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not (tmp_path.parent / "out.txt").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    archive = tar(tmp_path / "a", {"set/odd": b""}, type=kind, linkname="/etc/passwd")
    with pytest.raises(UserError, match="expected plain files"):
        unpack_archive(archive, tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected plain files"):
        unpack_archive(zipped(tmp_path / "a", {"odd": b"/etc/passwd"}, attributes=SYMLINK), tmp_path / "set")


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a", "w") as archive:
        for content in (b"1", b"2"):
            info = tarfile.TarInfo("set/1.txt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match="each name once"):
        unpack_archive(tmp_path / "a", tmp_path / "set")


@pytest.mark.parametrize("write", [zipped, lambda path, members: tar(path, members, mode="w:gz")])
def test_a_bomb_is_refused(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MIN_BYTE_LIMIT", 1000)
    with pytest.raises(UserError, match="times the archive"):
        unpack_archive(write(tmp_path / "a", {"set/zeros": bytes(1_000_000)}), tmp_path / "set")
    monkeypatch.setattr(archives, "MAX_ARCHIVE_FILES", 2)
    with pytest.raises(UserError, match="at most 2 files"):
        unpack_archive(write(tmp_path / "b", {f"set/{n}": b"" for n in range(3)}), tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("write", [tar, zipped, lambda path, members: tar(path, members, mode="w:gz")])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_cut_archive_is_told_and_leaves_nothing(write: Callable[..., Path], share: float, tmp_path: Path) -> None:
    noise = bytes(n * n % 251 for n in range(50_000))
    whole = write(tmp_path / "a", {"set/1": noise, "set/2": noise}).read_bytes()
    (tmp_path / "a").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="damaged"):
        unpack_archive(tmp_path / "a", tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_changed_byte_of_a_zip_is_told(tmp_path: Path) -> None:
    content = bytearray(zipped(tmp_path / "a", {"1": bytes(n % 251 for n in range(5000))}).read_bytes())
    content[60] ^= 255
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        unpack_archive(tmp_path / "a", tmp_path / "set")
