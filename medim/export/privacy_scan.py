"""Scan files for absolute paths, user names and host names."""

from __future__ import annotations

import contextlib
import getpass
import io
import re
import socket
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ABSOLUTE_PATH = re.compile(
    rb"(?:^|[^A-Za-z0-9_.:/~-])(/(?:home|root|Users|tmp|var|mnt|media|data|opt|usr|srv|work|workspace|scratch|private|etc|nix|proc)/[^\s\"'<>]{1,80})"
    rb"|([A-Za-z]:\\{1,2}(?:Users|Windows|Temp|home|data)\\{1,2}[^\s\"'<>]{1,80})"
    rb"|(\\\\[A-Za-z0-9_.-]+\\[^\s\"'<>]{1,80})"
    rb"|(file://[^\s\"'<>]{1,80})"
)
COMMON_NAMES = frozenset(
    ("admin", "build", "debian", "docker", "jovyan", "localdomain", "localhost", "nobody", "root", "runner", "ubuntu")
) | {"user", "users"}
MIN_NAME_LENGTH = 4  # shorter names occur by chance in most texts


def identifying_strings(private_folders: Iterable[Path] = ()) -> set[str]:
    """Collect strings that a package must not contain: user and host names, and absolute folder paths.

    Args:
        private_folders: further folders, such as those of the run and of the package.
    """
    words = {socket.gethostname(), socket.gethostname().split(".")[0]}
    paths = [Path.cwd(), Path(tempfile.gettempdir()), *private_folders]
    with contextlib.suppress(KeyError, OSError):  # the user of a container may have no name
        words.add(getpass.getuser())
    with contextlib.suppress(RuntimeError):  # or no home folder
        words.add(Path.home().name)
        paths.append(Path.home())
    folders = {str(Path(path).resolve()) for path in paths}
    folders = {folder for folder in folders if folder.count("/") > 1 or "\\" in folder}
    return {word for word in words if len(word) >= MIN_NAME_LENGTH and word.lower() not in COMMON_NAMES} | folders


def find_identifying_strings(text: bytes, words: Iterable[str], *, own_text: str = "") -> list[str]:
    """Find absolute paths and identifying strings in the bytes of a file.

    Args:
        text: bytes of a file, or the part of them that can contain text.
        words: strings of `identifying_strings`; only whole words match.
        own_text: text of medim itself; its words are not reported.

    Returns:
        Sorted unique findings.
    """
    paths = (next(filter(None, match.groups())) for match in ABSOLUTE_PATH.finditer(text))
    findings = [path.decode("utf-8", "replace") for path in paths]
    vocabulary = set(re.findall(r"[\w-]+", own_text))
    for word in sorted(set(words) - vocabulary):
        if re.search(rb"(?<![A-Za-z0-9])" + re.escape(word.encode()) + rb"(?![A-Za-z0-9])", text):
            findings.append(word)
    return sorted(set(findings))


def text_parts(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Extract the parts of a file that can contain text: the header of weights, and the members of archives.

    Yields:
        Name and bytes of each part.
    """
    if name.endswith(".safetensors"):
        yield f"{name} (header)", data[8 : 8 + int.from_bytes(data[:8], "little")]
    elif name.endswith(".pt"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                if re.fullmatch(r"archive/data/\d+", member.filename):  # values of a tensor
                    continue
                yield f"{name}/{member.filename}", member.filename.encode() + b"\n" + archive.read(member)
    else:
        yield name, data
