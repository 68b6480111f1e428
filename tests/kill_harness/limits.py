"""Commands on a full disk, in read-only folders, and with few file handles or little memory."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from tests.kill_harness.kills import FAULTS as KILL_FAULTS
from tests.kill_harness.kills import TaskTrials, join_rows

PLACES = ("full disk", "full cache", "full tracking", "read-only", "file size", "file handles", "memory")
FAULTS = (*KILL_FAULTS, "no sentence")
PREFIX = ("unshare", "--map-root-user", "--mount", "--propagation", "private")


def can_mount() -> bool:
    """Whether this machine permits mounts in a namespace of its own."""
    return shutil.which("unshare") is not None and not subprocess.run([*PREFIX, "true"], check=False).returncode


class LimitTrials:
    """Runs one command under limits.

    Args:
        trials: runs the command and checks its results; its server is in a mount namespace of its own if `can_mount`.
    """

    def __init__(self, trials: TaskTrials) -> None:
        self.trials, self.server = trials, trials.server
        self.failed, self.passed = Counter[str](), Counter[str]()
        sizes = [path.stat().st_size for path in (trials.folder / "first").rglob("*") if path.is_file()]
        self._kilobytes, self._largest = sum(size // 1024 + 4 for size in sizes), max(sizes)

    def run_trial(self, number: int, place: str, rng: random.Random) -> None:
        """Run the command once under a limit, then without."""
        trials, name = self.trials, f"{place.replace(' ', '-')}-{number}"
        has_earlier = bool(trials.earlier) and rng.random() < 0.7
        folder = trials.folder / name
        folder.mkdir()
        limits, environment, label = self._draw_limit(place, folder, rng)
        mounts = [folder] if place in {"full disk", "read-only"} else [folder / "small"] if place in PLACES[1:3] else []
        if place in {"full disk", "read-only"}:
            size = int(rng.random() ** 2 * self._kilobytes) if place == "full disk" else self._kilobytes
            earlier = self._kilobytes if has_earlier else 0
            self._mount(folder, 4 + size + earlier)
            label = f"{size} KiB left"
        elif mounts:
            mounts[0].mkdir()
            size = int(rng.random() ** 2 * 3000)
            self._mount(mounts[0], 4 + size)
            label = f"{size} KiB"
        place_seen = self.server.locate(folder)
        if has_earlier:
            shutil.copytree(trials.folder / "earlier", place_seen, dirs_exist_ok=True)
        if place == "read-only":
            self._enter("mount", "-o", "remount,ro", str(folder))
        label = f"{trials.name} {name} ({place}: {label})"
        run = trials.call(name, *(["--overwrite"] if has_earlier else []), limits=limits, environment=environment)
        if run.exit_code:
            self.failed[place] += 1
            trials.check_end(run, {1, 4}, label)
            last_line = run.text.rstrip().rpartition("\n")[2]
            if not last_line.startswith("medim: "):
                trials.tally.add("no sentence", f"{label}: {run.exit_code}: {run.text[-1500:]}")
        else:
            self.passed[place] += 1
        if mounts == [folder]:
            shutil.copytree(place_seen, folder.with_name(f"{name}-after"), symlinks=True)
            name = f"{name}-after"
        for path in reversed(mounts):
            self._enter("umount", "--lazy", str(path))
        trials.check_state(name, label, has_earlier=has_earlier)
        if run.exit_code:
            trials.finish(name, trials.select_options(name, has_earlier=has_earlier), label)
        elif place != "memory":
            trials.compare_end(name, label)
        for path in (folder, trials.folder / name):
            shutil.rmtree(path, ignore_errors=True)

    def _draw_limit(self, place: str, folder: Path, rng: random.Random) -> tuple[dict[str, int], dict[str, str], str]:
        """Draw limits and environment variables; returns them and their description."""
        if place == "file size":
            size = 16384 + int(rng.random() ** 2 * self._largest)  # the output of the command fits
            return {"RLIMIT_FSIZE": size}, {}, f"{size} bytes"
        if place == "file handles":
            handles = rng.randrange(3, 15)  # with fewer, the command line itself cannot be imported
            return {"RLIMIT_NOFILE": handles}, {}, f"{handles} handles"
        if place == "memory":
            memory = int(rng.random() ** 3 * 3e8)
            return {"RLIMIT_AS": memory}, {}, f"{memory} bytes"
        if place == "full cache":
            return {}, {"MEDIM_CACHE": str(folder / "small" / "cache")}, ""
        if place == "full tracking":
            return {}, {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'small' / 'mlflow.db'}"}, ""
        return {}, {}, ""

    def _mount(self, folder: Path, kilobytes: int) -> None:
        self._enter("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder))

    def _enter(self, *words: str) -> None:
        """Run a program in the namespaces of the server."""
        target = ["nsenter", "--target", str(self.server.process_id), "--user", "--mount", "--preserve-credentials"]
        subprocess.run([*target, *words], check=True)


def format_limits(table: dict[str, LimitTrials]) -> str:
    """Format the results as a Markdown table: failed and passed commands by limit, and faults."""
    columns = ["command", *(f"{place}: failed, done" for place in PLACES), *FAULTS]
    rows = [
        [
            name,
            *(f"{test.failed[place]}, {test.passed[place]}" for place in PLACES),
            *(test.trials.tally.faults[kind] for kind in FAULTS),
        ]
        for name, test in table.items()
    ]
    return join_rows(columns, rows)
