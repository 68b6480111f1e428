"""Two processes learn what one learns from the same global batch: every objective, and the whole command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from medim.cli import app
from medim.training.engine.optim import build_optimiser
from medim.training.engine.process_group import SINGLE_PROCESS
from tests.training.processes import CASES, FAULTS, adamw, descent, trained, trained_in_float64

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
ENCODER = {"name": "unet", "channels": [4, 8, 8], "summary_channels": 8, "norm": "in"}
CRITIC = {"name": "encode_and_dot", "width": 8, "scale_scores": True}


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def surroundings(**extra: str) -> dict[str, str]:
    """One thread a process, and nothing of the machine that might look like a cluster."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_", "TORCHELASTIC"))}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | extra


def all_of(started: list[subprocess.Popen[str]]) -> list[str]:
    """What the processes said; all must end well."""
    said = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    return said


def start(*arguments: str, **extra: str) -> subprocess.Popen[str]:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *arguments], env=surroundings(**extra), cwd=REPOSITORY, **streams)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left what they learnt."""
    out, port = tmp_path_factory.mktemp("two"), free_port()
    all_of([start("-m", "tests.training.processes", rank, port, str(out)) for rank in "01"])
    return out


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any number."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def learnt(folder: Path, case: str) -> dict[str, dict[str, torch.Tensor]]:
    first, second = (torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("after", "losses"):
        assert furthest(first[part], second[part]) == 0, "both processes hold the same"
    assert isinstance(first, dict)
    return first


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns_from_the_same_batch(case: str, two: Path) -> None:
    alone, spread = trained(case, SINGLE_PROCESS), learnt(two, case)
    assert furthest(alone["before"], spread["before"]) == 0
    parameters = [name for name in alone["before"] if "running" not in name and "tracked" not in name]
    moved = {name: float((alone["after"][name] - alone["before"][name]).abs().max()) for name in parameters}
    assert max(moved.values()) > 1e-2, "the steps are large enough to tell"
    assert furthest(alone["after"], spread["after"]) < 1e-5
    assert furthest(alone["losses"], spread["losses"]) < 1e-4


def test_so_do_they_with_adamw(two: Path) -> None:
    assert furthest(trained("dv", SINGLE_PROCESS, by=adamw)["after"], learnt(two, "adamw")["after"]) < 1e-5


@pytest.mark.parametrize(("name", "by", "limit"), [("sgd", descent, 1e-12), ("adamw", build_optimiser, 1e-8)])
def test_in_float64_eight_steps_of_a_preset_differ_by_rounding_alone(
    name: str, by: Any, limit: float, two: Path
) -> None:
    """In fp32 the rounding of a gradient of 0 grows to a step of Adam, and each step amplifies it."""
    alone, spread = trained_in_float64(SINGLE_PROCESS, by=by), learnt(two, f"float64-{name}")
    assert furthest(alone["before"], alone["after"]) > 1e-2, "the steps are large enough to tell"
    assert furthest(alone["after"], spread["after"]) < limit


@pytest.mark.parametrize("fault", FAULTS)
def test_a_gathering_that_drops_or_scales_gradients_is_found(fault: str, two: Path) -> None:
    assert furthest(trained("infonce", SINGLE_PROCESS)["after"], learnt(two, fault)["after"]) > 1e-3


@pytest.fixture(scope="module")
def command(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`medim pretrain` of a few steps, but for --out and the devices."""
    folder = tmp_path_factory.mktemp("command")
    options = {
        "modality": "mri",
        "preprocessing": [{"op": "ras"}, {"op": "normalise", "method": "zscore"}],
        "views": {"shape": [16, 16, 16], "augmentations": [{"op": "noise", "probability": 0.5}]},
        "encoder": ENCODER,
        "decoder": {"name": "unet", "norm": "in"},
        "objectives": [
            {"name": "local_dim", "estimator": "infonce", "critic": CRITIC, "occlusion": 5},
            {"name": "prior_matching", "weight": 0.1, "hidden": [8]},
            {"name": "reconstruction"},
        ],
        "max_steps": 16,
        "batch_size": 4,
        "lr": 0.0001,
        "checkpoint_every_steps": 4,
    }
    (folder / "run.yaml").write_text(json.dumps(options))
    source = ["--modality", "mri", "--data", str(volumes), "--subjects", str(volumes / "subjects.csv")]
    return ["-m", "medim.cli", "pretrain", *source, "--config", str(folder / "run.yaml"), "--device", "cpu"]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    ran = CliRunner().invoke(app, [*command[2:], "--devices", "1", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    return out


def check_run(out: Path, alone: Path, said: str) -> None:
    """A run of two processes left what one of one process left, and one of them spoke."""
    weights = Path("encoder") / "encoder.safetensors"
    assert furthest(load_file(alone / weights), load_file(out / weights)) < 1e-5
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (out, alone))
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert ours["config_hash"] == theirs["config_hash"]
    assert ours["verdict"] == theirs["verdict"]
    for name, loss in theirs["loss"].items():
        assert ours["loss"][name] == pytest.approx(loss, abs=1e-4), "held-out losses, too"
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert {"step-12.ckpt", "step-16.ckpt"} <= {path.name for path in (out / "checkpoints").iterdir()}
    assert said.count("feature std") == 1
    assert said.count("step 16 of 16,") == 1
    assert "2 processes" in said


def test_pretrain_on_two_devices_ends_in_the_encoder_of_one(command: list[str], alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (said,) = all_of([start(*command, "--devices", "2", "--out", str(out))])
    check_run(out, alone, said)


def test_a_run_that_uses_every_parameter_prints_no_warning_of_ddp(command: list[str], tmp_path: Path) -> None:
    config = json.loads(Path(command[command.index("--config") + 1]).read_text())
    config.update(objectives=config["objectives"][:1], decoder=None, max_steps=4, checkpoint_every_steps=2)
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    changed = [str(tmp_path / "run.yaml") if word.endswith("run.yaml") else word for word in command]
    (output,) = all_of([start(*changed, "--devices", "2", "--out", str(tmp_path / "run"))])
    assert "2 processes" in output
    assert "find_unused_parameters" not in output


def test_a_slurm_job_that_is_warned_saves_in_all_tasks_and_torchrun_ends_it(
    command: list[str], alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    job |= {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4711", "SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": "medim"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    tasks = [start(*command, "--out", str(out), **job, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "01"]
    while not (out / "checkpoints" / "step-4.ckpt").is_file() and tasks[0].poll() is None:
        time.sleep(0.01)
    tasks[1].send_signal(signal.SIGUSR1)
    said = [task.communicate(timeout=500)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [75, 75], "\n".join(said)
    assert not (out / "summary.json").exists()

    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    (said_by_both,) = all_of([start(*torchrun, *command, "--out", str(out), "--resume")])
    assert 4 <= json.loads((out / "summary.json").read_text())["resumed_from_steps"][0] < 16
    check_run(out, alone, said_by_both)


BROKEN = """
from medim.training.engine.launch import launched, planned_group
with launched("cpu", planned_group("cpu", 2, 1)) as group:
    if group.rank == 1:
        raise ValueError("the second broke")
    group.any_true(False)
    print("went on")
"""


def test_where_one_process_fails_the_other_ends_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    process = start(str(tmp_path / "broken.py"))
    said = process.communicate(timeout=500)[0]
    assert process.returncode != 0
    assert "the second broke" in said
    assert "another of the 2 processes failed" in said
    assert "went on" not in said
