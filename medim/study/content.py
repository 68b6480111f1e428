"""Content of the JSON files of a study: `summary.json` and `audit.json`."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs this form before Python 3.12

from medim.data.contamination import ContaminationCounts
from medim.metrics.bootstrap import MetricEstimate
from medim.study.design import ArmProtocol
from medim.study.statistics.intervals import ComparisonVerdict, VarianceSource


class ArmEntry(TypedDict):
    """An arm, with the SHA-256 of the weights of its encoders."""

    name: str
    protocol: ArmProtocol
    encoders: list[str]


class SplitCounts(TypedDict):
    """Number of images and subjects of a split."""

    images: int
    subjects: int


class SubsetCounts(SplitCounts):
    """Number of images and subjects of a label subset, and of its images by class."""

    classes: dict[str, int]


class CohortCounts(TypedDict):
    """Numbers of images of a study; `labels` are the label subsets by budget and seed."""

    images: int
    rejected: int
    unlabelled: int
    splits: dict[str, SplitCounts]
    classes: list[str]
    labels: dict[str, SubsetCounts]


class CensoredEntry(TypedDict):
    """See `medim.study.statistics.labels_saved.CensoredValue`."""

    value: float
    censored: str


class CensoredIntervalEntry(TypedDict):
    """See `medim.study.statistics.labels_saved.CensoredInterval`."""

    value: CensoredEntry
    low: CensoredEntry
    high: CensoredEntry


class LabelsSavedEntry(TypedDict):
    """See `medim.study.statistics.labels_saved.LabelsSaved`; `sentence` is its description."""

    equivalent_labels: CensoredIntervalEntry
    saved: CensoredIntervalEntry
    ratio: CensoredIntervalEntry
    variance_sources: list[VarianceSource]
    sentence: str


class TimeToScratchEntry(TypedDict):
    """Steps to the final level of scratch; see `medim.study.statistics.labels_saved.TimeToLevel`."""

    level: float
    steps: CensoredIntervalEntry
    variance_sources: list[VarianceSource]


class DifferenceEntry(TypedDict):
    """See `medim.study.statistics.intervals.ConfidenceInterval`; `scope` is its description."""

    value: float
    low: float
    high: float
    error: float
    df: float
    variance_sources: list[VarianceSource]
    seeds: int
    subsets: int
    subjects: int
    scope: str


class ComparisonRow(TypedDict):
    """Comparison of an arm with scratch at a budget; see `medim.study.statistics.intervals.Comparison`."""

    arm: str
    budget: str
    n_labelled: int
    value: float
    scratch: float
    difference: DifferenceEntry
    p: float
    p_corrected: float
    verdict: ComparisonVerdict
    labels_saved: LabelsSavedEntry | None
    time_to_scratch: TimeToScratchEntry | None


class ComparisonTable(TypedDict):
    """All comparisons with scratch, and the verdict of each arm over all budgets."""

    metric: str
    resamples: int
    overall: dict[str, ComparisonVerdict]
    rows: list[ComparisonRow]


LearningRateEntry = TypedDict(
    "LearningRateEntry",
    {
        "lr": float | None,
        "multiple": float | None,
        "from": Literal["selection", "fixed"],
        "scores": dict[str, float | None],  # by factor on the learning rate of the preset
    },
)


class CellFailure(TypedDict):
    """A cell that failed, with the error message."""

    cell: str
    reason: str


class LostClassEntry(TypedDict):
    """A fine-tuned cell whose model does not find some classes, with the fraction of their labels that it finds."""

    cell: str
    classes: dict[str, float]


class CellCounts(TypedDict):
    """State of the cells."""

    all: int
    done: int
    left: list[str]
    failed: list[CellFailure]


class PreparationFacts(TypedDict):
    """Entries of `summary.json` that are recorded before the first cell; files of earlier versions lack some."""

    arms: list[ArmEntry]
    counts: CohortCounts
    train_val_duplicates: dict[str, int]
    contamination: dict[str, list[ContaminationCounts | None]]
    n_selection_labels: NotRequired[dict[str, int]]
    strict: NotRequired[bool]
    no_lr_selection: NotRequired[dict[str, str]]
    jobs: NotRequired[int]


class StudyFacts(PreparationFacts):
    """Entries of `summary.json` that are not derived from the cells."""

    wall_hours: NotRequired[float]
    rejected_cases: NotRequired[int]
    command_line: NotRequired[str]


class StudySummary(StudyFacts):
    """Content of `summary.json`."""

    schema_version: int
    command: str
    task: str
    complete: bool
    metric: str
    metric_rule: NotRequired[int]
    budgets: dict[str, int]
    seeds: int
    probe_seeds: NotRequired[int | None]
    split_seed: int
    eval_steps: list[int]
    steps: int
    learning_rates: dict[str, dict[str, LearningRateEntry]]
    cells: CellCounts
    lost_classes: NotRequired[list[LostClassEntry]]
    cell_hours: float
    n_resumed_cells: int
    peak_memory_bytes: int | None
    device: str | None
    config_hash: str
    index_hash: str
    where: NotRequired[str | None]
    versions: dict[str, str]
    comparisons: ComparisonTable | None


class DuplicatePair(TypedDict):
    """See `medim.study.audit.duplicates.NearDuplicate`."""

    train_image: str
    other_image: str
    hamming_distance: int


class DuplicateEntry(TypedDict):
    """See `medim.study.audit.duplicates.Duplicates`."""

    exact: list[list[str]]
    near: list[DuplicatePair]
    max_hamming_distance: int
    images: int
    n_unhashed: int


class PredictionEntry(TypedDict):
    """See `medim.study.audit.shortcuts.PredictionResult`."""

    auroc: MetricEstimate
    balanced_accuracy: MetricEstimate
    chance: dict[str, float]
    p_value: NotRequired[float]
    above_chance: bool
    classifier: str


class ShortcutEntry(TypedDict):
    """See `medim.study.audit.shortcuts.Shortcut`."""

    name: str
    features: list[str]
    varies: bool
    prediction: PredictionEntry


class GroupProbeEntry(TypedDict):
    """See `medim.study.audit.audit.GroupProbe`."""

    column: str
    features: str
    values: list[str]
    excluded: list[str]
    prediction: PredictionEntry


class GroupEntry(TypedDict):
    """See `medim.study.audit.groups.GroupMetrics`."""

    model: str
    column: str
    value: str
    images: int
    subjects: int
    metrics: dict[str, MetricEstimate] | None


class AuditContent(TypedDict):
    """Content of `audit.json`; see `medim.study.audit.audit.Audit`."""

    schema_version: int
    images: dict[str, SplitCounts]
    duplicates: DuplicateEntry
    shortcuts: list[ShortcutEntry]
    models: dict[str, dict[str, MetricEstimate]]
    probes: list[GroupProbeEntry]
    groups: list[GroupEntry]
    notes: list[str]
