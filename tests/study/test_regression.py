"""A study of regression on a planted linear effect, and verdicts of a metric of which lower is better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medim.config import FinetuneConfig, check_config
from medim.data.index.index import Index, build_index
from medim.evaluation.cases import write_parquet
from medim.evaluation.probing.label_budget import Budget
from medim.evaluation.probing.probe import ProbeOptions, probe
from medim.files import read_json
from medim.study.comparisons import build_comparisons
from medim.study.design import read_arms
from medim.study.report.report import write_study_page
from medim.study.results import open_results
from medim.study.results_table import SCHEMA
from medim.types import UsageError, UserError
from tests.study.conftest import COMMON, SHAPE

SUBJECTS = 40


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Pictures whose upper half is brighter by their label, a number from 100 to 139."""
    folder, rng = tmp_path_factory.mktemp("numbers"), np.random.default_rng(0)
    labels = ["image,label"]
    for n in range(SUBJECTS):
        picture = rng.normal(100, 5, SHAPE)
        picture[:4] += 3 * (n - SUBJECTS / 2)
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / f"picture{n:02d}.png")
        labels.append(f"picture{n:02d}.png,{100 + n}")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    return build_index(folder, "xray", labels=folder / "labels.csv")


@pytest.fixture(scope="module")
def config() -> FinetuneConfig:
    own = {"task": "regression", "head": {"name": "regression"}, "max_steps": 4, "eval_steps": [2]}
    config = check_config("finetune", {**COMMON, **own, "views": {"shape": list(SHAPE)}}, source="the test")
    assert isinstance(config, FinetuneConfig)
    return config


def test_a_study_of_numbers_compares_mean_absolute_errors(
    run_study: Callable[..., dict[str, Any]],
    numbers: Index,
    config: FinetuneConfig,
    encoders: list[Path],
    tmp_path: Path,
) -> None:
    arms = read_arms([f"tuned={encoders[0]}"], [f"frozen={encoders[0]}"])
    budgets = (Budget(labelled=12), Budget(labelled=24))
    options: dict[str, Any] = {"task": "regression", "config": config, "index": numbers, "arms": arms}
    summary = run_study(budgets=budgets, metric="mae", seeds=1, **options)
    assert (summary["metric"], summary["comparisons"]["metric"]) == ("mae", "mae")
    assert summary["comparisons"]["overall"].keys() == {"tuned", "frozen"}

    table = pq.read_table(tmp_path / "study" / "results.parquet").to_pylist()
    assert {row["metric"] for row in table} == {"true_value", "predicted_value"}
    assert {row["arm"] for row in table} == {"scratch", "tuned", "frozen", "untrained", "pixels"}

    results = open_results(tmp_path / "study")
    assert results.metrics == ("r2", "mae", "pearson")
    for row in summary["comparisons"]["rows"]:
        errors = {}
        for arm in (row["arm"], "scratch"):
            (columns,) = [
                c for run, c in results.values.items() if run[:2] == (arm, row["budget"]) and run.step is None
            ]
            errors[arm] = np.abs(columns["predicted_value"] - columns["true_value"]).mean()
        assert row["value"] == pytest.approx(errors[row["arm"]])
        assert row["difference"]["value"] == pytest.approx(errors[row["arm"]] - errors["scratch"])
        assert row["difference"]["low"] < row["difference"]["value"] < row["difference"]["high"]
        assert row["verdict"] != ("harm" if row["difference"]["value"] < 0 else "benefit")
        assert row["labels_saved"]
    frozen = next(row for row in summary["comparisons"]["rows"] if (row["arm"], row["budget"]) == ("frozen", "24"))
    assert frozen["value"] < frozen["scratch"]  # ridge finds the planted effect, four steps of training do not
    assert frozen["verdict"] == "benefit"

    page = write_study_page(tmp_path / "study").read_text()
    assert "Mean absolute error" in page
    assert "Lower is better" in page
    assert "R2" in page
    assert "Pearson correlation" in page
    assert len(read_json(tmp_path / "study" / "worst.json")["tiles"]) > 0


def test_a_metric_that_the_task_does_not_have_is_rejected(
    run_study: Callable[..., dict[str, Any]], numbers: Index, config: FinetuneConfig, encoders: list[Path]
) -> None:
    options: dict[str, Any] = {"task": "regression", "config": config, "index": numbers}
    with pytest.raises(UsageError, match="--metric auroc: expected one of r2, mae, pearson"):
        run_study(arms=read_arms([f"tuned={encoders[0]}"]), metric="auroc", **options)


