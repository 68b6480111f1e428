"""Read the results of a study: statistics of its runs for pairing and resampling, and curves by step.

Example:
    results = open_results(Path("runs/study"))
    ours, scratch = results.paired_grids("dice", "dim", "10")  # lists of seeds of subsets each
    paired_difference(ours, scratch, results.subjects)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medim.metrics.metric import Statistic
from medim.migrations import read_migrated_json, rename_columns
from medim.study.content import StudySummary
from medim.study.design import SCRATCH
from medim.tasks import find_task_of_study
from medim.tasks.classification import TRUTH
from medim.tasks.task import Task
from medim.types import Array, UserError

StatisticGrid = list[list[Statistic]]  # [S][T]: weights (R, N) of the cases -> values (R,)
SeedPairs = Sequence[tuple[int, int]]  # pretraining seed and subset seed of some runs


class RunKey(NamedTuple):
    """Identification of a run; `step` is None for the result at its end."""

    arm: str
    budget: str
    pretrain_seed: int
    subset_seed: int
    step: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class StudyResults:
    """Results of a study, complete or stopped.

    Attributes:
        summary: content of `summary.json`.
        labelled: number of images in the first subset of each budget, smallest first.
        cases: (N,) evaluation cases with results in every run.
        subjects: (N,) subject of each case.
        values: columns (N,) by run and metric, as in `results.parquet`; NaN if not defined.
    """

    summary: StudySummary
    labelled: dict[str, int]
    cases: tuple[str, ...]
    subjects: tuple[str, ...]
    values: dict[RunKey, dict[str, Array]]

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, including the baselines of probes."""
        return tuple(dict.fromkeys(run.arm for run in self.values))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the class indices."""
        names = next(iter(self.values.values()))
        return tuple(name.partition("_")[2] for name in names if name.startswith(("probability_", "dice_")))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of the available metrics; the first is the primary metric of the task."""
        columns = next(iter(self.values.values()))
        return tuple(self.task.study_statistics(columns, self.classes))

    def seeds(self, arm: str, budget: str) -> list[tuple[int, int]]:
        """List the pretraining and subset seeds of the available runs."""
        return sorted({run[2:4] for run in self.values if run[:2] == (arm, budget) and run.step is None})

    def steps(self, arm: str, budget: str) -> list[int]:
        """List the steps of intermediate evaluations that every run of an arm and budget has."""
        runs = [run for run in self.values if run[:2] == (arm, budget) and run.step is not None]
        count = len(self.seeds(arm, budget))
        steps = sorted({run.step for run in runs if run.step is not None})
        return [step for step in steps if sum(run.step == step for run in runs) == count]

    def grid(
        self, metric: str, arm: str, budget: str, *, step: int | None = None, seeds: SeedPairs = ()
    ) -> StatisticGrid:
        """Build the grid of a metric of an arm at a budget: a list per pretraining seed of one per label subset.

        Args:
            metric: one of `metrics`.
            arm: one of `arms`.
            budget: key of `labelled`.
            step: one of `steps`; None for the end of the run.
            seeds: seeds of the runs, a complete grid; the default is the largest available one.

        Raises:
            UserError: a run does not exist.
        """
        pairs = sorted(seeds or find_largest_grid(self.seeds(arm, budget)))
        rows = dict.fromkeys(s for s, _ in pairs)
        return [[self.statistic(metric, RunKey(arm, budget, s, t, step)) for r, t in pairs if r == s] for s in rows]

    def shared_seeds(self, arm: str, budget: str, other: str = SCRATCH) -> list[tuple[int, int]]:
        """List the pretraining and subset seeds of the largest complete grid of runs of both arms."""
        return find_largest_grid([pair for pair in self.seeds(arm, budget) if pair in self.seeds(other, budget)])

    def paired_grids(
        self, metric: str, arm: str, budget: str, other: str = SCRATCH
    ) -> tuple[StatisticGrid, StatisticGrid]:
        """Build the grids of two arms over the largest complete grid of both; empty if there is none."""
        shared = self.shared_seeds(arm, budget, other)
        if not shared:
            return [], []
        return self.grid(metric, arm, budget, seeds=shared), self.grid(metric, other, budget, seeds=shared)

    def statistic(self, metric: str, run: RunKey) -> Statistic:
        """Build a metric of one run as a function of the case weights."""
        return self.task.study_statistics(self._columns(run), self.classes)[metric]

    def probabilities(self, run: RunKey) -> tuple[Array, Array]:
        """Get probabilities (N, K) and class indices (N,) of one run of a classifier."""
        columns = self._columns(run)
        return np.stack([columns[f"probability_{n}"] for n in self.classes], 1), columns[TRUTH].astype(np.intp)

    @cached_property
    def task(self) -> Task:
        """Task of the study, by the metrics of its runs."""
        return find_task_of_study(next(iter(self.values.values())))

    def _columns(self, run: RunKey) -> dict[str, Array]:
        if run not in self.values:
            raise UserError(f"results: {run} is not one of the {len(self.values)} runs of the study.")
        return self.values[run]


