"""Findings are learnt, measured, exported and predicted, each for itself; what is not known plays no part."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medim.config import FinetuneConfig, check_config
from medim.data.index.index import Index, build_index
from medim.evaluation.cases import read_cases
from medim.evaluation.evaluate import evaluate
from medim.export.export import export
from medim.files import read_json
from medim.models.serialization import locate_weights
from medim.predict.predict import predict
from medim.reports.report import write_report_page
from medim.tasks import TASKS
from medim.training.finetune.head_init import fit_finding_probes
from medim.training.finetune.run import finetune
from medim.training.finetune.targets import select_head
from medim.types import UserError

NAMES = ("left", "top", "never")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 noisy pictures, some bright on the left, some at the top; of some the left is not known."""
    folder = tmp_path_factory.mktemp("findings")
    rng = np.random.default_rng(0)
    present = rng.random((64, 2)) < 0.5
    images = rng.normal(0, 0.3, (64, 16, 16))
    images[present[:, 0], :, :6] += 2
    images[present[:, 1], :6] += 2
    rows = ["image,left,top,never"]
    for number, (left, top) in enumerate(present):
        np.save(folder / f"p{number:02d}.npy", images[number].astype(np.float32))
        rows.append(f"p{number:02d},{'' if number % 5 == 0 else int(left)},{int(top)},0")
    (folder.parent / f"{folder.name}.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def index(source: Path) -> Index:
    return build_index(source, "xray", labels=source.parent / f"{source.name}.csv")


@pytest.fixture(scope="module")
def config() -> FinetuneConfig:
    content: dict[str, Any] = {
        "task": "classification",
        "modality": "xray",
        "preprocessing": [{"op": "normalise", "method": "zscore"}],
        "views": {"shape": [16, 16]},
        "encoder": {"name": "convnet", "channels": [8, 8], "summary": "flatten", "hidden": 0, "summary_channels": 16},
        "head": {"name": "classification"},
        "head_init": "probe",
        "max_steps": 40,
        "batch_size": 16,
        "lr": 0.01,
    }
    found = check_config("finetune", content, source="test")
    assert isinstance(found, FinetuneConfig)
    return found


@pytest.fixture(scope="module")
def run(config: FinetuneConfig, index: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    finetune(config, index, folder / "run", store=folder / "store")
    return folder / "run"


def test_the_data_decides_for_the_head_and_the_log_says_so(
    config: FinetuneConfig, index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        changed = select_head(config, index)
    assert changed.head == {"name": "multi_label"}
    assert "3 findings" in caplog.text
    assert select_head(changed, index) is changed


def test_a_head_of_findings_does_not_take_classes(config: FinetuneConfig, cohort_index: Index) -> None:
    with pytest.raises(UserError, match="expected findings as labels, got classes"):
        select_head(config.model_copy(update={"head": {"name": "multi_label"}}), cohort_index)


def test_findings_are_learnt_and_measured_one_by_one(run: Path) -> None:
    summary = read_json(run / "summary.json")
    metrics = summary["val"]["metrics"]
    assert metrics["auroc_left"]["value"] > 0.95
    assert metrics["auroc_top"]["value"] > 0.95
    assert metrics["auroc_never"]["value"] is None
    assert metrics["auroc_left"]["n"] < metrics["auroc_top"]["n"] == summary["val"]["n"]
    spec = locate_weights(run)[1]
    assert spec.head is not None
    assert (spec.kind, spec.classes, spec.head["name"]) == ("multi_label_classifier", tuple(NAMES), "multi_label")


def test_an_evaluation_keeps_what_was_known_of_each_case(run: Path, index: Index, tmp_path: Path) -> None:
    found = evaluate(run, index, tmp_path / "out")
    assert found["task"] == "multi-label classification"
    rows = read_cases(tmp_path / "out" / "cases.parquet")
    assert {row["label"] for row in rows if row["class"] == "left"} == {"present", "absent", None}
    assert {row["label"] for row in rows if row["class"] == "never"} == {"absent"}
    assert len(rows) == 3 * found["n"]
    page = write_report_page(tmp_path / "out").read_text()
    assert "Labels per finding, images" in page


@pytest.mark.slow
def test_a_package_answers_with_a_probability_a_finding_and_no_class(
    run: Path, index: Index, source: Path, tmp_path: Path
) -> None:
    package = export(run, tmp_path / "package")
    rows = predict(package, index, tmp_path / "out")
    assert set(rows[0]) == {
        "image",
        "file",
        *(f"probability_{name}" for name in NAMES),
        "ood_score",
        "ood",
        "ood_feature_group",
        "ood_reason",
    }
    truth = {record.image: str(record.label) for record in index.records}
    for place, name in enumerate(("left", "top")):
        told = [truth[row["image"]].split("|")[place][0] for row in rows]
        high = [row[f"probability_{name}"] > 0.5 for row in rows if truth[row["image"]].split("|")[place][0] != "?"]
        assert np.mean(np.array(high) == np.array([sign == "+" for sign in told if sign != "?"])) > 0.9
    assert any(row["probability_left"] + row["probability_top"] > 1.5 for row in rows), "findings do not compete"
    content = read_json(tmp_path / "out" / str(rows[0]["file"]))
    assert "class" not in content
    assert set(content["probabilities"]) == set(NAMES)


def test_probes_of_findings_are_those_of_each_finding_on_the_rows_where_it_is_known() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(3, [1, 5, 0.1], (60, 3))
    labels = (rows - rows.mean(0) + rng.normal(0, rows.std(0)) > 0).astype(float)
    labels[rng.random(labels.shape) < 0.3] = np.nan
    labels[:, 2] = 0.0
    from medim.evaluation.probing.classifiers import linear_probe

    together = fit_finding_probes(rows, labels, seed=0)
    x = (torch.from_numpy(rows).float() - together.mean) / together.std
    got = torch.sigmoid(x @ together.weight.T + together.bias).numpy()
    for k in (0, 1):
        known = np.isfinite(labels[:, k])
        oracle = linear_probe(rows[known], labels[known, k].astype(int), rows, seed=0).predictions[:, 1]
        np.testing.assert_allclose(got[:, k], oracle, atol=1e-3)
    np.testing.assert_allclose(got[:, 2], 1 / 62, atol=1e-6)


def test_a_probe_of_findings_is_refused(run: Path, index: Index, tmp_path: Path) -> None:
    from medim.evaluation.probing.probe_cohort import open_probe_cohort

    with pytest.raises(UserError, match="expected one class per image, got findings"):
        open_probe_cohort(index, TASKS["classification"], locate_weights(run)[1], split_seed=0, store=tmp_path)
