"""Files are whole or absent, whatever happens in between."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from medim.files import (
    _open_unnamed_file,
    file_sha256,
    json_sha256,
    read_json,
    remove_temporary_files,
    write_bytes,
    write_csv,
    write_json,
)
from medim.types import UserError


def test_a_written_file_holds_the_bytes_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file.bin"
    write_bytes(target, b"one")
    write_bytes(target, b"two")
    assert target.read_bytes() == b"two"
    assert os.listdir(target.parent) == ["file.bin"]  # noqa: PTH208


def test_a_written_file_can_be_read_by_others(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_says_so(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "weights.safetensors"
    write_bytes(target, b"old")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync", full), "replace": (Path, "replace", full)}[call])
    with pytest.raises(UserError, match=r"weights\.safetensors.*No space left on device.*--out"):
        write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_an_interruption_leaves_the_old_file_and_goes_on_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_bytes(target, b"old")

    def interrupted(_: int) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_a_file_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"could not be written.*--out"):
        write_bytes(tmp_path / "taken" / "file", b"x")


def test_a_folder_without_permission_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(**_: object) -> NoReturn:  # as root, a read-only folder would be written all the same
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr("medim.files.tempfile.mkstemp", denied)
    with pytest.raises(UserError, match="Permission denied"):
        write_bytes(tmp_path / "file", b"x")


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from medim.files import write_bytes
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "named":
    del os.O_TMPFILE
write_bytes(Path(sys.argv[1]), b"new")
"""


@pytest.mark.parametrize("kind", ["unnamed", "named"])
def test_a_kill_leaves_the_old_file_and_at_most_a_file_that_is_removed_later(kind: str, tmp_path: Path) -> None:
    if kind == "unnamed" and _open_unnamed_file(tmp_path) is None:
        pytest.skip("this file system has no unnamed files")
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "file"
    write_bytes(target, b"old")
    command = [sys.executable, "-c", KILLED_WRITER, str(target), kind]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    assert len(list(target.parent.iterdir())) == (1 if kind == "unnamed" else 2)
    remove_temporary_files(tmp_path)
    assert list(target.parent.iterdir()) == [target]


def test_the_names_of_temporary_files_are_short_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / ("µ" * 120)  # 240 bytes
    write_bytes(target, b"one")
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    write_bytes(target, b"two")
    assert [(path, path.read_bytes()) for path in tmp_path.iterdir()] == [(target, b"two")]


def test_json_keeps_order_and_letters_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "µ", "none": None})
    assert list(read_json(tmp_path / "a.json").items()) == [("b", 1), ("a", "µ"), ("none", None)]
    assert "µ" in (tmp_path / "a.json").read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": math.nan})
    assert read_json(tmp_path / "a.json")["b"] == 1


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "found none"), (b"{", "expected JSON"), (b"[1]", "list"), (b"\xff\xfe", "JSON")]
)
def test_a_file_that_is_no_json_object_is_refused_with_its_reason(
    content: bytes | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "spec.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"spec\.json.*{reason}"):
        read_json(path)


def test_csv_quotes_what_needs_it_and_leaves_none_empty(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ("a", "b"), [(1, None), ('say "x, y"', 0.5)])
    assert (tmp_path / "t.csv").read_bytes() == b'a,b\n1,\n"say ""x, y""",0.5\n'


def test_a_files_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"medim" * 100_000)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"medim" * 100_000).hexdigest()


def test_the_digest_of_an_object_ignores_key_order_and_sees_every_value() -> None:
    content = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert json_sha256(content) == json_sha256(json.loads('{"b": {"d": null, "c": [1, 2]}, "a": 1}'))
    assert json_sha256(content) != json_sha256({"a": 1, "b": {"c": [2, 1], "d": None}})
