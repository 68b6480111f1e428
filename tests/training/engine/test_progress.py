"""Progress of a training on a terminal and in a log."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from medim.console import progress as console_progress
from medim.console.progress import format_duration, show_progress, titled_bars
from medim.objectives import Term
from medim.training.engine import progress
from medim.training.engine.progress import BarProgress, LineProgress, ValidationStatus, choose_progress, list_losses

STATUS = ValidationStatus(10, {"local_dim": 6.5, "dice": 0.71}, "verdict at step 10: weak")
OUTPUTS = {"local_dim": Term(torch.tensor(7.0), 7.25), "vae": Term(torch.tensor(3.0), None), "gradient_norms": {}}


def make_trainer(step: int) -> Any:
    return SimpleNamespace(global_step=step, max_steps=40)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> StringIO:
    """A terminal of 100 columns that records its text."""
    caplog.set_level(logging.INFO, "medim")
    text = StringIO()
    console = Console(file=text, force_terminal=True, width=100, height=30, color_system=None)
    for module in (console_progress, progress):
        monkeypatch.setattr(module, "stderr_console", console)
    return text


def test_a_bar_has_step_rate_time_left_losses_beside_chance_and_the_verdict(screen: StringIO) -> None:
    bar = choose_progress(lambda: STATUS, after_seconds=90)
    assert isinstance(bar, BarProgress)
    bar.on_train_start(make_trainer(0), None)  # type: ignore[arg-type]
    bar._every_seconds = 0
    bar.on_train_batch_end(make_trainer(13), None, OUTPUTS, None, 0)  # type: ignore[arg-type]
    bar.on_train_end(make_trainer(13), None)  # type: ignore[arg-type]
    text = screen.getvalue()
    assert re.search(r"step 13 of 40, [\d.]+ s(teps/s|/step), \d+ s left \(90 s of it after the last step\)", text)
    assert re.search(r"now +chance +held out \(step 10\)", text)
    assert re.search(r"local_dim +7 +7\.25 +6\.5", text)
    assert re.search(r"vae +3 +- +-", text)
    assert re.search(r"dice +- +- +0\.71", text)
    assert "verdict at step 10: weak" in text


def test_the_log_has_the_same_numbers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medim")
    lines = choose_progress(lambda: STATUS)
    assert isinstance(lines, LineProgress)
    lines.on_train_batch_end(make_trainer(40), None, OUTPUTS, None, 0)  # type: ignore[arg-type]
    assert "step 40 of 40" in caplog.text
    assert "0 s left, local_dim 7 (chance 7.25), vae 3; held out at step 10: local_dim 6.5, dice 0.71" in caplog.text
    assert caplog.text.rstrip().endswith("; verdict at step 10: weak")


def test_the_only_loss_of_a_fine_tuning_is_a_loss() -> None:
    assert list_losses({"loss": torch.tensor(0.5)}) == {"loss": (0.5, None)}
    assert list_losses(None) == {}


def test_bars_of_a_cell_carry_its_title_although_the_log_is_silent(screen: StringIO) -> None:
    logging.getLogger("medim").setLevel(logging.ERROR)
    with titled_bars("cell dim, 10 labels"):
        assert isinstance(choose_progress(), BarProgress)
        update = show_progress("measured")
        update(1, 2)
        update(2, 2)
    assert "cell dim, 10 labels: measured" in screen.getvalue()
    assert isinstance(choose_progress(), LineProgress), "--quiet"


def test_durations_have_two_units() -> None:
    assert [format_duration(s) for s in (0.4, 119.4, 121, 3600, 86400)] == [
        "0 s",
        "119 s",
        "3 min",
        "1 h 0 min",
        "24 h 0 min",
    ]
    assert format_duration(float("inf")) == "-"


@pytest.mark.slow
def test_a_terminal_shows_the_losses_of_a_run(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {}
    for seed, part in enumerate(("train", "val")):
        images = np.random.default_rng(seed).integers(0, 255, (8, 28, 28), np.uint8)
        arrays |= {f"{part}_images": images, f"{part}_labels": np.zeros((8, 1), int)}
    np.savez(tmp_path / "noise.npz", **arrays)
    command = [sys.executable, "-m", "medim", "pretrain", "--data", "noise.npz", "--config", "test-2d-local-dim"]
    command += ["--set", "max_steps=4", "--set", "checkpoint_every_steps=2", "--out", "run", "--device", "cpu"]
    main, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm", "MEDIM_TRACKING": "off"}
    process = subprocess.Popen(command, stderr=terminal, stdout=subprocess.PIPE, cwd=tmp_path, env=environment)
    os.close(terminal)
    pieces = []
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the process has ended
            break
        if not piece:
            break
        pieces.append(piece)
    output = process.communicate(timeout=120)[0]
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(pieces).decode())
    assert process.returncode == 0, text
    assert "step 4 of 4" in text
    assert re.search(r"local_dim +[\d.]+ +[\d.]+ +[\d.]+", text)
    assert "verdict at step 2" in text
    assert "v_num" not in text
    assert b"written to" in output
    assert b"\x1b[?25h" in b"".join(pieces), "the cursor is shown again"
    assert (tmp_path / "run" / "figures" / "views.png").is_file()
