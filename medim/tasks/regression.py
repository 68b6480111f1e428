"""Regression: one number per image, learnt from labels that are numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from medim.data.index.index import ImageRecord, Index
from medim.tasks.task import (
    AgreementPlot,
    AnswerRow,
    CaseRow,
    CaseTable,
    ClassSource,
    ColumnType,
    EvaluationDetails,
    LabelledCase,
    MaskSource,
    Quantity,
    Task,
)
from medim.types import Array, Volume

MAX_VALUE = 1e38  # of a label, below the largest float32
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
TARGET = "value"  # the one class name of a network; label codes of a package may name a unit
N_WORST = 5


class Regression(Task):
    """A number per image. The head standardises the target; its constants are part of the model spec.

    Examples:
        >>> Regression().metrics
        ('r2', 'mae', 'pearson')
    """

    name = "regression"
    option = "regression"
    kind = "regressor"
    title = "regression"
    case_columns: ClassVar[Mapping[str, ColumnType]] = {"true_value": "number", "predicted_value": "number"}
    quantity: ClassVar[Quantity] = "value"
    monai_output = "features"
    study_column = "true_value"
    case_label = "Minus absolute error"
    worst_case_text = "with the largest absolute error"
    output_text = "one number per image"
    frozen_text = "a ridge regression"
    probe = "ridge"

    @property
    def target_remedy(self) -> str:
        """A table with numbers."""
        return "Use --labels CSV with the columns image,label and a number as label."

    def class_names(self, index: Index) -> tuple[str, ...]:
        """One target."""
        return (TARGET,)

    def accepts_labels(self, index: Index) -> bool:
        """Labels that are numbers, see `parse_number`."""
        return all(parse_number(record.label) is not None for record in index.records if record.label is not None)

    def label_form_error(self, index: Index) -> str:
        """Error message with the first label that is no number."""
        labels = (record.label for record in index.records if record.label is not None)
        label = next(label for label in labels if parse_number(label) is None)
        return (
            f"--task regression: expected numbers from -{MAX_VALUE:g} to {MAX_VALUE:g} as labels, got {label!r}. Use "
            "--labels CSV with columns image,label and numbers such as 12.5 or 1e-3, and leave unknown labels empty."
        )

    def find_training_error(self, index: Index) -> str | None:
        """Labels without a standard deviation: equal ones, or numbers so small that it is 0."""
        targets = self.encode_targets([record for record in index.records if record.label is not None], (TARGET,))
        if targets.std() > 0 and targets.min() < targets.max():
            return None
        return f"--task regression: expected labels that differ, got {targets[0, 0]:g} alone. Check the label column."

    def fit_head(
        self,
        head: Mapping[str, Any],
        records: Sequence[ImageRecord],
        classes: Sequence[str] = (),
        read_mask: MaskSource | None = None,
    ) -> dict[str, Any]:
        """The head with mean and standard deviation of the training labels."""
        targets = self.encode_targets(records, (TARGET,))
        if "mean" in head or "std" in head or not len(targets):
            return dict(head)
        return {**head, "mean": float(targets.mean()), "std": float(targets.std()) or 1.0}

    def encode_targets(self, records: Sequence[ImageRecord], classes: Sequence[str]) -> Array:
        """(N, 1) of numbers."""
        return np.array([[float(str(record.label))] for record in records], dtype=np.float64).reshape(-1, 1)

    def count_class_images(
        self, records: Sequence[ImageRecord], classes: Sequence[str], list_classes: ClassSource | None = None
    ) -> dict[str, int]:
        """None: the targets are numbers."""
        return {}

    def make_blank_targets(self, count: int, shape: Sequence[int]) -> Array:
        """(count, 2) of zeros."""
        return np.zeros((count, 2), np.float32)

    def to_answer(self, logits: Array, input_volume: Volume, volume: Volume) -> Array:
        """The number, (1,), in the unit of the labels."""
        return np.asarray(logits)

    def find_target_error(self, case: LabelledCase) -> tuple[str, str] | None:
        """A label that is no number."""
        if parse_number(case.record.label) is not None:
            return None
        return "unknown-class", f"expected a number as label, got {case.record.label!r}"

    def score_case(self, answer: Array, case: LabelledCase) -> list[CaseRow]:
        """One row: the label and the prediction."""
        truth = float(str(case.record.label))
        return [{"class": case.classes[0], "true_value": truth, "predicted_value": float(answer[0])}]

    def case_arrays(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> tuple[Array, Array]:
        """Predictions (N,) and labels (N,)."""
        predictions, truth = (np.array([row[n] for row in rows], float) for n in ("predicted_value", "true_value"))
        return predictions, truth

    def describe_evaluation(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> EvaluationDetails:
        """Prediction against label, and the images with the largest error."""
        if not rows:
            return EvaluationDetails()
        predictions, truth = self.case_arrays(rows, classes)
        errors = predictions - truth
        worst = np.argsort(-np.abs(errors), kind="stable")[:N_WORST]
        cells = [(rows[i]["image"], f"{truth[i]:.4g}", f"{predictions[i]:.4g}", f"{errors[i]:+.4g}") for i in worst]
        table = CaseTable(
            "The images with the largest errors", ("Image", "Label", "Predicted", "Predicted - label"), cells
        )
        plot = AgreementPlot({TARGET: list(truth)}, {TARGET: list(predictions)}, "Prediction against label", "value")
        return EvaluationDetails([plot], [table])

    def answer_columns(self, answer: Array, volume: Volume, classes: Sequence[str]) -> AnswerRow:
        """`value`, with twelve significant digits."""
        return {classes[0]: float(f"{float(answer[0]):.12g}")}

    def to_probe_columns(
        self, predictions: Array, records: Sequence[ImageRecord], classes: Sequence[str]
    ) -> dict[str, Array]:
        """Label and prediction."""
        return {"true_value": self.encode_targets(records, classes)[:, 0], "predicted_value": predictions}

    def to_study_rows(self, case_rows: Sequence[CaseRow]) -> list[tuple[str, float | None]]:
        """Prediction and label."""
        return [(name, case_rows[0][name]) for name in self.case_columns]

    def study_arrays(self, columns: Mapping[str, Array], classes: Sequence[str]) -> tuple[Array, Array]:
        """Predictions (N,) and labels (N,)."""
        return columns["predicted_value"], columns["true_value"]

    def study_case_scores(self, columns: Mapping[str, Array], classes: Sequence[str]) -> Array:
        """Minus the absolute error."""
        return np.asarray(-np.abs(columns["predicted_value"] - columns["true_value"]))

    def describe_study_case(self, columns: Mapping[str, Array], classes: Sequence[str], case: int) -> str:
        """Label and prediction."""
        return f"label {columns['true_value'][case]:.4g}, predicted {columns['predicted_value'][case]:.4g}"


def parse_number(label: str | None) -> float | None:
    """The number of a label; None if there is no label, or no decimal number of at most `MAX_VALUE` in size.

    Examples:
        >>> parse_number("12.5"), parse_number("-1e-3"), parse_number("1_178"), parse_number("1e202")
        (12.5, -0.001, None, None)
    """
    if not label or not NUMBER.fullmatch(label.strip()):
        return None
    number = float(label)
    return number if abs(number) <= MAX_VALUE else None
