from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medim.evaluation.probing.label_budget import Budget
from medim.files import write_json
from medim.study import time_estimate
from medim.study.design import Arm, Cell


def test_a_cell_that_was_stopped_says_nothing_of_how_long_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed, left = (Cell(Arm("scratch"), 0, Budget(4), subset) for subset in range(3))
    for cell, stops in ((whole, []), (resumed, [100, 150])):
        write_json(tmp_path / cell.folder / "summary.json", {"seconds": 30.0, "resumed_from_steps": stops})
    bench: Any = SimpleNamespace(out=tmp_path, is_complete=lambda cell: cell is not left)
    monkeypatch.setattr(time_estimate, "estimate_cell_seconds", lambda *_: 7.0)
    costs: Any = None
    assert time_estimate.DurationEstimator(bench, lambda: costs, [whole, resumed, left])(left) == 30.0
    assert time_estimate.DurationEstimator(bench, lambda: costs, [resumed, left])(left) == 7.0
