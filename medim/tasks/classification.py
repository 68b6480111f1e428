"""Classification: one class per image, learnt from labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from medim.data.index.index import ImageRecord, Index
from medim.metrics.bootstrap import MetricEstimate, bootstrap_intervals
from medim.metrics.ranking import choose_threshold, compute_roc_curves, operating_point_statistics
from medim.tasks.regression import parse_number
from medim.tasks.task import (
    AnswerRow,
    CaseRow,
    CaseTable,
    ColumnType,
    EvaluationDetails,
    LabelledCase,
    MaskSource,
    Plot,
    ReliabilityPlot,
    RocPlot,
    Task,
    list_subjects,
)
from medim.types import Array, Volume

TRUTH = "truth"  # metric in `results.parquet` that holds the number of the true class
N_MISTAKES = 5
OPERATING_SENSITIVITIES = (0.8, 0.9, 0.95)  # of the thresholds in the table of operating points
MAX_RARE_CLASSES = 10  # more classes than this need two images each, and integers if they are numbers
MAX_NUMBERS = 20  # more different numbers than this are measurements


class Classification(Task):
    """Probabilities of classes that exclude each other."""

    name = "classification"
    option = "classification"
    kind = "classifier"
    title = "classification"
    case_columns: ClassVar[Mapping[str, ColumnType]] = {"probability": "number", "label": "text", "prediction": "text"}
    activation = "softmax"
    has_class_labels = True
    probe = "linear"
    study_column = TRUTH
    case_label = "Probability of the true class"
    worst_case_text = "with the lowest probability of the true class"
    output_text = "one probability per class"
    frozen_text = "a logistic regression"

    def accepts_labels(self, index: Index) -> bool:
        """One class per image, no findings."""
        return not index.findings

    def find_training_error(self, index: Index) -> str | None:
        """Labels of a single class, or of too many classes."""
        if reason := _find_class_count_error(index):
            return f"--task classification: expected a label per class, got {reason}."
        if len(index.labels) > 1:
            return None
        return (
            f"--task classification: expected labels of 2 or more classes, got {index.labels[0]!r} alone. "
            "Add images of another class, or check the label column."
        )

    def encode_targets(self, records: Sequence[ImageRecord], classes: Sequence[str]) -> Array:
        """(N,) class indices."""
        return np.array([classes.index(str(record.label)) for record in records])

    def count_targets(
        self, records: Sequence[ImageRecord], classes: Sequence[str], read_mask: MaskSource | None = None
    ) -> Array:
        """Images of each class."""
        return np.bincount(self.encode_targets(records, classes), minlength=len(classes))

    def make_blank_targets(self, count: int, shape: Sequence[int]) -> Array:
        """(count,) of the first class."""
        return np.zeros(count, np.int64)

    def to_answer(self, logits: Array, input_volume: Volume, volume: Volume) -> Array:
        """Probabilities (K,) that sum to 1."""
        return softmax_probabilities(logits)

    def find_target_error(self, case: LabelledCase) -> tuple[str, str] | None:
        """A label that is no class of the network."""
        return None if case.record.label in case.classes else unknown_label_error(case)

    def score_case(self, answer: Array, case: LabelledCase) -> list[CaseRow]:
        """One row per class: its probability, the true class and the predicted class."""
        prediction = case.classes[int(answer.argmax())]
        return [
            {"class": name, "probability": float(p), "label": case.record.label, "prediction": prediction}
            for name, p in zip(case.classes, answer, strict=True)
        ]

    def case_arrays(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> tuple[Array, Array]:
        """Probabilities (N, K) and class indices (N,)."""
        return class_arrays(rows, classes)

    def measure_recalls(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> dict[str, float]:
        """Fraction of the images of each class with this prediction."""
        cases = rows[:: len(classes)]
        hits = {name: [row["prediction"] == name for row in cases if row["label"] == name] for name in classes}
        return {name: sum(matches) / len(matches) for name, matches in hits.items() if matches}

    def describe_evaluation(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> EvaluationDetails:
        """Reliability of the probabilities, the confusion matrix, and the most confident mistakes."""
        probabilities, labels = class_arrays(rows, classes)
        predictions, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        is_correct = predictions == labels
        counts = [
            [int(((labels == t) & (predictions == p)).sum()) for p in range(len(classes))] for t in range(len(classes))
        ]
        tables = [
            CaseTable(
                "Confusion matrix, images",
                ("True class", *(f"predicted {name}" for name in classes)),
                [(name, *(f"{n:,}" for n in row)) for name, row in zip(classes, counts, strict=True)],
            )
        ]
        images = [row["image"] for row in rows[:: len(classes)]]
        surest = sorted(np.flatnonzero(~is_correct), key=lambda place: -confidence[place])[:N_MISTAKES]
        wrong = [(images[i], classes[labels[i]], classes[predictions[i]], f"{confidence[i]:.3f}") for i in surest]
        if wrong:
            head = ("Image", "True class", "Predicted", "Probability")
            tables.append(CaseTable("The five most confident errors", head, wrong))
        plots: list[Plot] = [ReliabilityPlot(confidence, is_correct, "Calibration of the predicted probabilities")]
        shown = slice(1, 2) if len(classes) == 2 else slice(None)  # the curve of the first of two is the same, mirrored
        is_class = np.eye(len(classes))[labels][:, shown]
        if curves := compute_roc_curves(probabilities[:, shown], is_class, classes[shown]):
            plots.insert(
                0, RocPlot(curves, "ROC curve" + ("s, each class against the rest" if len(curves) > 1 else ""))
            )
        if len(classes) == 2 and curves and np.isfinite(probabilities).all():
            tables.append(_tabulate_operating_points(probabilities[:, 1], labels == 1, classes[1], list_subjects(rows)))
        return EvaluationDetails(plots, tables)

    def answer_columns(self, answer: Array, volume: Volume, classes: Sequence[str]) -> AnswerRow:
        """`class` and `probability_<class>`."""
        return {"class": classes[int(answer.argmax())], **probability_columns(answer, classes)}

    def answer_content(self, columns: AnswerRow, classes: Sequence[str]) -> dict[str, object]:
        """`class` and `probabilities` by class."""
        return {"class": columns["class"], "probabilities": {name: columns[f"probability_{name}"] for name in classes}}

    def to_probe_columns(
        self, predictions: Array, records: Sequence[ImageRecord], classes: Sequence[str]
    ) -> dict[str, Array]:
        """`probability_<class>` of each class."""
        return {f"probability_{name}": predictions[:, k] for k, name in enumerate(classes)}

    def from_probe_columns(self, row: Mapping[str, Any]) -> list[CaseRow]:
        """One row per class."""
        classes = [name.removeprefix("probability_") for name in row if name.startswith("probability_")]
        return [{**row, "class": name, "probability": row[f"probability_{name}"]} for name in classes]

    def to_study_rows(self, case_rows: Sequence[CaseRow]) -> list[tuple[str, float | None]]:
        """Probability of each class, and the number of the true class."""
        truth = [row["class"] for row in case_rows].index(case_rows[0]["label"])
        return [*((f"probability_{row['class']}", row["probability"]) for row in case_rows), (TRUTH, float(truth))]

    def study_arrays(self, columns: Mapping[str, Array], classes: Sequence[str]) -> tuple[Array, Array]:
        """Probabilities (N, K) and class indices (N,)."""
        return np.stack([columns[f"probability_{name}"] for name in classes], 1), columns[TRUTH].astype(np.intp)

    def study_case_scores(self, columns: Mapping[str, Array], classes: Sequence[str]) -> Array:
        """Probability of the true class."""
        probabilities, labels = self.study_arrays(columns, classes)
        return np.asarray(probabilities[np.arange(len(labels)), labels])

    def describe_study_case(self, columns: Mapping[str, Array], classes: Sequence[str], case: int) -> str:
        """True class with its probability, and predicted class."""
        probabilities, labels = self.study_arrays(columns, classes)
        score, predicted = probabilities[case, labels[case]], classes[int(probabilities[case].argmax())]
        return f"truth {classes[labels[case]]}, its probability {score:.3f}, predicted {predicted}"


def _tabulate_operating_points(scores: Array, positive: Array, name: str, subjects: Sequence[str]) -> CaseTable:
    """Sensitivity and specificity, with intervals over subjects, at 0.5 and at thresholds for given sensitivities."""
    thresholds = {"0.5 (the more probable class)": 0.5}
    for sensitivity in OPERATING_SENSITIVITIES:
        threshold = choose_threshold(scores, positive, sensitivity)
        thresholds[f"{threshold:.3g} (sensitivity of {100 * sensitivity:g} % on these images)"] = threshold
    rows = []
    for text, threshold in thresholds.items():
        estimates = bootstrap_intervals(operating_point_statistics(scores, positive, threshold), subjects)
        rows.append((text, *(_format_estimate(estimates[side]) for side in ("sensitivity", "specificity"))))
    caption = f"Operating points for {name}; thresholds selected on these images are optimistic"
    return CaseTable(caption, ("Threshold", "Sensitivity (95 % CI)", "Specificity (95 % CI)"), rows)


def _format_estimate(estimate: MetricEstimate) -> str:
    value, low, high = (estimate[key] for key in ("value", "ci_low", "ci_high"))
    if value is None:
        return "not defined"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _find_class_count_error(index: Index) -> str | None:
    """Describe labels that are no classes, with a remedy: measured numbers, or a label of its own for most images."""
    labels, count = index.labels, sum(record.label is not None for record in index.records)
    numbers = [number for number in map(parse_number, labels) if number is not None]
    is_often_unique, has_fractions = 2 * len(labels) > count, any(number % 1 for number in numbers)
    if len(numbers) == len(labels) > 2 and (
        len(labels) > MAX_NUMBERS
        or (has_fractions and (is_often_unique or len(labels) > MAX_RARE_CLASSES))
        or (is_often_unique and len(labels) > MAX_RARE_CLASSES)
    ):
        return (
            f"{len(labels)} different numbers for {count} images (first: {labels[0]}), which look like a measurement. "
            "Use --task regression; for classes, write words such as class-7"
        )
    if is_often_unique and len(labels) > MAX_RARE_CLASSES:
        return f"{len(labels)} different labels for {count} images (first: {labels[0]!r}). Check the label column"
    return None


def softmax_probabilities(logits: Array) -> Array:
    """Logits (K,) of classes that exclude each other as probabilities that sum to 1."""
    odds = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(odds / odds.sum())


def class_arrays(rows: Sequence[CaseRow], classes: Sequence[str]) -> tuple[Array, Array]:
    """Probabilities (N, K) and labels (N,) of a classifier's rows, without the rejected ones."""
    valid_rows = [row for row in rows if not row.get("rejected")]
    probabilities = np.array([row["probability"] for row in valid_rows], dtype=np.float64).reshape(-1, len(classes))
    labels = [classes.index(row["label"]) for row in valid_rows[:: len(classes)]]
    return probabilities, np.array(labels, dtype=np.intp)


def probability_columns(probabilities: Array, classes: Sequence[str]) -> dict[str, float]:
    """`probability_<class>` of each class, rounded to 6 decimals."""
    return {f"probability_{name}": round(float(p), 6) for name, p in zip(classes, probabilities, strict=True)}


def unknown_label_error(case: LabelledCase) -> tuple[str, str]:
    """Rejection code and detail of a label that the network does not know."""
    return "unknown-class", f"expected a label of {', '.join(case.classes)}, got {case.record.label!r}"
