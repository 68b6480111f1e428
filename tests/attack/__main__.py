"""`python -m tests.attack FOLDER`: try the cases, and print a Markdown table of the faults."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.attack.archives import list_archive_cases
from tests.attack.base import build_base, isolated_environment
from tests.attack.bombs import list_bomb_cases
from tests.attack.case import FAULTS, MAX_SECONDS, UNPROTECTED, Attack, Case, Outcome
from tests.attack.child import import_medim, run_cases
from tests.attack.html import list_html_cases
from tests.attack.images import list_flip_cases, list_image_cases, list_series_cases
from tests.attack.inputs import list_handmade_cases, list_setting_cases
from tests.attack.names import list_name_cases
from tests.attack.packages import list_package_cases
from tests.attack.runs import list_run_cases, list_specs_without_a_key

ATTACKS = (
    Attack("image files, damage at random", list_image_cases),
    Attack("a series with one damaged slice", list_series_cases),
    Attack("one bit in packed mha and nrrd", list_flip_cases),
    Attack("text, weights, packages, checkpoints", list_run_cases),
    Attack("values of `--set`", list_setting_cases),
    Attack("hand-made YAML, dataset.json, CSV, sources", list_handmade_cases),
    Attack("specs without a key", list_specs_without_a_key),
    Attack("files that unpack to much", list_bomb_cases),
    Attack("archives", list_archive_cases),
    Attack("changed packages, safetensors that lie", list_package_cases),
    Attack("hostile names, links, pipes, devices", list_name_cases),
    Attack("markup in reports", list_html_cases),
)


def main(arguments: Sequence[str]) -> int:
    """Run the attacks.

    Returns:
        1 if there is a fault, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the runs and of the cases")
    parser.add_argument("--sample", type=int, default=0, help="number of cases; 0 for all")
    parser.add_argument("--only", default="", help="text that the titles of the attacks contain")
    parser.add_argument("--match", default="", help="text that the names of the cases contain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="number of cases at a time")
    parser.add_argument("--verbose", action="store_true", help="print the end of each case")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    with isolated_environment(folder):
        import_medim()
        base = build_base(folder / "base", full=not options.sample)
        attacks = {attack: attack.list_cases(base, options.seed) for attack in ATTACKS if options.only in attack.title}
        if options.sample:
            attacks = sample_cases(attacks, options.sample, options.seed)
        rows = [
            run_attack(attack, [case for case in cases if options.match in case.name], folder / "cases", options)
            for attack, cases in attacks.items()
        ]
    print("\n".join(["", *format_table(rows)]))
    return int(any(counts[kind] for _, counts, _ in rows for kind in FAULTS))


def sample_cases(attacks: dict[Attack, list[Case]], count: int, seed: int) -> dict[Attack, list[Case]]:
    """Draw cases of all attacks: one of each kind, and the rest at random.

    Args:
        attacks: all cases of each attack.
        count: number of cases in total; more if there are more kinds.
        seed: of the draw.
    """
    pairs = [(attack, case) for attack, cases in attacks.items() for case in cases if case.max_seconds == MAX_SECONDS]
    random.Random(seed).shuffle(pairs)
    kinds = {(attack.title, case.kind): (attack, case) for attack, case in pairs}
    chosen = [*kinds.values()]
    chosen += [pair for pair in pairs if pair not in chosen][: max(0, count - len(chosen))]
    return {attack: [case for other, case in chosen if other is attack] for attack in attacks}


def run_attack(
    attack: Attack, cases: Sequence[Case], work: Path, options: argparse.Namespace
) -> tuple[str, Counter[str], float]:
    """Run the cases of an attack, and print each fault.

    Returns:
        Title, number of cases by kind of finding and in total (`tried`), and seconds.
    """
    counts, start = Counter[str](tried=0), time.monotonic()
    peak, slowest = 0, 0.0
    for case, outcome, finding in run_cases(cases, work, options.jobs):
        counts["tried"] += 1
        peak, slowest = max(peak, outcome.peak_bytes), max(slowest, outcome.seconds)
        if finding:
            counts[finding.kind] += 1
        if finding and finding.kind != UNPROTECTED:
            print(f"FAULT {finding.kind} | {attack.title} | {case.name} | {finding.detail}", flush=True)
        if options.verbose:
            print(_format_outcome(case, outcome), flush=True)
    seconds = time.monotonic() - start
    faults = sum(counts[kind] for kind in FAULTS)
    print(
        f"{attack.title}: {counts['tried']} cases, {faults} faults, {seconds:.0f} s, slowest {slowest:.1f} s, "
        f"at most {peak / 2**30:.1f} GiB",
        flush=True,
    )
    return attack.title, counts, seconds


def _format_outcome(case: Case, outcome: Outcome) -> str:
    peak = f"{outcome.peak_bytes / 2**30:.1f} GiB"
    last_line = " ".join(outcome.output.split())[-300:]
    return f"{outcome.exit_code} | {outcome.seconds:.1f} s | {peak} | {case.name} | {last_line}"


def format_table(rows: Sequence[tuple[str, Counter[str], float]]) -> list[str]:
    """Format the counts as a Markdown table; other voxels of unprotected files are no fault."""
    kinds = (*FAULTS, UNPROTECTED)
    lines = [f"| attack | tried | {' | '.join(kinds)} |", "| --- |" + " --- |" * (len(kinds) + 1)]
    for title, counts, _ in rows:
        lines.append(f"| {title} | {counts['tried']} | {' | '.join(str(counts[kind]) for kind in kinds)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
