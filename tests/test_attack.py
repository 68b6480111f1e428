"""Attacks of `tests/attack`: a sample of the cases, and the detection of each fault by the harness itself.

All cases run with `python -m tests.attack FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attack.case import EXIT_CODE, HANG, MEMORY, OTHER, TRACEBACK, Case, Finding, expect_refusal
from tests.attack.child import run_cases

N_CASES = 200


def raise_error() -> int:
    raise KeyError("a")


def report_success_of_nothing() -> int:
    print("medim: unexpected error (KeyError).")
    return 1


def wait_for_ever() -> int:
    while True:
        time.sleep(1)


def take_memory() -> int:
    return len(b"x" * (64 << 20)) * 0


ENDS: dict[str, tuple[Callable[[], int], str | None]] = {
    "success": (lambda: 0, None),
    "refusal": (lambda: 3, None),
    "unexpected exit code": (lambda: 17, EXIT_CODE),
    "error": (raise_error, TRACEBACK),
    "unexpected error": (report_success_of_nothing, TRACEBACK),
    "crash": (os.abort, EXIT_CODE),
    "hang": (wait_for_ever, HANG),
    "memory": (take_memory, MEMORY),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_harness_detects_each_fault(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act, expected = ENDS[name]
    if name == "memory":
        monkeypatch.setattr("tests.attack.case.MAX_PEAK_BYTES", 64 << 20)
    limit = 0.5 if name == "hang" else 120.0
    case = Case(name=name, kind="", prepare=lambda _: None, act=act, max_seconds=limit)
    [(_, outcome, finding)] = run_cases([case], tmp_path, jobs=1)
    assert (finding.kind if finding else None) == expected, outcome


def test_a_case_runs_in_its_folder_and_its_check_reads_the_files(tmp_path: Path) -> None:
    def check(folder: Path, _: object) -> Finding | None:
        return Finding(OTHER, "changed") if (folder / "a").read_text() == "changed" else None

    def act() -> int:
        return 0 if Path("a").write_text("changed") else 1

    case = Case(name="a", kind="", prepare=lambda folder: (folder / "a").write_text("b"), act=act, check=check)
    assert [finding for _, _, finding in run_cases([case] * 3, tmp_path, jobs=2)] == [Finding(OTHER, "changed")] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_success_in_place_of_a_refusal_is_a_fault(tmp_path: Path) -> None:
    for code, expected in ((0, EXIT_CODE), (1, EXIT_CODE), (3, None)):
        case = Case(name="a", kind="", prepare=lambda _: None, act=lambda code=code: code, check=expect_refusal(3))  # type: ignore[misc]
        [(_, _, finding)] = run_cases([case], tmp_path, jobs=1)
        assert (finding.kind if finding else None) == expected


@pytest.mark.slow
def test_a_sample_of_the_attacks_has_no_fault(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.attack", str(tmp_path), "--sample", str(N_CASES)]
    environment = {**os.environ, "MEDIM_ATTACK_SECONDS": "240"}
    end = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1], env=environment
    )
    faults = [line for line in end.stdout.splitlines() if line.startswith("FAULT")]
    assert (faults, end.returncode) == ([], 0), end.stderr[-2000:]
    assert "| attack | tried |" in end.stdout
