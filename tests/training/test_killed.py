"""Runs of the real command in processes of their own, killed and stopped at random moments and resumed each time.

A process that imports medim once forks the others, so that a start costs no import.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medim.config import FinetuneConfig, PretrainConfig, dump_config
from medim.files import file_sha256

pytestmark = pytest.mark.slow
STARTER = """
import json, os, sys
import medim.cli, medim.data.source, medim.training.finetune.run, medim.training.pretrain.run
print("ready", flush=True)
for line in sys.stdin:
    arguments, log = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(file, number)
        try:
            medim.cli.app(arguments, prog_name="medim")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        finally:
            os._exit(99)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Starter:
    """Starts commands, one at a time; what they say goes to `log`."""

    log: Path

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._said() == "ready"

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, arguments: list[str], disturb: Callable[[int], None] = lambda pid: None) -> int:
        """Run a command to its end, disturbed by what is given its process id; its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([arguments, str(self.log)]) + "\n")
        self._process.stdin.flush()
        disturb(int(self._said()))
        return int(self._said())

    def close(self) -> None:
        """End the process."""
        self._process.communicate("")


@pytest.fixture(scope="module")
def warm() -> Iterator[Starter]:
    started = Starter()
    yield started
    started.close()


@pytest.fixture
def starter(warm: Starter, tmp_path: Path) -> Starter:
    warm.log = tmp_path / "log.txt"
    return warm


def steps(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*.ckpt"))


def disturbance(
    run: Path, number: int, rng: random.Random, within: float, *, group: bool = False
) -> Callable[[int], None]:
    """Sends a signal at a random moment of so many seconds after the next checkpoint."""

    def disturb(pid: int) -> None:
        before = steps(run)[-1:]
        deadline = time.monotonic() + 300
        while steps(run)[-1:] == before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, within))
        (os.killpg if group else os.kill)(pid, number)

    return disturb


def interval(run: Path) -> float:
    """Seconds between two checkpoints of a whole run."""
    times = sorted(path.stat().st_mtime for path in (run / "checkpoints").glob("step-*.ckpt"))
    assert len(times) == 2
    return times[1] - times[0]


def disturbed(
    starter: Starter, command: list[str], run: Path, signals: list[int], rng: random.Random, within: float, every: int
) -> dict[str, Any]:
    """Run a command to its end in spite of signals and a cut checkpoint; its summary."""
    more: list[str] = []
    for number in signals:
        code = starter.run([*command, "--out", str(run), *more], disturbance(run, number, rng, within))
        expected = -signal.SIGKILL if number == signal.SIGKILL else 75
        assert code == expected, starter.log.read_text()[-3000:]
        assert not (run / "summary.json").exists()
        more = ["--resume"]
    newest = run / "checkpoints" / f"step-{steps(run)[-1]}.ckpt"
    newest.write_bytes(newest.read_bytes()[:-500])
    left, last = steps(run)[-2:]
    assert starter.run([*command, "--out", str(run), *more]) == 0, starter.log.read_text()[-3000:]
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    assert summary["corrupt_checkpoints"] == [newest.name]
    assert summary["resumed_from_steps"][-1] == left
    assert len(signals) - 1 <= len(summary["resumed_from_steps"]) <= len(signals)  # the cut one may know of one more
    assert last - left <= every
    return summary


def test_ten_kills_five_stops_and_a_cut_checkpoint_end_in_the_bytes_of_the_undisturbed_run(
    starter: Starter, pretrain_config: PretrainConfig, volumes: Path, tmp_path: Path
) -> None:
    every = 8  # two intervals a disturbance at most
    changed = {"max_steps": 280, "checkpoint_every_steps": every}
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(pretrain_config.model_copy(update=changed)))
    command = ["pretrain", "--modality", "mri", "--data", str(volumes), "--config", str(config)]
    assert starter.run([*command, "--out", str(tmp_path / "undisturbed")]) == 0, starter.log.read_text()[-3000:]
    rng = random.Random(0)
    signals = [signal.SIGKILL] * 10 + [signal.SIGTERM] * 3 + [signal.SIGUSR1] * 2
    rng.shuffle(signals)
    summary = disturbed(starter, command, tmp_path / "run", signals, rng, interval(tmp_path / "undisturbed"), every)
    weights = Path("encoder") / "encoder.safetensors"
    assert file_sha256(tmp_path / "undisturbed" / weights) == file_sha256(tmp_path / "run" / weights)
    histories = [(tmp_path / name / "history.csv").read_bytes() for name in ("undisturbed", "run")]
    assert histories[0] == histories[1]
    whole = json.loads((tmp_path / "undisturbed" / "summary.json").read_text())
    same = ("loss", "chance", "diagnostics", "verdict", "rankme", "feature_std", "steps", "config_hash")
    assert {key: summary[key] for key in same} == {key: whole[key] for key in same}


def test_a_fine_tuning_killed_and_stopped_ends_in_the_bytes_of_the_undisturbed_run(
    starter: Starter, finetune_config: FinetuneConfig, volumes: Path, tmp_path: Path
) -> None:
    changed = {"max_steps": 200, "checkpoint_every_steps": 15, "eval_steps": (100,)}
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(finetune_config.model_copy(update=changed)))
    command = ["finetune", "--task", "segmentation", "--modality", "mri", "--data", str(volumes)]
    command += ["--config", str(config)]
    assert starter.run([*command, "--out", str(tmp_path / "undisturbed")]) == 0, starter.log.read_text()[-3000:]
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1]
    summary = disturbed(
        starter, command, tmp_path / "run", signals, random.Random(1), interval(tmp_path / "undisturbed"), 20
    )
    weights = Path("model") / "model.safetensors"
    assert file_sha256(tmp_path / "undisturbed" / weights) == file_sha256(tmp_path / "run" / weights)
    assert (tmp_path / "undisturbed" / "history.csv").read_bytes() == (tmp_path / "run" / "history.csv").read_bytes()
    whole = json.loads((tmp_path / "undisturbed" / "summary.json").read_text())
    same = ("loss", "val", "steps")
    assert {key: summary[key] for key in same} == {key: whole[key] for key in same}


def test_a_signal_to_all_processes_of_a_run_leaves_it_to_the_run_to_stop(
    starter: Starter, pretrain_config: PretrainConfig, volumes: Path, tmp_path: Path
) -> None:
    """As SLURM sends it: the loading process must not die of it before the step is saved."""
    config = tmp_path / "config.yaml"
    changed = {"max_steps": 100, "checkpoint_every_steps": 10, "workers": 1}
    config.write_text(dump_config(pretrain_config.model_copy(update=changed)))
    command = ["pretrain", "--modality", "mri", "--data", str(volumes), "--config", str(config)]
    command += ["--out", str(tmp_path / "run")]
    stop = disturbance(tmp_path / "run", signal.SIGUSR1, random.Random(2), 0.1, group=True)
    assert starter.run(command, stop) == 75, starter.log.read_text()[-3000:]
    assert "is saved, --resume continues" in starter.log.read_text()
