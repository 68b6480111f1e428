from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Study = Callable[..., dict[str, Any]]


def test_a_study_runs_every_arm_at_every_budget_and_says_so(run_study: Study, tmp_path: Path) -> None:
    summary = run_study()
    print(summary)
    assert summary["complete"]
