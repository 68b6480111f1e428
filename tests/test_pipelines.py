"""What the studies share, and that they stay short enough to be read."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

PIPELINES = Path(__file__).parents[1] / "pipelines"
DOCS = PIPELINES.parent / "docs"


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Callable[[str], Any]]:
    """A module of the folder, which imports those beside it by their plain names, as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PIPELINES)
        yield importlib.import_module


@pytest.fixture(scope="module")
def evidence(pipeline: Callable[[str], Any]) -> Any:
    return pipeline("evidence")


@pytest.fixture(scope="module")
def calibration(pipeline: Callable[[str], Any]) -> Any:
    return pipeline("mutual_information")


@pytest.mark.parametrize(
    "study",
    [
        "xray_pneumonia",
        "mri_hippocampus",
        "mri_volume",
        "dim_stability",
        "smoke",
        "mutual_information",
        "anchors",
        "study_results",
    ],
)
def test_a_study_is_read_in_a_minute(study: str) -> None:
    assert len((PIPELINES / f"{study}.py").read_text().splitlines()) < 120


def test_a_finished_run_is_not_run_again(evidence: Any, tmp_path: Path) -> None:
    calls = []

    def run(out: Path, *, resume: bool) -> dict[str, Any]:
        calls.append(resume)
        (out / "summary.json").write_text('{"seconds": 2}')
        return {"seconds": 2}

    assert [evidence.run_once(tmp_path, run) for _ in range(3)] == [{"seconds": 2}] * 3
    assert calls == [True]


def test_a_table_takes_the_place_of_the_last_one_and_nothing_else(evidence: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\nkept\n<!-- /b -->\n")
    for value in ("1", "2"):
        evidence.write_section(page, "a", evidence.format_markdown_table(["x", "y"], [[value, "3"]]))
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
    statistic, subjects = evidence.read_dice(tmp_path)
    assert subjects == ["s-one", "s-two"]
    assert statistic(np.array([[1.0, 1.0], [1.0, 0.0]])) == pytest.approx([0.5, 0.3])


def test_a_history_splits_into_training_and_held_out_series(evidence: Any, tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("step,name,loss,chance,val\n1,dim,4.0,5.0,\n2,dim,3.0,5.0,\n2,dim,,,3.5\n")
    assert evidence.read_series(tmp_path) == {"dim": [(1, 4.0), (2, 3.0)], "held out dim": [(2, 3.5)]}


def test_curves_are_drawn_with_one_colour_a_setting(evidence: Any, tmp_path: Path) -> None:
    lines = {f"{name}, {seed}": [(n, n * seed) for n in range(1, 90)] for name in ("plain", "bound") for seed in (1, 2)}
    evidence.draw_curves(tmp_path / "figures" / "curves.svg", {"loss": lines, "z": lines}, {"loss": 5.0})
    drawing = (tmp_path / "figures" / "curves.svg").read_text()
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["curves.svg"]
    assert drawing.count(">plain<") == drawing.count(">bound<") == 1


def test_the_best_critic_is_the_log_ratio_of_the_densities(calibration: Any) -> None:
    x, y = calibration.draw_pairs(2, 1.5, 4, torch.Generator().manual_seed(0))
    r = math.sqrt(1 - math.exp(-1.5))
    together = multivariate_normal(cov=np.block([[np.eye(2), r * np.eye(2)], [r * np.eye(2), np.eye(2)]]))
    alone = multivariate_normal(cov=np.eye(2))
    expected = [[together.logpdf([*a, *b]) - alone.logpdf(a) - alone.logpdf(b) for b in y] for a in x]
    assert calibration.compute_log_ratio(x, y, 1.5)[:, 0, :, 0].numpy() == pytest.approx(np.array(expected))


@pytest.mark.parametrize("dimension", [2, 32])
def test_bounds_are_right_for_little_information_and_many_pairs(
    calibration: Any, dimension: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "TRUTHS", (1,))
    found = calibration.compute_estimates(dimension, 256, train=False)
    assert [found[name][0] for name in ("dv", "infonce", "nwj")] == pytest.approx([1, 1, 1], abs=0.06)


def test_training_raises_every_bound(calibration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TRUTHS", (2,))
    monkeypatch.setattr(calibration, "STEPS", 60)
    found = calibration.compute_estimates(2, 32, train=True)
    assert min(found[name][0] for name in ("dv", "infonce", "jsd")) > 0.3


def test_infonce_never_passes_the_log_of_the_batch_and_ends_there_and_jsd_at_two_log_two(calibration: Any) -> None:
    found = calibration.compute_estimates(8, 16, train=False)
    assert max(found["infonce"]) < math.log(16)
    assert found["infonce"][-1] == pytest.approx(math.log(16), abs=0.02)
    assert max(found["jsd"]) < 2 * math.log(2)
    assert found["jsd"][-1] == pytest.approx(2 * math.log(2), abs=0.05)
    assert found["dv"][-1] > 12  # of 10: too few pairs for its logarithm


def test_a_cell_says_up_to_where_an_estimate_is_right(calibration: Any) -> None:
    right = [float(truth) for truth in calibration.TRUTHS]
    assert calibration.format_bound_cell(right) == "**10** (2.0 / 6.0 / 10.0)"
    assert calibration.format_bound_cell([0.5, 1.0, 2.1, 2.5, 4.0, 6.0, 8.0, -3.0]) == "**2** (2.1 / 6.0 / lost)"
    assert calibration.format_bound_cell([0.0, *right[1:]]).startswith("**0** ")


def test_the_diagrams_of_the_site_are_those_that_the_code_draws(pipeline: Callable[[str], Any]) -> None:
    for sketch in pipeline("diagrams").SKETCHES:
        drawn = DOCS / "figures" / f"{sketch.__name__.replace('_', '-')}.svg"
        assert drawn.read_text() == str(sketch()), "python pipelines/pictures.py"


def test_every_figure_of_the_site_stands_on_a_page() -> None:
    pages = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert [figure.name for figure in (DOCS / "figures").iterdir() if f"figures/{figure.name})" not in pages] == []


def test_a_curve_drawn_twice_has_the_same_bytes(pipeline: Callable[[str], Any], tmp_path: Path) -> None:
    pictures = pipeline("pictures")
    for picture in (pictures.draw_channels, pictures.draw_linsker):
        picture(tmp_path / "a.svg")
        picture(tmp_path / "b.svg")
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
