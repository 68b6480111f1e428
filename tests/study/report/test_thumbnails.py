from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medim.evaluation.probing.label_budget import Budget
from medim.files import read_json
from medim.study.report.report import write_study_page


@pytest.fixture
def small(run_study: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    run_study(budgets=(Budget(labelled=4),), seeds=1)
    return tmp_path / "study"


def test_a_study_ends_with_its_page_its_worst_cases_and_the_health_of_its_encoders(small: Path) -> None:
    worst, runs = read_json(small / "worst.json"), read_json(small / "pretraining.json")["arms"]["dim"]
    assert (worst["arm"], worst["budget"], len(worst["tiles"])) == ("dim", "4", 6)
    shown = [float(tile["caption"].split("probability ")[1].split(",")[0]) for tile in worst["tiles"]]
    assert shown == sorted(shown)
    assert all(tile["source"].startswith("data:image/jpeg") for tile in worst["tiles"])
    assert len(runs) == 2
    assert all(run["curves"][0]["name"] == "local_dim" and run["curves"][0]["chance"] for run in runs)
    html = (small / "report.html").read_text()
    assert all(tile["source"] in html and tile["alt"].split(":")[0] in html for tile in worst["tiles"])
    assert "dim, encoder 1: Loss of local_dim" in html
    assert "do not send it outside your site" in html
    assert len(html) < 5_000_000
    assert str(small.parent) not in html
    assert write_study_page(small).read_text() == html
