"""A number per image is learnt, evaluated, exported, predicted and reported."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from medim.config import FinetuneConfig, check_config
from medim.data.index.index import Index, build_index
from medim.evaluation.cases import read_cases
from medim.evaluation.evaluate import EvaluateOptions, evaluate
from medim.export.builder import ExportOptions
from medim.export.export import export
from medim.files import read_json
from medim.models.serialization import locate_weights
from medim.package.package import Package, load_package
from medim.predict.dicom.equipment import Equipment
from medim.predict.dicom.source import read_dicom_source
from medim.predict.dicom.structured_report import build_values_report
from medim.predict.predict import predict
from medim.reports.report import write_report_page
from medim.tasks import TASKS
from medim.training.finetune.run import finetune, open_labelled_cohort
from medim.training.finetune.targets import select_head
from medim.types import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 noisy pictures with a bright square each; the label is its area in mm2, far from 0 and 1."""
    folder = tmp_path_factory.mktemp("sizes")
    rng = np.random.default_rng(0)
    rows = ["image,label"]
    for number in range(80):
        side = 2 + number % 9
        image = rng.normal(0, 0.2, (16, 16))
        row, column = rng.integers(0, 16 - side + 1, 2)
        image[row : row + side, column : column + side] += 2
        np.save(folder / f"p{number:02d}.npy", image.astype(np.float32))
        rows.append(f"p{number:02d},{1000 + 10 * side**2 + rng.normal():.3f}")
    (folder.parent / f"{folder.name}.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def index(source: Path) -> Index:
    return build_index(source, "xray", labels=source.parent / f"{source.name}.csv")


@pytest.fixture(scope="module")
def config() -> FinetuneConfig:
    content: dict[str, Any] = {
        "task": "regression",
        "modality": "xray",
        "preprocessing": [],
        "views": {"shape": [16, 16]},
        "encoder": {"name": "convnet", "channels": [8, 8], "summary": "mean_max", "hidden": 0, "summary_channels": 16},
        "head": {"name": "regression", "maps": [-1]},
        "head_init": "probe",
        "max_steps": 80,
        "batch_size": 16,
        "lr": 1e-2,
        "warmup_steps": 5,
        "checkpoint_every_steps": 80,
    }
    checked = check_config("finetune", content, source="test")
    assert isinstance(checked, FinetuneConfig)
    return checked


@pytest.fixture(scope="module")
def run(config: FinetuneConfig, index: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    finetune(config, index, out, store=out.parent / "store", accelerator="cpu")
    return out


def test_the_size_of_a_square_is_learnt(run: Path) -> None:
    metrics = read_json(run / "summary.json")["val"]["metrics"]
    assert list(metrics) == ["r2", "mae", "pearson"]
    assert metrics["r2"]["value"] > 0.5
    assert metrics["pearson"]["value"] > 0.7
    assert metrics["mae"]["ci_low"] < metrics["mae"]["value"] < metrics["mae"]["ci_high"]


def test_constants_of_the_target_are_in_the_model_spec(run: Path, index: Index) -> None:
    spec = locate_weights(run)[1]
    with (run / "split.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    labels = np.array([float(row["label"]) for row in rows])
    assert spec["head"]["mean"] == pytest.approx(labels.mean())
    assert spec["head"]["std"] == pytest.approx(labels.std())
    assert (spec["kind"], list(spec["classes"]), spec["out_channels"]) == ("regressor", ["value"], 1)


def test_cases_have_label_and_prediction(run: Path) -> None:
    rows = read_cases(run / "cases.parquet")
    summary = read_json(run / "summary.json")["val"]["metrics"]
    errors = np.array([row["predicted_value"] - row["true_value"] for row in rows])
    truth = np.array([row["true_value"] for row in rows])
    assert summary["mae"]["value"] == pytest.approx(np.abs(errors).mean())
    assert summary["r2"]["value"] == pytest.approx(1 - (errors**2).sum() / ((truth - truth.mean()) ** 2).sum())


@pytest.fixture(scope="module")
def package(run: Path) -> Package:
    schema = run.parent / "labels.json"
    label = {"index": 0, "name": "value", "unit": {"value": "mm2", "meaning": "square millimeter"}}
    schema.write_text(json.dumps({"schema_version": 1, "labels": [label]}))
    export(run, run.parent / "package", ExportOptions(label_codes=str(schema)))
    return load_package(run.parent / "package")


@pytest.mark.slow
def test_a_package_predicts_the_number_of_the_run(
    package: Package, run: Path, index: Index, source: Path, tmp_path: Path
) -> None:
    assert package.contract.kind == "regressor"
    assert package.contract.labels[0].unit is not None
    assert package.contract.architecture["head"]["std"] > 1
    rows = predict(package, source, tmp_path / "answers")
    measured = {row["image"]: row["predicted_value"] for row in read_cases(run / "cases.parquet")}
    for row in rows:
        if row["image"] in measured:
            assert row["value"] == pytest.approx(measured[row["image"]], rel=1e-4)
    content = read_json(tmp_path / "answers" / rows[0]["file"])
    assert content["value"] == rows[0]["value"]
    result = evaluate(
        run.parent / "package",
        index,
        tmp_path / "evaluation",
        EvaluateOptions(split="all", include_training_subjects=True),
    )
    assert result["task"] == "regression"
    assert result["metrics"]["r2"]["value"] > 0.5
    page = write_report_page(tmp_path / "evaluation").read_text()
    assert "Mean absolute error" in page
    assert "Prediction against label" in page


def test_a_structured_report_has_the_number_and_its_unit(package: Package, shared_data: Path) -> None:
    xrays = build_index(shared_data / "xray-dicom" / "test2.dcm", "xray", remember=False)
    plan = xrays.plan_slices(xrays.records[0])
    assert plan is not None
    equipment = Equipment(package.contract, package.sha256)
    report = build_values_report(np.array([1234.5]), read_dicom_source(plan), equipment)
    measurements = [item for item in walk_content(report) if item.ValueType == "NUM"]
    values = [item.MeasuredValueSequence[0] for item in measurements]
    assert [float(value.NumericValue) for value in values] == [1234.5]
    unit = values[0].MeasurementUnitsCodeSequence[0]
    assert (unit.CodeValue, unit.CodingSchemeDesignator) == ("mm2", "UCUM")


def walk_content(item: Dataset) -> list[Dataset]:
    """All content items below an item of a report."""
    children = list(item.get("ContentSequence", []))
    return children + [inner for child in children for inner in walk_content(child)]


@pytest.mark.parametrize(
    "label", ["large", "nan", "inf", "1e202", "-1e39", "1_178", "١٢", "１２", "0x10", "1e", "95,17"]
)
def test_labels_that_are_no_numbers_are_refused(config: FinetuneConfig, index: Index, label: str) -> None:
    records = (replace(index.records[0], label=label), *index.records[1:])
    with pytest.raises(UserError, match=f"expected numbers from -1e\\+38 to 1e\\+38 as labels, got '{label}'"):
        select_head(config, replace(index, records=records))


def with_labels(index: Index, labels: Sequence[str]) -> Index:
    """The same images with other labels, repeated as often as needed."""
    records = tuple(replace(r, label=labels[n % len(labels)]) for n, r in enumerate(index.records))
    return replace(index, records=records)


@pytest.mark.parametrize("labels", [["5"], ["1e-300", "2e-300"]])
def test_labels_without_a_standard_deviation_are_refused(
    config: FinetuneConfig, index: Index, tmp_path: Path, labels: list[str]
) -> None:
    with pytest.raises(UserError, match="expected labels that differ"):
        open_labelled_cohort(config, with_labels(index, labels), split_seed=0, store=tmp_path)


@pytest.mark.parametrize(
    ("labels", "remedy"),
    [
        ([f"{1000 + 1.5 * n}" for n in range(40)], "40 different numbers for 80 images.*--task regression"),
        ([f"{18 + n % 30}" for n in range(80)], "30 different numbers for 80 images.*look like a measurement"),
        ([f"{n}" for n in range(80)], "80 different numbers for 80 images.*--task regression"),
        ([f"report {n}" for n in range(80)], "80 different labels for 80 images.*Check the label column"),
    ],
)
def test_classification_of_measurements_is_refused(
    config: FinetuneConfig, index: Index, tmp_path: Path, labels: list[str], remedy: str
) -> None:
    classes = config.model_copy(update={"task": "classification", "head": {"name": "classification"}})
    with pytest.raises(UserError, match=remedy):
        open_labelled_cohort(classes, with_labels(index, labels), split_seed=0, store=tmp_path)


@pytest.mark.parametrize("labels", [["0", "0.5", "1"], [f"{n}" for n in range(20)]])
def test_few_numbers_may_be_classes(index: Index, labels: list[str]) -> None:
    assert TASKS["classification"].find_training_error(with_labels(index, labels)) is None