def open_results(folder: Path, summary: StudySummary | None = None) -> StudyResults:
    """Read the results in the folder of a study.

    Args:
        folder: folder of the study.
        summary: content of `summary.json`, if the file is not written yet.

    Raises:
        UserError: the folder contains no study, or the study has no results yet.

    Examples:
        >>> run = {"arm": "scratch", "budget": "all", "n_labelled": 8}
        >>> run |= {"pretrain_seed": 0, "subset_seed": 0, "step": None}
        >>> cases = [{**run, "case": name, "subject": name, "metric": "dice", "value": 0.8} for name in ("s1", "s2")]
        >>> pq.write_table(pa.Table.from_pylist(cases), "results.parquet")
        >>> results = open_results(Path(), summary={})
        >>> results.arms, results.cases
        (('scratch',), ('s1', 's2'))
    """
    if summary is None:
        summary = cast(StudySummary, read_migrated_json(folder / "summary.json", "study"))
    try:
        table = pq.read_table(folder / "results.parquet")
        table = table.rename_columns(rename_columns(table.column_names, "results"))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{folder}: no readable results of a study ({error}). Run `medim study --resume`.") from error
    if not len(table):
        raise UserError(f"{folder}: the study has no results yet. Run `medim study --resume`.")
    text = {name: table[name].to_pylist() for name in ("arm", "budget", "pretrain_seed", "subset_seed", "step")}
    runs = [RunKey(*keys) for keys in zip(*text.values(), strict=True)]
    cases, case_codes = _encode_column(table["case"])
    metrics, metric_codes = _encode_column(table["metric"])
    numbers = table["value"].to_numpy(zero_copy_only=False).astype(np.float64)
    starts = [0, *(place for place in range(1, len(runs)) if runs[place] != runs[place - 1]), len(runs)]
    values: dict[RunKey, dict[str, Array]] = {}
    complete = np.ones(len(cases), dtype=bool)
    for start, end in pairwise(starts):
        run_columns = values[runs[start]] = {}
        for code in dict.fromkeys(metric_codes[start:end].tolist()):
            rows = start + np.flatnonzero(metric_codes[start:end] == code)
            run_columns[metrics[code]] = column = np.full(len(cases), np.nan)
            column[case_codes[rows]] = numbers[rows]
        complete &= np.isin(np.arange(len(cases)), case_codes[start:end])
    subject_by_case = dict(zip(table["case"].to_pylist(), table["subject"].to_pylist(), strict=True))
    complete_cases = [name for name, is_complete in zip(cases, complete, strict=True) if is_complete]
    return StudyResults(
        summary=summary,
        labelled=dict(sorted(_count_labelled_images(table).items(), key=lambda item: item[1])),
        cases=tuple(complete_cases),
        subjects=tuple(subject_by_case[name] for name in complete_cases),
        values={
            run: {name: column[complete] for name, column in run_columns.items()} for run, run_columns in values.items()
        },
    )


def find_largest_grid(seeds: SeedPairs) -> list[tuple[int, int]]:
    """Find the largest complete grid of pretraining seeds by subset seeds, in a study that may have been stopped."""
    available = set(seeds)
    best: list[tuple[int, int]] = []
    subsets = sorted({t for _, t in available})
    if len(available) == len({s for s, _ in available}) * len(subsets):
        return sorted(available)
    for columns in (choice for count in range(1, len(subsets) + 1) for choice in combinations(subsets, count)):
        rows = [s for s in sorted({s for s, _ in available}) if all((s, t) in available for t in columns)]
        if len(rows) * len(columns) > len(best):
            best = [(s, t) for s in rows for t in columns]
    return best


def _encode_column(column: pa.ChunkedArray) -> tuple[list[str], Array]:
    """List the distinct values of a column in order, and the index of the value of each row."""
    rows = column.to_pylist()
    codes = {name: code for code, name in enumerate(dict.fromkeys(rows))}
    return list(codes), np.array([codes[name] for name in rows], dtype=np.intp)


def _count_labelled_images(table: pa.Table) -> dict[str, int]:
    rows = zip(*(table[name].to_pylist() for name in ("budget", "n_labelled", "subset_seed")), strict=True)
    return {budget: labelled for budget, labelled, subset in set(rows) if subset == 0}
