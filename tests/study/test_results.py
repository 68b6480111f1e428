from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medim.evaluation.cases import write_parquet
from medim.files import write_json
from medim.metrics.bootstrap import weighted_mean
from medim.study.results import RunKey, find_largest_grid, open_results
from medim.study.results_table import SCHEMA
from medim.types import UserError

VALUES = {"dice": (0.5, 0.7, 0.9), "hd95_ball": (1.0, None, 4.0)}


def write(folder: Path, runs: list[RunKey], missing: str = "") -> Path:
    """A study's folder with these runs, whose values grow by a tenth from run to run."""
    rows: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        keys = {"protocol": "finetune", "n_labelled": int(run.budget), **run._asdict()}
        for case, subject in enumerate(("s0", "s0", "s1")):
            if f"c{case}" != missing or number:
                rows += [
                    {
                        **keys,
                        "subject": subject,
                        "case": f"c{case}",
                        "metric": name,
                        "value": v[case] and v[case] + number,
                    }
                    for name, v in VALUES.items()
                ]
    table = pa.table({f.name: pa.array([row[f.name] for row in rows], f.type) for f in SCHEMA}, SCHEMA)
    write_parquet(folder / "results.parquet", table)
    write_json(folder / "summary.json", {"complete": True})
    return folder


GRID = [RunKey(arm, "10", s, t) for arm in ("scratch", "dim") for s in (0, 1) for t in (0, 1)]


def test_what_was_written_comes_back_as_grids_that_can_be_paired(tmp_path: Path) -> None:
    results = open_results(write(tmp_path, GRID))
    assert (results.arms, results.labelled, results.metrics) == (("scratch", "dim"), {"10": 10}, ("dice", "hd95_ball"))
    assert (results.cases, results.subjects) == (("c0", "c1", "c2"), ("s0", "s0", "s1"))
    weights = np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]])
    ours, scratch = results.paired_grids("dice", "dim", "10")
    assert ours[1][0](weights) == pytest.approx(6 + np.array([0.7, (1.0 + 0.9) / 3]))
    assert [[float(cell(weights)[0]) for cell in row] for row in scratch] == pytest.approx(
        np.array([[0.7, 1.7], [2.7, 3.7]])
    )


def test_a_value_that_is_not_defined_is_left_out_of_the_mean(tmp_path: Path) -> None:
    results = open_results(write(tmp_path, GRID))
    found = results.statistic("hd95_ball", GRID[0])
    assert found(np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])) == pytest.approx([2.5, np.nan], nan_ok=True)
    assert np.isnan(weighted_mean(np.array([np.nan]))(np.ones((1, 1)))).all()


def test_a_case_that_one_run_could_not_measure_is_left_out_of_all(tmp_path: Path) -> None:
    results = open_results(write(tmp_path, GRID, missing="c1"))
    assert (results.cases, results.subjects) == (("c0", "c2"), ("s0", "s1"))
    assert {len(column) for own in results.values.values() for column in own.values()} == {2}


def test_curves_have_the_steps_that_every_run_was_measured_at(tmp_path: Path) -> None:
    early = [run._replace(step=step) for run in GRID for step in (5, 10) if (run.subset_seed, step) != (1, 10)]
    results = open_results(write(tmp_path, [*GRID, *early]))
    assert results.steps("dim", "10") == [5]
    assert results.seeds("dim", "10") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    at_5 = results.grid("dice", "scratch", "10", step=5)
    assert float(at_5[0][0](np.ones((1, 3)))[0]) == pytest.approx(0.7 + len(GRID))


def test_a_stopped_study_gives_the_largest_grid_that_both_arms_have(tmp_path: Path) -> None:
    assert find_largest_grid([(0, 0), (1, 0), (2, 0), (0, 1)]) == [(0, 0), (1, 0), (2, 0)]
    assert find_largest_grid([(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert find_largest_grid([(0, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2)]) == [
        (s, t) for s in range(3) for t in (1, 2)
    ]
    assert find_largest_grid([]) == []
    results = open_results(write(tmp_path, GRID[:-1]))
    assert [len(row) for row in results.paired_grids("dice", "dim", "10")[0]] == [1, 1]
    assert results.paired_grids("dice", "vae", "10") == ([], [])


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none"):
        open_results(tmp_path)
    write(tmp_path, [])
    with pytest.raises(UserError, match="has no results yet"):
        open_results(tmp_path)
    with pytest.raises(UserError, match="not one of the 8 runs"):
        open_results(write(tmp_path, GRID)).statistic("dice", RunKey("dim", "99", 0, 0))
