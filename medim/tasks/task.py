"""Interface of a prediction task, and the data classes in which a task describes its report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from medim.data.index.index import ImageRecord, Index
from medim.data.labels import count_labels
from medim.metrics import build_statistics, list_metrics
from medim.metrics.bootstrap import N_RESAMPLES, MetricEstimate, bootstrap_intervals
from medim.metrics.metric import Statistic
from medim.types import Array, UserError, Volume

CaseRow = dict[str, Any]  # one case and class of an evaluation: key columns and `Task.case_columns`
AnswerRow = Mapping[str, str | float]  # columns of `predictions.csv`
ColumnType = Literal["text", "number"]
OutputActivation = Literal["none", "softmax", "sigmoid"]
Quantity = Literal["probability", "value"]
MaskSource = Callable[[ImageRecord], Array]  # reads the preprocessed mask (1, ...) of an image
_LABEL_MAP_REASONS = {"looks-like-label", "derived-label"}  # of rejected files
ClassSource = Callable[[ImageRecord], Sequence[int]]  # lists the numbers of the classes in the mask of an image
Inversion = Literal["none", "resample logits (order 1), then argmax"]


@dataclass(frozen=True)
class StripPlot:
    """One dot per case and group.

    Attributes:
        values: values of each group.
        label: axis label.
        title: title.
    """

    values: Mapping[str, Sequence[float]]
    label: str
    title: str


@dataclass(frozen=True)
class AgreementPlot:
    """Prediction against truth, one dot per case and group.

    Attributes:
        truth: true values of each group.
        predicted: predicted values of each group, in the same order.
        title: title.
        quantity: name of the values with their unit, for the axes.
    """

    truth: Mapping[str, Sequence[float]]
    predicted: Mapping[str, Sequence[float]]
    title: str
    quantity: str = "volume, ml"


@dataclass(frozen=True, eq=False)
class ReliabilityPlot:
    """Observed accuracy against predicted probability.

    Attributes:
        confidence: (N,) probability of the predicted class.
        is_correct: (N,) bool.
        title: title.
    """

    confidence: Array
    is_correct: Array
    title: str


@dataclass(frozen=True)
class RocPlot:
    """Receiver operating characteristic, one curve per class.

    Attributes:
        curves: false positive rates and sensitivities, both increasing from 0 to 1, by class.
        title: title.
    """

    curves: Mapping[str, tuple[Array, Array]]
    title: str


Plot = StripPlot | AgreementPlot | ReliabilityPlot | RocPlot


@dataclass(frozen=True)
class CaseTable:
    """A table of a report, cells as text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class EvaluationDetails:
    """Plots and tables of an evaluation, after the table and the plot of its metrics."""

    plots: Sequence[Plot] = ()
    tables: Sequence[CaseTable] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledCase:
    """An image with its target, and the classes of network and source.

    Attributes:
        record: the image.
        volume: the image as read.
        mask: its mask; None where the task is not dense.
        classes: classes of the network.
        source_classes: classes of the mask values 1, 2, ... in the source; empty if it names none.
    """

    record: ImageRecord
    volume: Volume
    mask: Volume | None
    classes: Sequence[str]
    source_classes: Sequence[str]

    @property
    def target(self) -> Volume:
        """The mask of a dense task.

        Raises:
            ValueError: there is no mask.
        """
        if self.mask is None:
            raise ValueError(f"{self.record.image}: expected a mask.")
        return self.mask


