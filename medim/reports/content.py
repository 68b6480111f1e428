"""Parts of the JSON files of runs and evaluations that the page shows, to check the files when they are read."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict  # pydantic needs this form before Python 3.12

from medim.data.contamination import ContaminationCounts
from medim.evaluation.case_pictures import CasePicture
from medim.metrics.bootstrap import MetricEstimate
from medim.types import Step


class LossContent(TypedDict, total=False):
    """First, last and validation loss of a term."""

    first: float | None
    last: float | None
    val: float | None


class ProbeContent(TypedDict):
    """Result of the online probe."""

    value: float
    metric: str
    protocol: str


class SelectionContent(TypedDict):
    """Selected checkpoint."""

    step: int
    reason: str


class MachineContent(TypedDict, total=False):
    """Resources of a run."""

    peak_memory_bytes: int | None
    device: str | None


class PretrainContent(MachineContent, total=False):
    """Content of `summary.json` of a pretraining run."""

    verdict: str
    loss: dict[str, LossContent]
    chance: dict[str, float | None]
    objectives: dict[str, float]
    probe: ProbeContent | None
    checkpoint_selection: SelectionContent | None
    dataloader_wait_fraction: float | None
    steps: int
    rankme: float | None
    feature_std: float | None


class MetricsContent(TypedDict, total=False):
    """Metrics of the validation split."""

    n: int | None
    subjects: int | None
    metric_rule: int
    metrics: dict[str, MetricEstimate]


class FinetuneContent(MachineContent, total=False):
    """Content of `summary.json` of a fine-tuning run."""

    task: str
    init: str
    val: MetricsContent | None
    lost_classes: dict[str, float]
    contamination: ContaminationCounts | None
    n_labelled: int | None
    index_hash: str


class _EvaluationNumbers(TypedDict):
    metrics: dict[str, MetricEstimate]
    classes: list[str]
    split: str
    task: str


class EvaluationContent(_EvaluationNumbers, total=False):
    """Content of `metrics.json` of an evaluation."""

    n: int | None
    subjects: int | None
    metric_rule: int
    init: str | None
    contamination: ContaminationCounts | None


class ComparedContent(TypedDict, total=False):
    """Content of `summary.json` of a run or an evaluation that may be compared with another one."""

    task: str
    init: str | None
    index_hash: str
    classes: list[str]
    n_labelled: int | None
    metric_rule: int
    metrics: dict[str, MetricEstimate]
    val: MetricsContent | None


class CurveContent(TypedDict):
    """Loss curve of a term."""

    name: str
    points: list[list[float]]
    val: list[list[float]]
    chance: float | None


class HealthContent(TypedDict):
    """Recorded health of a pretraining run."""

    verdict: str
    steps: int | None
    loss: dict[str, LossContent]
    chance: dict[str, float | None]
    rankme: float | None
    feature_std: float | None
    curves: list[CurveContent]


class PretrainingContent(TypedDict):
    """Content of `pretraining.json` of a study."""

    arms: dict[str, list[HealthContent | None]]


class PicturesContent(TypedDict):
    """Content of `pictures.json` of an evaluation."""

    pictures: list[CasePicture]


class WorstCasesContent(TypedDict):
    """Content of `worst.json` of a study."""

    arm: str | None
    budget: str | None
    tiles: list[CasePicture]


class GateContent(TypedDict, total=False):
    """Result of an acceptance gate."""

    verdict: str
    measured: Any
    allowed: Any


class GateReportContent(TypedDict, total=False):
    """Content of `parity/report.json` of a package."""

    gates: dict[str, GateContent]


class CommandContent(TypedDict, total=False):
    """Kind of a folder in its `summary.json`."""

    command: str | None


class VersionContent(TypedDict, total=False):
    """Versions of the libraries that wrote a `summary.json`."""

    versions: dict[str, str]


class PackageContent(TypedDict, total=False):
    """Content of `medim.json` of a package."""

    name: str
    version: str
    kind: str
    preprocess: list[Step]
    not_for: str
