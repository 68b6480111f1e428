"""Two commands at once: in one folder, on one cache, and with one new tracking database."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.kill_harness.kills import TaskTrials, join_rows
from tests.kill_harness.processes import ForkServer, Run

KINDS = ("one folder", "one folder, --overwrite", "one folder, --resume", "one cache", "one database")
FAULTS = ("exit code", "traceback", "processes left", "part of a file", "earlier result", "other bytes")


class PairTrials:
    """Runs a command twice at the same time.

    Args:
        trials: runs the first command and checks results.
        second: server that starts the second one.
    """

    def __init__(self, trials: TaskTrials, second: ForkServer) -> None:
        self.trials, self._second = trials, second
        self.both, self.one = Counter[str](), Counter[str]()

    def run_trial(self, number: int, kind: str, rng: random.Random) -> None:
        """Start the command twice within its duration, and check that each result is whole or refused."""
        trials, name = self.trials, f"{kind.replace(', --', '-').replace(' ', '-')}-{number}"
        delay = rng.choice([0.0, 0.02, rng.uniform(0, 0.5) * trials.reference.seconds])
        shared = kind.startswith("one folder")
        names = [name, name] if shared else [name, f"{name}-second"]
        options = ["--overwrite"] if kind.endswith("overwrite") else ["--resume"] if kind.endswith("resume") else []
        if options == ["--overwrite"] and trials.earlier:
            shutil.copytree(trials.folder / "earlier", trials.folder / name)
        runs = self._run_both(names, options, delay, _share(kind, trials.folder / f"{name}-shared"))
        label = f"{trials.name} {name}, {delay:.2f} s apart"
        codes = sorted(run.exit_code for run in runs)
        (self.both if codes == [0, 0] else self.one)[kind] += 1
        if codes != [0, 0] and not (shared and codes == [0, 1]):
            texts = "\n".join(run.text[-600:] for run in runs)
            trials.tally.add("exit code", f"{label}: {codes}: {texts}")
        for run in runs:
            if run.exit_code:
                trials.check_end(run, {1}, label)
        for place in dict.fromkeys(names):
            trials.compare_end(place, label)
            shutil.rmtree(trials.folder / place)

    def _run_both(
        self, names: list[str], options: list[str], delay: float, environment: Mapping[str, str]
    ) -> tuple[Run, Run]:
        trials = self.trials
        words = trials.task.build_words(trials.inputs, *options)
        for name in names:
            (trials.folder / name).mkdir(exist_ok=True)
        trials.server.start(words, folder=trials.folder / names[0], environment=environment)
        time.sleep(delay)
        self._second.start(words, folder=trials.folder / names[1], environment=environment)
        return trials.server.wait(), self._second.wait()


def _share(kind: str, folder: Path) -> dict[str, str]:
    """Build the environment variables of a cache or a database that does not exist yet."""
    if kind == "one cache":
        return {"MEDIM_CACHE": str(folder / "cache")}
    if kind == "one database":
        folder.mkdir()
        return {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    return {}


def format_pairs(table: dict[str, PairTrials]) -> str:
    """Format the results as a Markdown table: pairs by kind in which both or one succeeded, and faults."""
    columns = ["command", *(f"{kind}: both, one" for kind in KINDS), *FAULTS]
    rows = [
        [
            name,
            *(f"{test.both[kind]}, {test.one[kind]}" for kind in KINDS),
            *(test.trials.tally.faults[kind] for kind in FAULTS),
        ]
        for name, test in table.items()
    ]
    return join_rows(columns, rows)
