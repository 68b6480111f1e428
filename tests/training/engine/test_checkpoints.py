from __future__ import annotations

import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medim.training.engine import checkpoints
from medim.training.engine.checkpoints import (
    CheckpointCallback,
    ChecksumCheckpointIO,
    append_digest,
    find_newest_checkpoint,
    list_corrupt_checkpoints,
    strip_digest,
)
from medim.types import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (9, 10):
        ChecksumCheckpointIO().save_checkpoint({"step": step, "weight": torch.ones(2)}, tmp_path / f"step-{step}.ckpt")
    return tmp_path


def test_a_checkpoint_is_what_was_saved_and_torch_alone_reads_it(folder: Path) -> None:
    path, step = find_newest_checkpoint(folder)
    assert path is not None
    assert step == 10
    assert ChecksumCheckpointIO().load_checkpoint(path)["step"] == torch.load(path, weights_only=True)["step"] == 10


def test_every_single_flipped_bit_is_found() -> None:
    data = append_digest(bytes(range(256)))
    assert strip_digest(data) == bytes(range(256))
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            assert strip_digest(bytes(changed)) is None


@pytest.mark.parametrize("length", [0, 1, 71, 72, 300])
def test_a_cut_checkpoint_is_found(length: int) -> None:
    assert strip_digest(append_digest(bytes(300))[:length]) is None


def test_a_flipped_byte_between_the_parts_of_the_archive_sets_it_aside(folder: Path) -> None:
    """Where the archive's own sums do not look: in the padding before a tensor's bytes."""
    path = folder / "step-10.ckpt"
    data = bytearray(path.read_bytes())
    data[data.index(b"ZZZZ")] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="SHA-256 does not match"):
        ChecksumCheckpointIO().load_checkpoint(path)
    assert find_newest_checkpoint(folder) == (folder / "step-9.ckpt", 9)
    assert list_corrupt_checkpoints(folder) == ["step-10.ckpt"]
    assert (folder / "step-10.ckpt.damaged").read_bytes() == data


def test_where_all_are_damaged_the_run_begins_anew_and_all_are_named(folder: Path) -> None:
    for path in folder.glob("*.ckpt"):
        path.write_bytes(b"")
    assert find_newest_checkpoint(folder) == (None, 0)
    assert list_corrupt_checkpoints(folder) == ["step-10.ckpt", "step-9.ckpt"]


def test_what_a_kill_left_half_written_is_removed(folder: Path) -> None:
    shutil.copy(folder / "step-9.ckpt", folder / ".step-11.ckpt.abcd")
    assert find_newest_checkpoint(folder)[1] == 10
    assert sorted(path.name for path in folder.iterdir()) == ["step-10.ckpt", "step-9.ckpt"]


def test_a_run_goes_on_in_more_processes_than_saved_it() -> None:
    found = CheckpointCallback(Path("none"), every=1)
    saved = {"random": [{"state": 0}], "ended": False, "resumed_from_steps": [], "global_step": 3}
    trainer: Any = SimpleNamespace(global_rank=1)
    found.on_load_checkpoint(trainer, None, saved)  # type: ignore[arg-type]
    assert found.resumed_from_steps == [3]


def test_all_generators_continue_where_they_were(tmp_path: Path) -> None:
    old: Any = np.random.mtrand._rand  # type: ignore[attr-defined]  # numpy's global generator

    def draw() -> tuple[float, ...]:
        return float(torch.rand(1)), float(old.random_sample()), float(old.standard_normal()), random.random()

    old.standard_normal()  # the second of a pair of normal numbers is part of the state
    ChecksumCheckpointIO().save_checkpoint({"random": checkpoints._get_random_state()}, tmp_path / "step-1.ckpt")
    drawn = draw()
    draw()
    checkpoints._set_random_state(ChecksumCheckpointIO().load_checkpoint(tmp_path / "step-1.ckpt")["random"])
    assert draw() == drawn
