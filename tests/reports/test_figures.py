"""Figures of the report: text alternatives, axis labels and tables of classifiers."""

from __future__ import annotations

import numpy as np
import pytest

from medim.reports.figures import line_plot, reliability_diagram, roc_curve, wilson_interval
from medim.tasks import find_task
from medim.tasks.task import CaseRow, RocPlot


def test_the_labels_of_a_logarithmic_axis_are_numbers_and_no_formulas() -> None:
    figure = line_plot({"encoder": [(0, 4.0), (1, 7.5)]}, "gradient norm", "Gradient norm before clipping", log=True)
    assert "mathdefault" not in figure.svg
    assert "$" not in figure.svg


def test_the_text_of_a_roc_curve_has_sensitivities_at_given_specificities() -> None:
    rates, sensitivities = np.array([0.0, 0.0, 0.1, 1.0]), np.array([0.0, 0.4, 0.7, 1.0])
    figure = roc_curve({"pneumonia": (rates, sensitivities)}, "ROC curve")
    assert figure.alt == (
        "pneumonia: sensitivity 0.40 at specificity 0.95, 0.70 at specificity 0.90, 0.70 at specificity 0.80."
    )


def test_calibration_has_the_number_of_images_and_an_interval_in_each_bin() -> None:
    confidence = np.array([0.62] * 10 + [0.95] * 40)
    is_correct = np.array([True] * 5 + [False] * 5 + [True] * 40)
    figure = reliability_diagram(confidence, is_correct, None, "Calibration")
    low, high = wilson_interval(5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Brown, Cai and DasGupta 2001, by hand
    assert "predicted 0.62, correct 0.50 (0.24 to 0.76; 10 images)" in figure.alt
    assert "(0.91 to 1.00; 40 images)" in figure.alt


def make_rows(probabilities: list[float], labels: list[int]) -> list[CaseRow]:
    names = ("normal", "pneumonia")
    return [
        {
            "image": f"i{number}",
            "subject": f"s{number}",
            "class": name,
            "probability": p if name == "pneumonia" else 1 - p,
            "label": names[label],
            "prediction": names[int(p > 0.5)],
        }
        for number, (p, label) in enumerate(zip(probabilities, labels, strict=True))
        for name in names
    ]


def test_two_classes_have_a_roc_curve_and_operating_points_with_intervals_over_subjects() -> None:
    rng = np.random.default_rng(0)
    labels = [0, 1] * 50
    probabilities = [float(p) for p in np.clip(rng.normal(np.array(labels) * 0.3 + 0.35, 0.15), 0.01, 0.99)]
    details = find_task("classification").describe_evaluation(make_rows(probabilities, labels), ["normal", "pneumonia"])
    roc = details.plots[0]
    assert isinstance(roc, RocPlot)
    assert list(roc.curves) == ["pneumonia"]
    table = next(table for table in details.tables if table.caption.startswith("Operating points for pneumonia"))
    assert [row[0].split(" (")[1] for row in table.rows[1:]] == [
        f"sensitivity of {share} % on these images)" for share in (80, 90, 95)
    ]
    for row, share in zip(table.rows[1:], (0.8, 0.9, 0.95), strict=True):
        assert float(row[1].split(" ")[0]) >= share
    positive, negative = np.array(probabilities)[1::2], np.array(probabilities)[::2]
    assert table.rows[0][1].startswith(f"{(positive >= 0.5).mean():.3f} (")
    assert table.rows[0][2].startswith(f"{(negative < 0.5).mean():.3f} (")


def test_images_of_one_class_have_no_roc_curve() -> None:
    details = find_task("classification").describe_evaluation(make_rows([0.2, 0.7], [1, 1]), ["normal", "pneumonia"])
    assert not any(isinstance(plot, RocPlot) for plot in details.plots)


def test_each_finding_has_a_curve_over_the_images_with_a_known_value() -> None:
    values = {"effusion": ["present", "absent", None, "absent"], "nodule": ["present"] * 4}
    rows: list[CaseRow] = [
        {"image": f"i{k}", "subject": f"s{k}", "class": name, "probability": 0.9 - 0.2 * k, "label": column[k]}
        for k in range(4)
        for name, column in values.items()
    ]
    (plot,) = find_task("classification", "multi_label").describe_evaluation(rows, list(values)).plots
    assert isinstance(plot, RocPlot)
    assert list(plot.curves) == ["effusion"]
    assert plot.curves["effusion"][1].tolist()[-1] == 1
