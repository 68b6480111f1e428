"""What the studies share, and that they stay short enough to be read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PIPELINES = Path(__file__).parents[1] / "pipelines"


@pytest.fixture(scope="module")
def evidence() -> Any:
    spec = importlib.util.spec_from_file_location("evidence", PIPELINES / "evidence.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("study", ["xray_pneumonia", "mri_hippocampus", "dim_stability", "smoke"])
def test_a_study_is_read_in_a_minute(study: str) -> None:
    assert len((PIPELINES / f"{study}.py").read_text().splitlines()) < 100


def test_a_finished_run_is_not_run_again(evidence: Any, tmp_path: Path) -> None:
    calls = []

    def run(out: Path, *, resume: bool) -> dict[str, Any]:
        calls.append(resume)
        (out / "summary.json").write_text('{"seconds": 2}')
        return {"seconds": 2}

    assert [evidence.once(tmp_path, run) for _ in range(3)] == [{"seconds": 2}] * 3
    assert calls == [True]


def test_a_table_takes_the_place_of_the_last_one_and_nothing_else(evidence: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\nkept\n<!-- /b -->\n")
    for value in ("1", "2"):
        evidence.write_section(page, "a", evidence.markdown(["x", "y"], [[value, "3"]]))
    table = "| x | y |\n| --- | --- |\n| 2 | 3 |"
    assert page.read_text() == (
        f"before\n<!-- a -->\n\n{table}\n\n<!-- /a -->\nbetween\n<!-- b -->\nkept\n<!-- /b -->\n"
    )


def test_dice_is_the_mean_over_classes_then_cases(evidence: Any, tmp_path: Path) -> None:
    from medim.evaluation.cases import write_cases

    dice = {"one": (0.2, 0.4), "two": (0.6, 0.8)}
    rows = [
        {"image": image, "subject": f"s-{image}", "class": name, "dice": value}
        for image, values in dice.items()
        for name, value in zip(("front", "back"), values, strict=True)
    ]
    write_cases(tmp_path / "cases.parquet", rows, "segmenter")
    statistic, subjects = evidence.dice(tmp_path)
    assert subjects == ["s-one", "s-two"]
    assert statistic(np.array([[1.0, 1.0], [1.0, 0.0]])) == pytest.approx([0.5, 0.3])


def test_a_history_splits_into_training_and_held_out_series(evidence: Any, tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text(
        "step,name,loss,chance,held_out\n1,dim,4.0,5.0,\n2,dim,3.0,5.0,\n2,dim,,,3.5\n"
    )
    assert evidence.history(tmp_path) == {"dim": [(1, 4.0), (2, 3.0)], "held out dim": [(2, 3.5)]}


def test_curves_are_drawn_with_one_colour_a_setting(evidence: Any, tmp_path: Path) -> None:
    lines = {f"{name}, {seed}": [(n, n * seed) for n in range(1, 90)] for name in ("plain", "bound") for seed in (1, 2)}
    evidence.draw(tmp_path / "figures" / "curves.svg", {"loss": lines, "z": lines}, {"loss": 5.0})
    drawing = (tmp_path / "figures" / "curves.svg").read_text()
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["curves.svg"]
    assert drawing.count(">plain<") == drawing.count(">bound<") == 1
