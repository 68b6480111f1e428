"""The job script for SLURM: what it would run, and what it does when a run leaves to be requeued."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from medim.cli import app

SCRIPT = Path(__file__).parents[1] / "pipelines" / "slurm" / "pretrain.sbatch"


def run(folder: Path, exit_code: int = 0, **job: str) -> tuple[int, list[str], str]:
    """Run the script with commands in the PATH that note how they are called: exit code, calls, output."""
    calls, tools = folder / "calls", folder / "bin"
    tools.mkdir()
    for name, code in (("srun", exit_code), ("scontrol", 0)):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {shlex.quote(str(calls))}\nexit {code}\n')
        (tools / name).chmod(0o755)
    (folder / "activate").write_text("export ACTIVATED=1\n")
    own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = own | {"PATH": path, "ACTIVATE": str(folder / "activate")} | job
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, calls.read_text().splitlines() if calls.is_file() else [], done.stdout


def test_a_dry_run_prints_the_command_and_runs_nothing(tmp_path: Path) -> None:
    code, calls, said = run(tmp_path, DRY_RUN="1", SLURM_JOB_ID="4711")
    assert (code, calls) == (0, [])
    environment, command = said.splitlines()
    assert environment == f"source {tmp_path / 'activate'}"
    words = shlex.split(command)
    assert words[:4] == ["srun", "--kill-on-bad-exit=1", "medim", "pretrain"]
    assert words[-1] == "--resume"
    assert words[words.index("--out") + 1] == "runs/medim-4711-0"


def test_the_command_is_one_that_medim_takes(tmp_path: Path) -> None:
    words = shlex.split(run(tmp_path, DRY_RUN="1")[2].splitlines()[1])
    options = {name for parameter in get_command(app).commands["pretrain"].params for name in parameter.opts}  # type: ignore[attr-defined]
    assert {word for word in words[4:] if word.startswith("--")} <= options


def test_a_run_that_saved_and_left_is_requeued(tmp_path: Path) -> None:
    code, calls, _ = run(tmp_path, 75, SLURM_JOB_ID="4711")
    assert code == 75
    assert [call.split()[0] for call in calls] == ["srun", "scontrol"]
    assert calls[1] == "scontrol requeue 4711"


@pytest.mark.parametrize("exit_code", [0, 1, 137])
def test_a_run_that_ended_or_failed_is_not(exit_code: int, tmp_path: Path) -> None:
    code, calls, _ = run(tmp_path, exit_code, SLURM_JOB_ID="4711")
    assert code == exit_code
    assert [call.split()[0] for call in calls] == ["srun"]


def test_the_tasks_of_an_array_have_seeds_and_folders_of_their_own_and_are_requeued_alone(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "4713", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NAME": "mine"}
    _, calls, _ = run(tmp_path, 75, **job)
    words = calls[0].split()
    assert words[words.index("--seed") + 1] == "2"
    assert words[words.index("--out") + 1] == "runs/mine-4711-2"
    assert calls[1] == "scontrol requeue 4711_2"


def test_a_user_edits_three_places_and_slurm_warns_the_tasks_in_time() -> None:
    text = SCRIPT.read_text()
    assert text.count("# EDIT") == 3
    assert "#SBATCH --signal=USR1@180" in text, "without B:, which would warn the script alone"
    assert "#SBATCH --requeue" in text
