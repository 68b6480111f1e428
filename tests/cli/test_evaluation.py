from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medim.cli import app
from medim.cli.evaluation import repeat_command
from medim.files import read_json
from medim.models.model import build_encoder
from medim.models.serialization import save_model
from tests.specs import make_spec


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A study of noise with the smallest of encoders."""
    spec = {"kind": "encoder", "modality": "xray", "spatial_dims": 2, "in_channels": 1, "input_shape": [8, 8]}
    spec |= {"encoder": {"name": "unet", "channels": [2, 4]}, "preprocessing": [], "inference": {"mode": "whole"}}
    save_model(tmp_path / "run" / "encoder", "encoder", build_encoder(make_spec(spec)), make_spec(spec))
    arrays = {}
    for part, count in (("train", 14), ("val", 12), ("test", 1)):
        images = np.random.default_rng(count).integers(0, 255, (count, 8, 8), np.uint8)
        arrays |= {f"{part}_images": images, f"{part}_labels": np.arange(count)[:, None] % 2}
    np.savez(tmp_path / "noise.npz", **arrays)
    options = ["--task", "classification", "--data", str(tmp_path / "noise.npz"), "--config", "xray-28"]
    smallest = ["--set", "max_steps=2", "--set", "batch_size=2", "--set", "head={name: classification}"]
    budgets = ["--labelled", "4", "--seeds", "1", "--out", str(tmp_path / "study")]
    return ["study", "--encoder", f"dim={tmp_path / 'run'}", *options, *smallest, *budgets]


def test_a_study_prints_a_line_an_arm_and_budget_and_the_command_that_repeats_it(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["medim", *command, "--max-hours", "0"])
    stopped = CliRunner().invoke(app, [*command, "--max-hours", "0"])
    assert (stopped.exit_code, "2 of 2 cells are left" in stopped.output) == (75, True), stopped.output
    done = CliRunner().invoke(app, [*command, "--resume"])
    assert done.exit_code == 0, done.output
    assert "dim, 4 labels" in done.output
    summary = read_json(tmp_path / "study" / "summary.json")
    pinned = f"eval_steps={summary['eval_steps']}"
    assert str(tmp_path) not in summary["command_line"]
    expected = [word.replace(f"{tmp_path}/", "") for word in command]
    assert shlex.split(summary["command_line"]) == ["medim", *expected, "--set", pinned]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--lr-multipliers", "fast"], 2, "two or more finite multipliers"),
        (["--lr-multipliers", "1"], 2, "two or more finite multipliers"),
        (["--lr-multipliers", "nan,1"], 2, "two or more finite multipliers"),
        (["--lr-multipliers", "1,inf"], 2, "two or more finite multipliers"),
        (["--max-hours", "nan"], 2, "expected a finite number, got nan"),
        (["--lr-multipliers", "0.3,1"], 2, "budget 4 is too small"),
        (["--encoder", "dim=elsewhere"], 2, "another arm"),
        (["--fail-on-contamination"], 1, "unknown:"),
        (["--labelled", "12"], 0, ""),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_trained(
    command: list[str], options: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medim.study.run.run_all", lambda _: None)
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == (code or 75), result.output
    assert message in result.output


def test_a_repeated_command_has_nothing_of_this_call_alone() -> None:
    words = [
        "x/medim",
        "study",
        "--resume",
        "--out",
        "a b",
        "--max-hours",
        "3",
        "--max-hours=2",
        "--quiet",
        "--seeds",
        "3",
    ]
    assert repeat_command(words) == ["medim", "study", "--out", "a b", "--seeds", "3"]
