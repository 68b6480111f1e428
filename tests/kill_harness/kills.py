"""Signals at random times: exit codes, processes that are left, earlier results, files, and the result afterwards."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medim.output_folder import MARKER, READY, STAGING, read_record
from medim.predict.progress import JOURNAL
from tests.kill_harness.content import Content, Reference, find_unreadable, read_content
from tests.kill_harness.processes import ForkServer, Run, send_after
from tests.kill_harness.tasks import Task

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1", "SIGINT twice")
PROGRESS_FILES = (JOURNAL, "summary.json")  # besides checkpoints: answers, and cells of a study
FAULTS = ("exit code", "traceback", "processes left", "part of a file", "earlier result", "reader", "other bytes")


@dataclass
class Tally:
    """Signals to a command.

    Attributes:
        tried: number by signal that arrived before the end of the command.
        late: number that arrived later.
        faults: number of faults by kind.
        details: a line per fault.
        longest_delay: most seconds from a signal (except SIGKILL) to the end of the process.
        resumed: number of results that were the same bytes after the command was run again.
        exit_codes: number of ends by exit code, after a signal that was not late.
        saved: number of these ends by the files that were saved, see `TaskTrials.classify_saved`.
    """

    tried: Counter[str] = field(default_factory=Counter)
    late: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    longest_delay: float = 0.0
    resumed: int = 0
    exit_codes: Counter[int] = field(default_factory=Counter)
    saved: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, detail: str) -> None:
        """Add a fault."""
        self.faults[kind] += 1
        self.details.append(f"{kind}: {detail}")
        print(self.details[-1], file=sys.stderr, flush=True)


class TaskTrials:
    """Runs one command in many folders, and compares each result with that of an undisturbed one.

    Args:
        name: name of the task.
        task: the command.
        server: starts it.
        inputs: folder of the inputs.
        folder: a new folder for the trials.
    """

    def __init__(self, name: str, task: Task, server: ForkServer, inputs: Path, folder: Path) -> None:
        self.name, self.task, self.server, self.inputs, self.folder = name, task, server, inputs, folder
        self.tally, self.signals = Tally(), SIGNALS
        folder.mkdir(parents=True)
        self.reference = self._run_reference()
        self.earlier: Content = {}
        if task.replaceable and task.other_words:
            self._run_new("earlier", *task.other_words)
            self.earlier = read_content(folder / "earlier", task.outputs)

    def _run_reference(self) -> Reference:
        self._run_new("warm")  # fills caches
        first = self._run_new("first")
        second = self._run_new("second")
        contents = [read_content(self.folder / name, self.task.outputs) for name in ("first", "second")]
        if set(contents[0]) != set(contents[1]):
            raise RuntimeError(f"{self.name}: two runs wrote different files")
        volatile = {name for name, value in contents[0].items() if contents[1][name] != value}
        return Reference(contents[0], frozenset(volatile), min(first.seconds, second.seconds))

    def _run_new(self, name: str, *more: str) -> Run:
        """Run the command in a new working folder to its end."""
        run = self.call(name, *more)
        if run.exit_code:
            raise RuntimeError(f"{self.name}: exit code {run.exit_code}: {run.text[-2000:]}")
        return run

    def call(
        self,
        name: str,
        *more: str,
        disturb: Callable[[int], float] | None = None,
        limits: Mapping[str, int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Run:
        """Run the command in a working folder, see `ForkServer.run`."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        words = self.task.build_words(self.inputs, *more)
        return self.server.run(words, disturb, folder=folder, limits=limits, environment=environment)

    def run_trial(self, number: int, rng: random.Random) -> None:
        """Send one to three signals, each to the command as it is run again, and run it to its end at last."""
        name = str(number)
        has_earlier = bool(self.earlier) and rng.random() < 0.5
        if has_earlier:
            shutil.copytree(self.folder / "earlier", self.folder / name)
        options = ["--overwrite"] if has_earlier else []
        for _ in range(rng.choice([1, 1, 2])):
            kind = rng.choice(self.signals)
            group = kind.startswith("SIGINT") or (kind != "SIGKILL" and rng.random() < 0.3)
            delay = rng.uniform(0, self.reference.seconds)
            numbers = [getattr(signal, kind.split()[0])] * (2 if kind.endswith("twice") else 1)
            run = self.call(name, *options, disturb=send_after(delay, *numbers, group=group))
            label = f"{self.name} {number} {kind} after {delay:.2f} of {self.reference.seconds:.2f} s"
            if run.exit_code == 0:
                self.tally.late += 1
                self.send_records(name, run)
                self.compare_end(name, label)
                break
            self.tally.tried[kind] += 1
            self.tally.exit_codes[run.exit_code] += 1
            self.tally.saved[self.classify_saved(name, has_earlier=has_earlier)] += 1
            self._check_kill(run, kind, label)
            self.check_state(name, label, has_earlier=has_earlier, read=number % 3 == 0)
            options = self.select_options(name, has_earlier=has_earlier)
        else:
            self.finish(name, options, label)
        if not self.tally.details or not self.tally.details[-1].count(label):
            shutil.rmtree(self.folder / name)

    def _check_kill(self, run: Run, kind: str, label: str) -> None:
        self.check_end(run, {"SIGKILL": {-9}, "SIGINT twice": {-2, 75}}.get(kind, {75}), label)
        if kind != "SIGKILL":
            self.tally.longest_delay = max(self.tally.longest_delay, run.delay)

    def check_end(self, run: Run, expected: Container[int], label: str) -> None:
        """Check exit code, text and processes of a command that was stopped."""
        if run.exit_code not in expected:
            self.tally.add("exit code", f"{label}: {run.exit_code}: {run.text[-600:]}")
        if any(words in run.text for words in ("Traceback", "unexpected error", "Exception ignored")):
            self.tally.add("traceback", f"{label}: {run.text[-2500:]}")
        if run.orphans:
            self.tally.add("processes left", f"{label}: {run.orphans}")

    def check_state(self, name: str, label: str, *, has_earlier: bool, read: bool = True) -> None:
        """Check that the earlier result is intact, and that no part of a result is taken for the whole."""
        folder, task = self.folder / name, self.task
        if unreadable := find_unreadable(folder, task.outputs):
            self.tally.add("part of a file", f"{label}: {unreadable}")
        content = read_content(folder, task.outputs)
        in_exchange = any((folder / output / READY).exists() for output in task.outputs)
        if has_earlier and not in_exchange and content != self.earlier and self.reference.compare(content):
            self.tally.add("earlier result", f"{label}: {sorted(set(self.earlier) ^ set(content))[:5]}")
        if not has_earlier and not task.is_direct and not in_exchange and content and self._lacks_part(content):
            self.tally.add("part of a file", f"{label}: {self.reference.compare(content)[:5]}")
        if task.reader and (folder / "out").exists() and not in_exchange and read:
            copy = folder.with_name(f"{folder.name}-read")
            shutil.copytree(folder, copy)
            run = self.server.run(task.reader, folder=copy)
            if run.exit_code not in {0, 1, 3, 4} or "Traceback" in run.text or "unexpected error" in run.text:
                self.tally.add("reader", f"{label}: {run.exit_code}: {run.text[-1500:]}")
            is_whole = not self.reference.compare(content) or content == self.earlier
            if run.exit_code == 0 and not is_whole and not task.may_repeat and task.reader[0] != "report":
                self.tally.add("reader", f"{label}: accepted a part of a result")
            shutil.rmtree(copy)

    def _lacks_part(self, content: Content) -> bool:
        """Whether a result that appears as a whole is neither complete nor complete except for its last file."""
        present = {output for output in self.task.outputs if any(n.split("/")[0] == output for n in content)}
        if set(content) == {"out/rejected.csv"}:  # every input was rejected
            return False
        return any(name.split("/")[0] in present for name in self.reference.compare(content))

    def classify_saved(self, name: str, *, has_earlier: bool) -> str:
        """Classify the files of a stopped command: result, progress (such as a checkpoint), first files, or nothing."""
        folder = self.folder / name
        staged = [folder / output / STAGING for output in self.task.outputs if (folder / output / STAGING).exists()]
        content = read_content(folder, self.task.outputs)
        if content and not self.reference.compare(content):
            return "result"
        roots = staged or ([] if has_earlier else [folder / output for output in self.task.outputs])
        files = [path for root in roots for path in root.rglob("*") if path.is_file() and path.name != MARKER]
        if any(path.name in PROGRESS_FILES or path.suffix == ".ckpt" for path in files):
            return "progress"
        return "first files" if files else "nothing"

    def send_records(self, name: str, run: Run) -> None:
        """Send the records that a command which a signal reached after its result has left, as its message advises."""
        if "To send the records: medim sync" in run.text:
            self.server.run(["sync", "out"], folder=self.folder / name)

    def select_options(self, name: str, *, has_earlier: bool) -> list[str]:
        """Select the options with which the command goes on."""
        folder, task = self.folder / name, self.task
        if task.resumable:
            staging = any((folder / output / STAGING).exists() for output in task.outputs)
            return ["--resume"] if staging or not has_earlier else ["--overwrite"]
        if task.may_repeat:
            return []
        record = read_record(folder / "out")
        is_complete = record is not None and record.state in {"complete", "installing", "removing"}
        return ["--overwrite"] if has_earlier or is_complete or self._has_result(folder) else []

    def _has_result(self, folder: Path) -> bool:
        return bool(read_content(folder, self.task.outputs))

    def finish(self, name: str, options: Sequence[str], label: str) -> None:
        """Run the command to its end, and compare the result."""
        run = self.call(name, *options)
        if run.exit_code:
            self.tally.add("other bytes", f"{label}, then {options}: {run.exit_code}: {run.text[-1500:]}")
            return
        self.compare_end(name, f"{label}, then {options}")

    def compare_end(self, name: str, label: str) -> None:
        """Compare the result with the undisturbed one."""
        if differences := self.reference.compare(read_content(self.folder / name, self.task.outputs)):
            self.tally.add("other bytes", f"{label}: {differences[:8]}")
        else:
            self.tally.resumed += 1


def format_table(tallies: dict[str, Tally]) -> str:
    """Format the tallies as a Markdown table."""
    columns = ["command", *SIGNALS, "in all", "too late", "exit codes", "saved", *FAULTS]
    columns += ["same bytes in the end", "longest delay, s"]
    rows = []
    for name, tally in tallies.items():
        cells = [name, *(tally.tried[kind] for kind in SIGNALS), sum(tally.tried.values()), tally.late]
        cells += [_format_counts(tally.exit_codes), _format_counts(tally.saved)]
        same = f"{tally.resumed} of {tally.resumed + tally.faults['other bytes']}"
        rows.append([*cells, *(tally.faults[kind] for kind in FAULTS), same, f"{tally.longest_delay:.1f}"])
    return join_rows(columns, rows)


def _format_counts(counts: Mapping[Any, int]) -> str:
    """Format numbers by kind, in the order of the kinds."""
    return ", ".join(f"{kind}: {number}" for kind, number in sorted(counts.items()))


def join_rows(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Join rows of cells to a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
