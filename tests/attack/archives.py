"""Hostile archives of public data sets: nothing is written outside the folder, and all or nothing inside."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.attack.case import EXIT_CODE, OTHER, Case, Finding, Outcome
from tests.attack.damage import draw_damage

OUTSIDE = "outside"  # file that an escape would write, beside the folder of the case
_NAMES = (
    *(f"../{OUTSIDE}", f"../../{OUTSIDE}", f"a/../../{OUTSIDE}", f"/tmp/{OUTSIDE}", f"..\\{OUTSIDE}", f"C:\\{OUTSIDE}"),
    *("", ".", "..", "/", "a" * 300, "a/" * 200 + "b"),
)


def _write_tar(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, data in entries:
            info.size = info.size or len(data)
            archive.addfile(info, io.BytesIO(data + bytes(max(0, info.size - len(data)))))


def _build_entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _write_tar_name(path: Path, *, name: str) -> None:
    _write_tar(path, [(_build_entry("good"), b"x"), (_build_entry(name), b"x")])


def _write_zip_name(path: Path, *, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good", b"x")
        info = zipfile.ZipInfo("name")
        info.filename = name
        archive.writestr(info, b"x")


def _write_tar_link(path: Path, *, kind: bytes, target: str) -> None:
    link = _build_entry("link", kind, target)
    through = _build_entry(f"link/{OUTSIDE}")
    _write_tar(path, [(_build_entry("good"), b"x"), (link, b""), (through, b"x")])


def _write_zip_link(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "..")
        archive.writestr(f"link/{OUTSIDE}", b"x")


def _write_pax(path: Path) -> None:
    info = _build_entry("harmless")
    info.pax_headers = {"path": f"../{OUTSIDE}"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO())


def _write_lying_size(path: Path) -> None:
    _write_tar(path, [(_build_entry("good"), b"x")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"77777777777\0"
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)


def _write_repeated(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good", b"x")
        archive.writestr("good", b"y")


def _write_overlapping(path: Path) -> None:
    """Two entries of a zip that share their bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"x" * 1000)
        archive.writestr("b", b"x" * 1000)
    data = path.read_bytes()
    directory = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", directory + 4)
    path.write_bytes(data[: second + 42] + bytes(4) + data[second + 46 :])


def _write_bomb(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("zeros", "w", force_zip64=True) as file,
    ):
        for _ in range(100):
            file.write(bytes(1 << 24))


def _write_many(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(2000):
            archive.writestr(f"{number}/" * 3 + "x", b"")


def _write_encrypted(path: Path) -> None:
    _write_zip_name(path, name="b")
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + place] |= 1
    path.write_bytes(data)


def _write_packed(path: Path, *, pack: Callable[[bytes], bytes], share: float) -> None:
    _write_tar(path, [(_build_entry("good"), random.Random(0).randbytes(5000))])
    data = pack(path.read_bytes())
    path.write_bytes(data[: int(len(data) * share)])


def _write_damaged_zip(path: Path, *, seed: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b", random.Random(seed).randbytes(2000))
    path.write_bytes(draw_damage(path.read_bytes(), random.Random(seed)).data)


_ARCHIVES: dict[str, Callable[[Path], None]] = {
    **{f"tar, name {name[:20]!r}": partial(_write_tar_name, name=name) for name in _NAMES[:10] if name},
    **{f"zip, name {name[:20]!r}": partial(_write_zip_name, name=name) for name in _NAMES if name},
    **{
        f"tar, {kind_name} to {target}": partial(_write_tar_link, kind=kind, target=target)
        for kind_name, kind in (("symbolic link", tarfile.SYMTYPE), ("hard link", tarfile.LNKTYPE))
        for target in ("..", "/etc/passwd", "good")
    },
    "tar, device": partial(_write_tar_link, kind=tarfile.CHRTYPE, target=""),
    "tar, pipe": partial(_write_tar_link, kind=tarfile.FIFOTYPE, target=""),
    "zip, link": _write_zip_link,
    "tar, path in a PAX header": _write_pax,
    "tar, size of 8 GB": _write_lying_size,
    "zip, name twice": _write_repeated,
    "zip, overlapping entries": _write_overlapping,
    "zip, bomb": _write_bomb,
    "zip, 6,000 folders": _write_many,
    "zip, encrypted": _write_encrypted,
    "gzip, cut": partial(_write_packed, pack=gzip.compress, share=0.7),
    "bzip2, cut": partial(_write_packed, pack=bz2.compress, share=0.7),
    "xz, cut": partial(_write_packed, pack=lzma.compress, share=0.7),
    **{f"zip, damage {seed}": partial(_write_damaged_zip, seed=seed) for seed in range(6)},
}


def list_archive_cases(_: Path, __: int) -> list[Case]:
    """List archives that `unpack_archive` extracts or refuses."""
    return [
        Case(name=name, kind=name.split(",")[0], prepare=partial(_prepare, write), act=_unpack, check=_check)
        for name, write in _ARCHIVES.items()
    ]


def _prepare(write: Callable[[Path], None], folder: Path) -> None:
    (folder / "place").mkdir()
    write(folder / "place/archive")


def _unpack() -> int:
    from medim.data.public.archives import unpack_archive
    from medim.types import UserError

    try:
        unpack_archive(Path("place/archive"), Path("place/unpacked"))
    except UserError as error:
        print(error)
        return error.exit_code
    return 0


def _check(folder: Path, outcome: Outcome) -> Finding | None:
    files = [path for path in folder.rglob("*") if not path.is_relative_to(folder / "place/unpacked")]
    others = [path.name for path in files if path not in (folder / "place", folder / "place/archive")]
    if others or (folder.parent / OUTSIDE).exists() or Path("/tmp", OUTSIDE).exists():
        return Finding(OTHER, f"outside the folder: {others[:3]}")
    inside = [
        path for path in (folder / "place").rglob("unpacked/**/*") if path.is_symlink() or not os.access(path, os.R_OK)
    ]
    if inside:
        return Finding(OTHER, f"a link or a device: {inside[0].name}")
    if outcome.exit_code and (folder / "place/unpacked").exists():
        return Finding(EXIT_CODE, "a part of an archive was left")
    return None