def test_a_ridge_probe_finds_the_planted_effect(
    numbers: Index, index: Index, encoders: list[Path], tmp_path: Path
) -> None:
    options = ProbeOptions(protocol="ridge", store=tmp_path / "store")
    content = probe(encoders[0], numbers, tmp_path / "probe", options)
    rows = {row["features"]: row for row in content["rows"]}
    assert rows.keys() == {"encoder", "random", "pixels"}
    assert rows["pixels"]["r2"] > 0.5
    assert rows["pixels"]["alpha_source"] == "cross-validation"
    summary = {row["features"]: row for row in content["summary"]}
    for name in ("r2", "mae", "pearson"):
        low, high = rows["pixels"]["intervals"][name]
        assert low < rows["pixels"][name] < high
        assert summary["pixels"][name] == {"mean": rows["pixels"][name], "sd": None, "ci_low": low, "ci_high": high}
    cases = [
        row for row in pq.read_table(tmp_path / "probe" / "cases.parquet").to_pylist() if row["features"] == "pixels"
    ]
    errors = [abs(row["predicted_value"] - row["true_value"]) for row in cases]
    assert rows["pixels"]["mae"] == pytest.approx(np.mean(errors))
    assert [row["true_value"] for row in cases] == [float(row["label"]) for row in cases]
    with pytest.raises(UserError, match=r"expected numbers from .* as labels"):
        probe(encoders[0], index, tmp_path / "classes", options)


def write_results(folder: Path, error_by_arm: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Results of runs with errors of a given size, by arm and budget; returns the summary of the study."""
    rng, rows = np.random.default_rng(0), []
    for arm, errors in error_by_arm.items():
        for budget, size in errors.items():
            for seed in range(3):
                for step in (10, None):
                    scale = size if step is None else 2 * size
                    keys = {"arm": arm, "protocol": "finetune", "pretrain_seed": seed, "budget": budget}
                    keys |= {"n_labelled": int(budget), "subset_seed": 0, "step": step}
                    for n in range(30):
                        case = {**keys, "subject": f"s{n}", "case": f"c{n}"}
                        rows.append({**case, "metric": "true_value", "value": 100.0 + n})
                        error = scale * (1 + 0.1 * rng.normal()) * (-1) ** n
                        rows.append({**case, "metric": "predicted_value", "value": 100.0 + n + error})
    write_parquet(folder / "results.parquet", pa.Table.from_pylist(rows, SCHEMA))
    return {
        "metric": "mae",
        "steps": 20,
        "arms": [{"name": arm, "protocol": "finetune"} for arm in error_by_arm],
        "counts": {"labels": {"10/0": {}, "100/0": {}}},
    }


def test_a_smaller_error_is_a_benefit_and_saves_labels(tmp_path: Path) -> None:
    scratch = {"10": 8.0, "100": 4.0}
    arms = {"better": {"10": 4.0, "100": 2.0}, "worse": {"10": 16.0, "100": 8.0}}
    summary = write_results(tmp_path, {"scratch": scratch, **arms})
    comparisons = build_comparisons(tmp_path, summary)
    assert comparisons is not None
    assert comparisons["overall"] == {"better": "benefit", "worse": "harm"}
    rows = {(row["arm"], row["budget"]): row for row in comparisons["rows"]}
    assert rows["better", "10"]["difference"]["value"] == pytest.approx(-4, abs=0.2)
    assert rows["worse", "100"]["difference"]["value"] == pytest.approx(4, abs=0.2)
    assert rows["better", "10"]["labels_saved"]["equivalent_labels"]["value"]["value"] == pytest.approx(100, rel=0.1)
    assert rows["worse", "100"]["labels_saved"]["equivalent_labels"]["value"]["value"] == pytest.approx(10, rel=0.2)
    assert rows["better", "10"]["time_to_scratch"]["level"] == pytest.approx(8, abs=0.2)
    assert rows["better", "100"]["time_to_scratch"]["steps"]["value"]["value"] <= 20
    assert rows["worse", "10"]["time_to_scratch"]["steps"]["value"]["censored"] == "more than"
