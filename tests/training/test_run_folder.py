"""Folder of a rehearsal: empty at its start, removed at its end, and never left behind in silence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from medim.training.run_folder import open_rehearsal_folder


def test_a_rehearsal_starts_empty_and_leaves_no_folder(tmp_path: Path) -> None:
    for _ in range(2):
        with open_rehearsal_folder(tmp_path) as folder:
            assert list(folder.iterdir()) == []
            (folder / "a").write_text("a")
        assert list(tmp_path.iterdir()) == []
        folder.mkdir()  # of a killed process
        (folder / "b").write_text("b")


def test_an_error_in_a_rehearsal_is_raised_and_removes_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), open_rehearsal_folder(tmp_path):
        raise ValueError("x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, ignore_errors: bool = False, **_: Any) -> None:
        if not ignore_errors:
            raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(OSError, match="Too many open files"), open_rehearsal_folder(tmp_path):
        pass
