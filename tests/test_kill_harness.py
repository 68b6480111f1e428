"""A part of the trials of `python -m tests.kill_harness`: signals, limits and two commands at once.

`tests/training/test_killed.py` has those of trainings.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kill_harness.__main__ import list_places, prepare
from tests.kill_harness.kills import FAULTS, TaskTrials
from tests.kill_harness.limits import LimitTrials
from tests.kill_harness.pairs import PairTrials
from tests.kill_harness.processes import ForkServer
from tests.kill_harness.tasks import TASKS, Task

pytestmark = pytest.mark.slow
Prepared = tuple[ForkServer, Path]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with prepare(tmp_path_factory.mktemp("harness"), steps=8, with_packages=False) as server_and_inputs:
        yield server_and_inputs


@pytest.mark.parametrize(("name", "count"), [("index", 10), ("preprocess", 9), ("fetch", 10), ("embed", 5)])
def test_signals_and_limits_change_no_byte_of_a_result(
    name: str, count: int, prepared: Prepared, tmp_path: Path
) -> None:
    trials, rng = TaskTrials(name, TASKS[name], *prepared, tmp_path / "trials"), random.Random(name)
    for number in range(10 * count):
        trials.run_trial(number, rng)
        if sum(trials.tally.tried.values()) >= count:
            break
    limits = LimitTrials(trials)
    for place in list_places(name)[:-1]:  # the last one, memory, depends on the allocator of the machine
        limits.run_trial(0, place, rng)
    assert trials.tally.details == []
    assert sum(trials.tally.tried.values()) >= count


def test_two_commands_in_one_folder_give_one_result(prepared: Prepared, tmp_path: Path) -> None:
    second, rng = prepared[0].copy(), random.Random(0)
    try:
        trials = TaskTrials("index", TASKS["index"], *prepared, tmp_path / "trials")
        pairs = PairTrials(trials, second)
        for number, kind in enumerate(("one folder", "one folder", "one folder, --overwrite", "one cache")):
            pairs.run_trial(number, kind, rng)
    finally:
        second.close()
    assert trials.tally.details == []


BAD_COMMAND = """
import medim.cli, os, signal, sys, time
from pathlib import Path

def run_badly(words, **_):
    if words[0] == "read":
        print("Traceback")
        sys.exit(1)
    is_trial, first, out = Path.cwd().name.isdigit(), Path("first"), Path("out")
    out.mkdir(exist_ok=True)
    (out / "a.json").write_text('{"a": %d}' % len(words))
    if is_trial and not first.exists():
        first.touch()
        if os.fork():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("Traceback", flush=True)))
            (out / "b.json").write_text("{")
        time.sleep(600)
    time.sleep(0.2)
    (out / "b.json").write_text('{"b": %d}' % is_trial)
    sys.exit(0)

medim.cli.app = run_badly
"""


def test_every_kind_of_fault_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command writes its files one after the other, leaves a child, and gives another result when it goes on."""
    monkeypatch.setattr("tests.kill_harness.processes.MAX_WAIT", 0.2)
    server, rng = ForkServer(tmp_path, {}, setup=BAD_COMMAND), random.Random(0)
    try:
        bad = Task(words=["write"], other_words=["other"], reader=["read"])
        trials = TaskTrials("bad", bad, server, tmp_path, tmp_path / "trials")
        trials.signals = ("SIGTERM",)
        for number in range(0, 300, 3):
            trials.run_trial(number, rng)
            if set(trials.tally.faults) == set(FAULTS):
                break
    finally:
        server.close()
    assert set(trials.tally.faults) == set(FAULTS)