class Task(ABC):
    """A prediction task: targets of the images, answers of the network, metrics, and columns of the files.

    One instance per task is registered in `medim.tasks.TASKS`. The head and its loss are in `medim.models.heads`, under
    the task's name, and its metrics are the entries of `medim.metrics.METRICS` with its name. The defaults are those of
    a task that learns from one label per image and has one row per image and class.

    Attributes:
        name: key in `TASKS`, and name of the default head in `medim.models.heads.HEADS`.
        option: value of `--task` and of `task` in a configuration; several tasks may share one, and the labels decide.
        kind: network kind in model specs and packages.
        title: name in `metrics.json` and reports.
        activation: function of the logits, as a package specifies it.
        inversion: way back to the grid of the image, as a package specifies it.
        quantity: what the numbers of a per-image answer are, for DICOM structured reports.
        monai_output: format of the output in a MONAI bundle.
        dense: whether the answer is a label map on the grid of the image, with class 0 as background.
        has_thresholds: whether each class is called from a probability of its own (`threshold` of the label codes).
        has_class_labels: whether each label is a class, so that every label subset needs all of them.
        in_studies: whether `medim study` supports the task.
        study_column: metric in `results.parquet` that every run of the task has and no other task.
        case_label: axis label of the score of a case in a study.
        worst_case_text: the cases with the lowest score, as the end of a noun phrase.
        output_text: output of the network in a few words.
        frozen_text: parts that are trained on a frozen encoder in a study.
        probe: default entry of `medim.evaluation.probing.classifiers.PROBES` for frozen encoders; None: a head is
            trained on the frozen encoder.
    """

    name: ClassVar[str]
    option: ClassVar[str]
    kind: ClassVar[str]
    title: ClassVar[str]
    activation: ClassVar[OutputActivation] = "none"
    inversion: ClassVar[Inversion] = "none"
    quantity: ClassVar[Quantity] = "probability"
    monai_output: ClassVar[str] = "classes"
    dense: ClassVar[bool] = False
    has_thresholds: ClassVar[bool] = False
    has_class_labels: ClassVar[bool] = False
    in_studies: ClassVar[bool] = True
    study_column: ClassVar[str] = ""
    case_label: ClassVar[str] = ""
    worst_case_text: ClassVar[str] = ""
    output_text: ClassVar[str] = ""
    frozen_text: ClassVar[str] = "a decoder and head, by the same schedule"
    probe: ClassVar[str | None] = None

    @property
    @abstractmethod
    def case_columns(self) -> Mapping[str, ColumnType]:
        """Columns of `cases.parquet` between the key and the rejection columns; subclasses may use a class variable."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of its metrics in `medim.metrics.METRICS`, the primary one first."""
        return list_metrics(self.name)

    @property
    def metric(self) -> str:
        """Primary metric, which studies compare and a learning rate is chosen by."""
        return self.metrics[0]

    @property
    def target_field(self) -> Literal["mask", "label"]:
        """Column of the index that holds the targets."""
        return "mask" if self.dense else "label"

    @property
    def whole_views(self) -> bool:
        """Whether training views are whole images where the configuration leaves their shape open."""
        return not self.dense

    @property
    def target_remedy(self) -> str:
        """Sources of targets, as a sentence of an error message."""
        return "Use --labels CSV with the columns image,label."

    def describe_missing_targets(self, index: Index) -> str:
        """Describe an index without targets of this task, and the remedy."""
        count = len(index.records)
        n_maps = sum(rejection.reason in _LABEL_MAP_REASONS for rejection in index.rejected)
        maps = f" {n_maps} files are label maps that could not be joined to an image; see rejected.csv."
        return index.append_selection(
            f"{index.source_name}: none of {count} images has a {self.target_field}."
            f"{maps if self.dense and n_maps else ''} {self.target_remedy}"
        )

    @property
    def first_class_index(self) -> int:
        """Output channel (and label value) of the first class."""
        return 1 if self.dense else 0

    def count_outputs(self, classes: Sequence[str]) -> int:
        """Output channels of a network for these classes."""
        return len(classes) + self.first_class_index

    def class_names(self, index: Index) -> tuple[str, ...]:
        """Classes that a network learns from an index, without the background."""
        return index.labels

    def class_values(self, index: Index) -> tuple[int, ...]:
        """Value of each class in the mask files of an index; empty where the targets are not masks."""
        return ()

    def accepts_labels(self, index: Index) -> bool:
        """Whether the labels of an index are of the form that the task learns from."""
        return True

    def describe_labels(self, index: Index) -> str:
        """The labels of an index in a few words, for a log message."""
        return f"the labels are {len(self.class_names(index))} classes"

    def label_form_error(self, index: Index) -> str:
        """Error message where `accepts_labels` is false."""
        return f"head {self.name}: expected other labels than those of {index.source_name}."

    def find_training_error(self, index: Index) -> str | None:
        """Error message for labelled images from which the task cannot be learnt, or None."""
        return None

    def output_names(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Names of the output channels of a network for these classes."""
        return ("background", *classes) if self.dense else tuple(classes)

    def fit_head(
        self,
        head: Mapping[str, Any],
        records: Sequence[ImageRecord],
        classes: Sequence[str] = (),
        read_mask: MaskSource | None = None,
    ) -> dict[str, Any]:
        """The head section of the model spec, with constants of the training images where the task has some.

        Args:
            head: head section of the configuration.
            records: labelled training images; without any, the section stays as it is.
            classes: classes of the network.
            read_mask: reads the mask of an image, for a dense task.
        """
        if head.get("class_weights") != "balanced" or not records:
            return dict(head)
        return {**head, "class_weights": balance_weights(self.count_targets(records, classes, read_mask))}

    def count_targets(
        self, records: Sequence[ImageRecord], classes: Sequence[str], read_mask: MaskSource | None = None
    ) -> Array:
        """Count the training targets, images or voxels, of each output channel: (K,) int.

        Raises:
            ValueError: the targets are no classes.
        """
        raise ValueError(f"{self.title}: expected targets that are classes.")

    def count_class_images(
        self, records: Sequence[ImageRecord], classes: Sequence[str], list_classes: ClassSource | None = None
    ) -> dict[str, int]:
        """Count the images with each class; empty where the targets are no classes.

        Args:
            records: labelled images.
            classes: classes of the network.
            list_classes: lists the numbers of the classes in the mask of an image, for a dense task.
        """
        counts = count_labels(record.label for record in records)
        return {name: counts[name] for name in classes}

    @abstractmethod
    def encode_targets(self, records: Sequence[ImageRecord], classes: Sequence[str]) -> Array | None:
        """Training targets, first axis the images; None where the masks are the targets."""

    @abstractmethod
    def make_blank_targets(self, count: int, shape: Sequence[int]) -> Array:
        """Targets of `count` images of two classes for a dry run; `shape` is that of a view."""

    @abstractmethod
    def to_answer(self, logits: Array, input_volume: Volume, volume: Volume) -> Array:
        """The answer for an image.

        Args:
            logits: (K,), or (K, *input_volume.shape) of a dense task.
            input_volume: the image after preprocessing.
            volume: the image as read.
        """

    def find_class_error(self, classes: Sequence[str], source_classes: Sequence[str]) -> str | None:
        """Error message for a source whose classes are not those of the network, or None."""
        return None

    @abstractmethod
    def find_target_error(self, case: LabelledCase) -> tuple[str, str] | None:
        """Rejection code and detail of a case whose target cannot be scored, or None."""

    def read_truth(self, case: LabelledCase) -> Array:
        """Label map of a case in the class numbers of the network: (*volume.shape), for a dense task.

        Raises:
            ValueError: the task is not dense.
        """
        raise ValueError(f"{self.title}: expected a task with masks.")

    @abstractmethod
    def score_case(self, answer: Array, case: LabelledCase) -> list[CaseRow]:
        """Rows of one case, without the key columns.

        Args:
            answer: as `to_answer` returns it.
            case: the image and its target.
        """

    def clear_unmeasured_classes(self, rows: Sequence[CaseRow]) -> None:  # noqa: B027
        """Remove the metrics of classes that the truth of no case contains.

        Args:
            rows: rows of all cases of an evaluation that were not rejected; changed in place.
        """

    def case_arrays(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> tuple[Array, Array]:
        """Predictions and targets of the metrics, first axis the images, from rows that were not rejected."""
        raise NotImplementedError(f"{type(self).__name__}.case_arrays")

    def summarise_cases(
        self, rows: Sequence[CaseRow], classes: Sequence[str], *, seed: int = 0, resamples: int = N_RESAMPLES
    ) -> dict[str, MetricEstimate]:
        """Metrics of scored cases with 95 % intervals over subjects, the most important first.

        Args:
            rows: rows of cases that were not rejected.
            classes: classes of the network.
            seed: random seed of the bootstrap.
            resamples: number of resamples.
        """
        statistics = build_statistics(self.name, *self.case_arrays(rows, classes))
        return bootstrap_intervals(statistics, list_subjects(rows), seed=seed, resamples=resamples)

    def compare_cases(
        self, one: Sequence[CaseRow], two: Sequence[CaseRow], classes: Sequence[str], *, seed: int = 0
    ) -> dict[str, MetricEstimate]:
        """Metrics of one network minus those of another on the same cases, with intervals over subjects."""
        pair = [build_statistics(self.name, *self.case_arrays(rows, classes)) for rows in (one, two)]
        return bootstrap_intervals(subtract_statistics(*pair), list_subjects(one), seed=seed)

    def measure_recalls(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> dict[str, float]:
        """Fraction of the labelled images or voxels of each class that the network finds; none for other targets.

        Args:
            rows: rows of cases that were not rejected.
            classes: classes of the network.

        Returns:
            A fraction for each class that some case has.
        """
        return {}

    @abstractmethod
    def describe_evaluation(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> EvaluationDetails:
        """Plots and tables of an evaluation; rows as in `summarise_cases`."""

    @abstractmethod
    def answer_columns(self, answer: Array, volume: Volume, classes: Sequence[str]) -> AnswerRow:
        """Columns of `predictions.csv` for one image."""

    def answer_content(self, columns: AnswerRow, classes: Sequence[str]) -> dict[str, object]:
        """Content of the JSON file of an image, from `answer_columns`; not used by dense tasks."""
        return dict(columns)

    def to_probe_columns(
        self, predictions: Array, records: Sequence[ImageRecord], classes: Sequence[str]
    ) -> dict[str, Array]:
        """Columns of `cases.parquet` of a probe, from its predictions for N images.

        Raises:
            UserError: there are no probes of the task.
        """
        raise UserError(f"probe: expected a task with probes, got {self.title}.")

    def from_probe_columns(self, row: Mapping[str, Any]) -> list[CaseRow]:
        """Rows as `score_case` returns them, with the keys, from a row of `to_probe_columns`."""
        return [dict(row)]

    def study_metrics(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Names of the metrics of a study, the keys of `study_statistics`; the first is the primary metric."""
        return self.metrics

    def to_study_rows(self, case_rows: Sequence[CaseRow]) -> list[tuple[str, float | None]]:
        """Metrics of one case in `results.parquet`, from its rows per class.

        Raises:
            UserError: studies do not support the task.
        """
        raise UserError(f"study: expected a task that studies support, got {self.title}.")

    def study_arrays(self, columns: Mapping[str, Array], classes: Sequence[str]) -> tuple[Array, Array]:
        """Predictions and targets of the metrics, first axis the images, from a column (N,) per `to_study_rows`.

        Raises:
            UserError: studies do not support the task.
        """
        raise UserError(f"study: expected a task that studies support, got {self.title}.")

    def study_statistics(self, columns: Mapping[str, Array], classes: Sequence[str]) -> dict[str, Statistic]:
        """Metrics of one run of a study as functions of case weights.

        Args:
            columns: a column (N,) per metric of `to_study_rows`.
            classes: classes of the study.
        """
        return build_statistics(self.name, *self.study_arrays(columns, classes))

    def study_case_scores(self, columns: Mapping[str, Array], classes: Sequence[str]) -> Array:
        """Score (N,) of each case of a run; the lowest are the worst cases."""
        raise UserError(f"study: expected a task that studies support, got {self.title}.")

    def describe_study_case(self, columns: Mapping[str, Array], classes: Sequence[str], case: int) -> str:
        """The answer for one case of a run in a few words."""
        raise UserError(f"study: expected a task that studies support, got {self.title}.")


def balance_weights(counts: Array) -> list[float]:
    """Class weights inverse to the counts, with mean 1; a class without targets gets 1.

    Examples:
        >>> balance_weights(np.array([30, 10, 0]))
        [0.5, 1.5, 1.0]
    """
    is_present = counts > 0
    inverse = 1.0 / counts[is_present]
    weights = np.ones(len(counts))
    weights[is_present] = inverse / inverse.mean()
    return [float(weight) for weight in weights]


def list_subjects(rows: Sequence[CaseRow]) -> list[str]:
    """Subject of each image, in the order of the rows."""
    return [subject for _, subject in dict.fromkeys((row["image"], row["subject"]) for row in rows)]


def subtract_statistics(one: Mapping[str, Statistic], two: Mapping[str, Statistic]) -> dict[str, Statistic]:
    """One minus two of each statistic."""

    def subtract(first: Statistic, second: Statistic) -> Statistic:
        return lambda weights: first(weights) - second(weights)

    return {name: subtract(one[name], two[name]) for name in one}
