"""A case of an attack: files, a command on them, and the faults that its end may show."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_SECONDS = float(os.environ.get("MEDIM_ATTACK_SECONDS", 60))  # a busy machine needs more
MAX_PEAK_BYTES = 4 << 30
TRACEBACK, HANG, MEMORY, VOXELS, EXIT_CODE, OTHER = FAULTS = (
    "traceback",
    "hang",
    "over 4 GB",
    "other voxels",
    "exit code",
    "other fault",
)
UNPROTECTED = "no checksum"  # other voxels of a file whose format has no checksum: counted, no fault


@dataclass(frozen=True)
class Outcome:
    """End of a case.

    Attributes:
        exit_code: of the process; None if it was ended after its limit.
        output: standard output and standard error.
        seconds: duration.
        peak_bytes: largest resident memory of the process, or of a process that it started.
    """

    exit_code: int | None
    output: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Finding:
    """A fault, or other voxels of an unprotected file.

    Attributes:
        kind: member of `FAULTS`, or `UNPROTECTED`.
        detail: description.
    """

    kind: str
    detail: str


Check = Callable[[Path, Outcome], Finding | None]


def accept_any_end(_: Path, __: Outcome) -> None:
    """Accept each end without a general fault."""


def expect_refusal(*exit_codes: int) -> Check:
    """Build a check that the command fails, with one of the exit codes if there are any."""

    def check(_: Path, outcome: Outcome) -> Finding | None:
        """Compare the exit code."""
        if outcome.exit_code == 0 or (exit_codes and outcome.exit_code not in exit_codes):
            return Finding(EXIT_CODE, f"{outcome.exit_code} instead of {exit_codes or 'a refusal'}")
        return None

    return check


@dataclass(frozen=True, kw_only=True)
class Case:
    """One try of an attack.

    Attributes:
        name: description.
        kind: group of cases of which a sample contains at least one, such as the format of the file.
        prepare: writes the files of the case into an empty folder.
        act: runs in a child process, in that folder; the result is the exit code.
        check: compares the folder and the end with the expected ones, after the general faults.
        max_seconds: limit of its duration; a case with a higher limit is in no sample.
    """

    name: str
    kind: str
    prepare: Callable[[Path], object]
    act: Callable[[], int]
    check: Check = accept_any_end
    max_seconds: float = MAX_SECONDS

    def find_fault(self, folder: Path, outcome: Outcome) -> Finding | None:
        """Find the first fault of an end."""
        last_line = " ".join(outcome.output.split())[-200:]
        if outcome.exit_code is None:
            return Finding(HANG, f"over {self.max_seconds:.0f} s: {last_line}")
        if outcome.peak_bytes > MAX_PEAK_BYTES:
            return Finding(MEMORY, f"{outcome.peak_bytes / 2**30:.1f} GiB")
        if "Traceback (most recent call last)" in outcome.output or "unexpected error" in outcome.output:
            return Finding(TRACEBACK, last_line)
        if outcome.exit_code not in range(5):
            return Finding(EXIT_CODE, f"{outcome.exit_code}: {last_line}")
        return self.check(folder, outcome)


@dataclass(frozen=True)
class Attack:
    """Cases of one kind, a row of the table.

    Attributes:
        title: row of the table.
        list_cases: lists the cases; the arguments are the folder of the runs, and a seed.
    """

    title: str
    list_cases: Callable[[Path, int], Sequence[Case]]


def run_command(*words: str | Path) -> int:
    """Run `medim` in this process.

    Returns:
        The exit code.
    """
    from medim.cli import app

    try:
        app([str(word) for word in words], standalone_mode=True, prog_name="medim")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def copy_parts(base: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy files and folders of the runs into the folder of a case."""
    for name in names:
        source = base / name
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        else:
            shutil.copy2(source, folder / name)
