"""Hostile names of files, and entries of folders that are no plain files."""

from __future__ import annotations

import os
import socket
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.attack.case import EXIT_CODE, OTHER, Case, Finding, Outcome, copy_parts, run_command
from tests.data.synthetic import noise

INDEX = ("index", "source", "--modality", "xray", "--jobs", "1", "--keep-names", "--out", "OUT")
PREDICT = ("predict", "pkg", "source", "--keep-names", "--out", "OUT")
_NAMES: dict[str, bytes] = {
    "markup of rich": b"x[/]y.png",
    "a style of rich": b"scan[red]1[/red].png",
    "ESC": b"scan\x1b[31m.png",
    "a title of a terminal": b"scan\x1b]0;x\x07.png",
    "right-to-left override": "scan\u202egnp.png".encode(),
    "a line feed": b"scan\n1.png",
    "a carriage return": b"scan\r1.png",
    "a tabulator": b"scan\t1.png",
    "a formula": b"=cmd()|x.png",
    "a minus": b"-rf.png",
    "an option": b"--out.png",
    "HTML": b"<script>alert(1)<%2Fscript>.png",
    "quotes": b"a\"b'c`d.png",
    "a dollar": b"$(touch x).png",
    "not UTF-8": b"scan\xff\xfe.png",
    "a hash": b"a#1.png",
    "a percent sign": b"%s%n%d{0}.png",
    "a backslash": b"a\\b.png",
    "a comma": b"a,b;c.png",
    "255 characters": b"x" * 251 + b".png",
    "only a suffix": b".png",
    "a blank": b" .png",
    "a null byte in text": b"a%00b.png",
    "combining characters": ("a" + "\u0301" * 60 + ".png").encode(),
}


def list_name_cases(base: Path, _: int) -> list[Case]:
    """List hostile names and other entries, each with `index` and for some `predict`."""
    cases = []
    for number, (name, raw) in enumerate(_NAMES.items()):
        commands = [INDEX, PREDICT] if number % 2 == 0 or b"[" in raw else [INDEX]
        for command in commands:
            cases.append(
                Case(
                    name=f"{name}: {command[0]}",
                    kind=f"name, {command[0]}",
                    prepare=partial(_prepare, base, partial(_write_picture, raw), command),
                    act=partial(run_command, *command),
                    check=_check,
                )
            )
    for name, write in _ENTRIES.items():
        cases.append(
            Case(
                name=f"{name}: {INDEX[0]}",
                kind="entry",
                prepare=partial(_prepare, base, write, INDEX),
                act=partial(run_command, *INDEX),
                check=_check,
            )
        )
    return cases


def _prepare(base: Path, write: Callable[[Path], object], command: tuple[str, ...], folder: Path) -> None:
    if command[0] == "predict":
        copy_parts(base, folder, ["pkg"])
    (folder / "source").mkdir()
    _write_picture(b"good.png", folder / "source")
    write(folder / "source")


def _write_picture(raw: bytes, folder: Path, *, seed: int = 0) -> None:
    path = os.path.join(os.fsencode(folder), raw)  # noqa: PTH118  # a name that may not be UTF-8
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
    with open(path, "wb") as file:  # noqa: PTH123
        Image.fromarray(noise(28, 28, seed=seed + len(raw)).astype(np.uint8)).save(file, "png")


def _write_long_path(folder: Path) -> None:
    """A picture below a path of more than 1,000 characters."""
    for _ in range(5):
        folder = folder / ("d" * 200)
    folder.mkdir(parents=True)
    _write_picture(b"deep.png", folder)


def _write_socket(folder: Path) -> None:
    earlier = Path.cwd()
    os.chdir(folder)  # the name of a socket has at most 108 characters
    try:
        socket.socket(socket.AF_UNIX).bind("socket.png")
    finally:
        os.chdir(earlier)


def _write_unreadable(folder: Path) -> None:
    _write_picture(b"unreadable.png", folder)
    (folder / "unreadable.png").chmod(0)


_ENTRIES: dict[str, Callable[[Path], object]] = {
    "a pipe": lambda folder: os.mkfifo(folder / "pipe.png"),
    "a socket": _write_socket,
    "a link to a device": lambda folder: (folder / "zero.png").symlink_to("/dev/zero"),
    "a link to a random device": lambda folder: (folder / "random.dcm").symlink_to("/dev/urandom"),
    "a link to nothing": lambda folder: (folder / "link.png").symlink_to("nosuch.png"),
    "a link to itself": lambda folder: (folder / "self.png").symlink_to("self.png"),
    "a link out of the source": lambda folder: (folder / "passwd.png").symlink_to("/etc/passwd"),
    "a folder named like an image": lambda folder: (folder / "folder.png").mkdir(),
    "a file without permission": _write_unreadable,
    "a folder without permission": lambda folder: (folder / "closed").mkdir(mode=0),
    "a path of 1,049 characters": _write_long_path,
    "an empty file": lambda folder: (folder / "empty.png").touch(),
    "a picture named as DICOM": lambda folder: _write_picture(b"picture.dcm", folder),
    "a picture named as NIfTI": lambda folder: _write_picture(b"picture.nii.gz", folder),
}


def _check(folder: Path, outcome: Outcome) -> Finding | None:
    if outcome.exit_code != 0:
        return Finding(EXIT_CODE, f"{outcome.exit_code}: {' '.join(outcome.output.split())[-160:]}")
    raw = [c for c in outcome.output if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t\r"]
    if raw:
        return Finding(OTHER, f"control characters are printed: {raw[0]!r}")
    tables = list((folder / "OUT").glob("*.csv"))
    if any(
        line.startswith(("=", "@", "+cmd"))
        for path in tables
        for line in path.read_text("utf-8", "replace").splitlines()
    ):
        return Finding(OTHER, "a formula in a table")
    outside = {path.name for path in folder.iterdir()} - {"source", "OUT", "pkg"}
    return Finding(OTHER, f"files beside the output: {outside}") if outside else None
