"""Print the tables of faults: `python -m tests.kill_harness kills|limits|pairs [COMMAND...]`."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.kill_harness.kills import SIGNALS, Tally, TaskTrials, format_table
from tests.kill_harness.limits import PLACES, PREFIX, LimitTrials, can_mount, format_limits
from tests.kill_harness.pairs import PairTrials, format_pairs
from tests.kill_harness.processes import ForkServer
from tests.kill_harness.tasks import SETUP, TASKS, publish_set, write_inputs

TRACKED = ("pretrain", "finetune", "study")  # commands that send records to MLflow


@contextmanager
def prepare(folder: Path, *, steps: int = 60, with_packages: bool = True) -> Iterator[tuple[ForkServer, Path]]:
    """Start a server and write the inputs; yields both."""
    with ExitStack() as stack:
        environment = {
            "MEDIM_CACHE": str(folder / "cache"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MPLBACKEND": "Agg",
            "MEDIM_MIRROR": stack.enter_context(publish_set()),
        }
        server = ForkServer(folder, environment, prefix=PREFIX if can_mount() else (), setup=SETUP)
        stack.callback(server.close)
        write_inputs(folder / "inputs", server, steps=steps, with_packages=with_packages)
        yield server, folder / "inputs"


def count_kills(
    server: ForkServer,
    inputs: Path,
    folder: Path,
    name: str,
    count: int,
    seed: int = 0,
    signals: Sequence[str] = SIGNALS,
) -> Tally:
    """Send at least `count` signals to a command."""
    test, rng = TaskTrials(name, TASKS[name], server, inputs, folder), random.Random(f"{name} {seed}")
    test.signals = signals
    for number in range(10 * count):
        if sum(test.tally.tried.values()) >= count:
            break
        test.run_trial(number, rng)
    return test.tally


def count_limits(server: ForkServer, inputs: Path, folder: Path, name: str, count: int, seed: int = 0) -> LimitTrials:
    """Run a command `count` times under each limit that applies to it."""
    test, rng = LimitTrials(TaskTrials(name, TASKS[name], server, inputs, folder)), random.Random(f"{name} {seed}")
    for place in list_places(name):
        for number in range(count):
            test.run_trial(number, place, rng)
    return test


def count_pairs(server: ForkServer, inputs: Path, folder: Path, name: str, count: int, seed: int = 0) -> PairTrials:
    """Run a command `count` times twice at once, in each way that applies to it."""
    task, rng = TASKS[name], random.Random(f"{name} {seed}")
    second = server.copy()
    test = PairTrials(TaskTrials(name, task, server, inputs, folder), second)
    kinds = ["one folder"] + ["one folder, --overwrite"] * task.replaceable + ["one folder, --resume"] * task.resumable
    for kind in [*kinds, "one cache", *(["one database"] if name.startswith(TRACKED) else [])]:
        for number in range(count):
            test.run_trial(number, kind, rng)
    second.close()
    return test


def list_places(name: str) -> list[str]:
    """List the limits of a command that this machine permits."""
    mounted = PLACES[:4] if can_mount() else ()
    places = [*mounted, *PLACES[4:]]
    return [place for place in places if place != "full tracking" or name.startswith(TRACKED)]


def main() -> None:
    """Print the tables of one command, or of all."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill_harness", description=__doc__)
    parser.add_argument("kind", choices=["kills", "limits", "pairs"])
    parser.add_argument("--count", type=int, help="signals per command, or runs per command and limit")
    parser.add_argument("--signal", choices=SIGNALS, help="only this signal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("commands", nargs="*", help=f"of: {', '.join(TASKS)}")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="medim-kills-") as place, prepare(Path(place)) as (server, inputs):
        kills, limits, pairs = dict[str, Tally](), dict[str, LimitTrials](), dict[str, PairTrials]()
        for number, name in enumerate(arguments.commands or TASKS):
            call = server, inputs, Path(place, f"trials{number}"), name
            if arguments.kind == "kills":
                signals = [arguments.signal] if arguments.signal else SIGNALS
                count = arguments.count or TASKS[name].default_count
                kills[name] = count_kills(*call, count, arguments.seed, signals)
                print(format_table({name: kills[name]}).splitlines()[-1], file=sys.stderr, flush=True)
            elif arguments.kind == "pairs":
                pairs[name] = count_pairs(*call, arguments.count or 2, arguments.seed)
                print(format_pairs({name: pairs[name]}).splitlines()[-1], file=sys.stderr, flush=True)
            else:
                limits[name] = count_limits(*call, arguments.count or 1, arguments.seed)
                print(format_limits({name: limits[name]}).splitlines()[-1], file=sys.stderr, flush=True)
    print(format_table(kills) if kills else format_pairs(pairs) if pairs else format_limits(limits))


if __name__ == "__main__":
    main()
