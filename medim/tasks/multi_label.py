"""Multi-label classification: any number of findings per image, learnt from labels of the form `+a|-b|?c`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from medim.data.index.index import ImageRecord, Index
from medim.data.labels import encode_findings
from medim.metrics import METRICS
from medim.metrics.bootstrap import N_RESAMPLES, MetricEstimate, bootstrap_intervals
from medim.metrics.metric import MetricFunction
from medim.metrics.multi_label import mean_statistics, multi_label_metrics
from medim.metrics.ranking import compute_roc_curves
from medim.tasks.classification import probability_columns, unknown_label_error
from medim.tasks.task import (
    AnswerRow,
    CaseRow,
    CaseTable,
    ColumnType,
    EvaluationDetails,
    LabelledCase,
    RocPlot,
    Task,
    list_subjects,
    subtract_statistics,
)
from medim.types import Array, Volume

FINDING_TEXT = {1.0: "present", 0.0: "absent"}  # label in `cases.parquet`; None where the finding is unknown


class MultiLabel(Task):
    """Probability of each finding on its own. The labels select it under `--task classification`."""

    name = "multi_label"
    option = "classification"
    kind = "multi_label_classifier"
    title = "multi-label classification"
    case_columns: ClassVar[Mapping[str, ColumnType]] = {"probability": "number", "label": "text"}
    activation = "sigmoid"
    has_thresholds = True
    in_studies = False

    @property
    def _functions(self) -> dict[str, MetricFunction]:
        """Functions of the scores and the presence of one finding, by metric."""
        return {name: METRICS[name].functions[self.name] for name in self.metrics}

    def accepts_labels(self, index: Index) -> bool:
        """Findings, any number per image."""
        return bool(index.findings)

    def describe_labels(self, index: Index) -> str:
        """Number of findings."""
        return f"the labels are {len(index.findings)} findings, several per image"

    def label_form_error(self, index: Index) -> str:
        """Error message for labels that are classes."""
        return (
            "head multi_label: expected findings as labels, got classes. Use --labels CSV with one column per "
            "finding (1, 0 or empty), or --set head.name=classification."
        )

    def encode_targets(self, records: Sequence[ImageRecord], classes: Sequence[str]) -> Array | None:
        """(N, K) of 1 (present), 0 (absent) and NaN (unknown)."""
        return np.array([encode_findings(record.label, classes) for record in records], np.float32)

    def make_blank_targets(self, count: int, shape: Sequence[int]) -> Array:
        """(count, 2) of absent findings."""
        return np.zeros((count, 2), np.float32)

    def to_answer(self, logits: Array, input_volume: Volume, volume: Volume) -> Array:
        """Probabilities (K,), one per finding."""
        return sigmoid_probabilities(logits)

    def find_target_error(self, case: LabelledCase) -> tuple[str, str] | None:
        """A label without any finding of the network."""
        has_finding = bool(np.isfinite(encode_findings(case.record.label, case.classes)).any())
        return None if has_finding else unknown_label_error(case)

    def score_case(self, answer: Array, case: LabelledCase) -> list[CaseRow]:
        """One row per finding: its probability, and whether it is present."""
        finding_texts = [FINDING_TEXT.get(value) for value in encode_findings(case.record.label, case.classes)]
        columns = zip(case.classes, map(float, answer), finding_texts, strict=True)
        return [dict(zip(("class", "probability", "label"), column, strict=True)) for column in columns]

    def case_arrays(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> tuple[Array, Array]:
        """Probabilities and labels, 1, 0 or NaN (unknown): two of (N, K)."""
        finding_values = {word: value for value, word in FINDING_TEXT.items()} | {None: np.nan}
        columns = [row["probability"] for row in rows], [finding_values[row["label"]] for row in rows]
        probabilities, labels = (np.array(column, np.float64).reshape(-1, len(classes)) for column in columns)
        return probabilities, labels

    def summarise_cases(
        self, rows: Sequence[CaseRow], classes: Sequence[str], *, seed: int = 0, resamples: int = N_RESAMPLES
    ) -> dict[str, MetricEstimate]:
        """Means over the findings, then the metrics of each finding; see `medim.metrics.multi_label`."""
        arrays = self.case_arrays(rows, classes)
        return multi_label_metrics(
            self._functions, *arrays, classes, list_subjects(rows), seed=seed, resamples=resamples
        )

    def compare_cases(
        self, one: Sequence[CaseRow], two: Sequence[CaseRow], classes: Sequence[str], *, seed: int = 0
    ) -> dict[str, MetricEstimate]:
        """Differences of the means over the findings on the same resamples."""
        pair = [mean_statistics(self._functions, *self.case_arrays(rows, classes)) for rows in (one, two)]
        return bootstrap_intervals(subtract_statistics(*pair), list_subjects(one), seed=seed)

    def describe_evaluation(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> EvaluationDetails:
        """Images per finding and state."""
        probabilities, labels = self.case_arrays(rows, classes)
        counts = [(name, *(f"{n:,}" for n in _count_states(labels[:, k]))) for k, name in enumerate(classes)]
        table = CaseTable("Labels per finding, images", ("Finding", "present", "absent", "unlabelled"), counts)
        curves = compute_roc_curves(probabilities, labels, classes)
        plots = [RocPlot(curves, "ROC curves, one per finding")] if curves else []
        return EvaluationDetails(plots=plots, tables=[table])

    def answer_columns(self, answer: Array, volume: Volume, classes: Sequence[str]) -> AnswerRow:
        """`probability_<finding>`."""
        return probability_columns(answer, classes)

    def answer_content(self, columns: AnswerRow, classes: Sequence[str]) -> dict[str, object]:
        """`probabilities` by finding."""
        return {"probabilities": {name: columns[f"probability_{name}"] for name in classes}}


def sigmoid_probabilities(logits: Array) -> Array:
    """Logits (K,) of findings as probabilities, one per finding."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits.astype(np.float64))))


def _count_states(column: Array) -> tuple[int, int, int]:
    """Images with the finding present, absent and unknown."""
    return int((column == 1).sum()), int((column == 0).sum()), int(np.isnan(column).sum())
