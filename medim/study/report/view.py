"""Read-only view of the folder of a study: its files, and intervals of its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from medim.config import read_yaml_mapping
from medim.files import read_json
from medim.metrics import find_metric
from medim.metrics.bootstrap import Resamples, compute_scores, draw_resamples
from medim.migrations import read_checked_json
from medim.renamed_keys import translate_config
from medim.study.audit.audit import AUDIT
from medim.study.content import AuditContent, ComparisonRow, StudySummary
from medim.study.design import SCRATCH
from medim.study.results import StudyResults, open_results
from medim.study.statistics.intervals import ComparisonVerdict, ConfidenceInterval, compute_interval, get_metric_limits
from medim.tasks.classification import TRUTH
from medim.types import UserError

VERDICT_ORDER: tuple[ComparisonVerdict, ...] = ("benefit", "no evidence of a benefit", "harm")


@dataclass(frozen=True)
class StudyView:
    """View of a study, complete or interrupted.

    Attributes:
        folder: folder of the study.
        summary: content of its `summary.json`.
    """

    folder: Path
    summary: StudySummary
    _intervals: dict[tuple[str, str, str, int | None], ConfidenceInterval | None] = field(
        default_factory=dict, repr=False
    )

    @cached_property
    def results(self) -> StudyResults | None:
        """Results of the study; None if no cell is done yet."""
        try:
            return open_results(self.folder, self.summary)
        except UserError:
            return None

    @cached_property
    def audit(self) -> AuditContent | None:
        """Content of `audit.json`; None if the study has no audit."""
        path = self.folder / AUDIT
        if not path.is_file():
            return None
        audit = read_checked_json(path, "audit", AuditContent)
        _check_metrics(path, audit, self.metric)
        return audit

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Content of `config.yaml`; empty if the study has none."""
        path = self.folder / "config.yaml"
        return translate_config(read_yaml_mapping(path), warn=False) if path.is_file() else {}

    @property
    def metric(self) -> str:
        """Name of the main metric."""
        return str(self.summary["metric"])

    @property
    def rows(self) -> list[ComparisonRow]:
        """Comparisons with from scratch."""
        return list((self.summary.get("comparisons") or {"rows": []})["rows"])

    @property
    def verdicts(self) -> dict[str, ComparisonVerdict]:
        """Verdict of each compared arm over all budgets."""
        comparisons = self.summary["comparisons"]
        return comparisons["overall"] if comparisons else {}

    @property
    def is_complete(self) -> bool:
        """Whether every cell is done."""
        return bool(self.summary["complete"])

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the evaluated arms: from scratch, the others in the given order, baselines."""
        arm_order = [entry["name"] for entry in self.summary["arms"]]
        result_arms = self.results.arms if self.results else ()
        return tuple(sorted(result_arms, key=lambda arm: arm_order.index(arm) if arm in arm_order else len(arm_order)))

    @property
    def budgets(self) -> dict[str, int]:
        """Number of images of each evaluated budget, in ascending order."""
        return self.results.labelled if self.results else {}

    def find_row(self, arm: str, budget: str) -> ComparisonRow | None:
        """Find the comparison of an arm at a budget."""
        return next((row for row in self.rows if (row["arm"], row["budget"]) == (arm, budget)), None)

    @property
    def best(self) -> ComparisonRow | None:
        """The best-supported comparison, of a fine-tuned arm if there is one (ranked by `rank_key`)."""
        tuned = [row for row in self.rows if self.get_protocol(row["arm"]) == "finetune"]
        return min(tuned or self.rows, key=rank_key, default=None)

    def best_row(self, arm: str) -> ComparisonRow:
        """Select the best-supported comparison of an arm among those with its overall verdict."""
        verdict = self.verdicts[arm]
        arm_rows = [row for row in self.rows if row["arm"] == arm]
        return min([row for row in arm_rows if row["verdict"] == verdict] or arm_rows, key=rank_key)

    def get_protocol(self, arm: str) -> str:
        """Training protocol of an arm: `finetune`, or `frozen` with a probe or decoder."""
        protocols = {entry["name"]: str(entry["protocol"]) for entry in self.summary["arms"]}
        return protocols.get(arm, "frozen")  # untrained weights and pixels are baselines of frozen probes

    def get_interval(self, metric: str, arm: str, budget: str, step: int | None = None) -> ConfidenceInterval | None:
        """Mean of a metric over the runs of an arm with its 95 % interval; None if there is no interval."""
        key = metric, arm, budget, step
        if key not in self._intervals:
            self._intervals[key] = self._compute_interval(*key)
        return self._intervals[key]

    def _compute_interval(self, metric: str, arm: str, budget: str, step: int | None) -> ConfidenceInterval | None:
        results = self.results
        if results is None or self._resamples is None or not results.seeds(arm, budget):
            return None
        try:
            return compute_interval(
                compute_scores(results.grid(metric, arm, budget, step=step), self._resamples), get_metric_limits(metric)
            )
        except UserError:
            return None

    @cached_property
    def _resamples(self) -> Resamples | None:
        assert self.results is not None
        columns = next(iter(self.results.values.values()))
        labels = list(columns[TRUTH]) if TRUTH in columns else None
        try:
            return draw_resamples(self.results.subjects, labels)
        except UserError:
            return None


def open_study(folder: Path) -> StudyView:
    """Open the folder of a study.

    Raises:
        UserError: its `summary.json` is missing or not that of a study.
    """
    path = folder / "summary.json"
    command = read_json(path).get("command")
    if command != "study":
        raise UserError(f"{folder}: expected a study, got {command}. Run `medim study` first.")
    summary = read_checked_json(path, "study", StudySummary)
    _check_names(path, summary)
    return StudyView(folder, summary)


def _check_metrics(path: Path, audit: AuditContent, metric: str) -> None:
    """Check that an audit contains the metrics that the page shows.

    Raises:
        UserError: a metric of a model or of a group is missing.
    """
    names = {"auroc", "balanced_accuracy"} if audit["shortcuts"] else set()
    missing = [name for metrics in audit["models"].values() for name in sorted(names - metrics.keys())]
    missing += [metric for group in audit["groups"] if group["metrics"] is not None and metric not in group["metrics"]]
    if missing:
        raise UserError(
            f"{path}: expected the metric {missing[0]!r}, which is missing. Run `medim study --resume`, or copy the "
            "folder again."
        )


def _check_names(path: Path, summary: StudySummary) -> None:
    """Check the metric and the counts, and that comparisons are between arms and budgets of the study.

    Raises:
        UserError: a metric, arm or budget is unknown, a count is missing, or an arm with a verdict has no comparison.
    """
    if find_metric(summary["metric"]) is None:
        raise UserError(
            f"{path}: expected the name of a metric, got {summary['metric'][:100]!r}. "
            "Run `medim study --resume`, or copy the folder again."
        )
    if not {"images", "subjects"} <= summary["train_val_duplicates"].keys():
        raise UserError(
            f"{path}: expected images and subjects in 'train_val_duplicates'. Run `medim study --resume`, or copy the "
            "folder again."
        )
    comparisons = summary["comparisons"]
    arms = {entry["name"] for entry in summary["arms"]}
    rows = comparisons["rows"] if comparisons else []
    names = [row["arm"] for row in rows if row["arm"] not in arms]
    names += [row["budget"] for row in rows if row["budget"] not in summary["budgets"]]
    names += [arm for arm in (comparisons or {"overall": {}})["overall"] if arm not in {row["arm"] for row in rows}]
    if names:
        raise UserError(
            f"{path}: expected arms and budgets of the study in its comparisons, got {names[0][:100]!r}. "
            "Run `medim study --resume`, or copy the folder again."
        )


def rank_key(row: ComparisonRow) -> tuple[Any, ...]:
    """Sort key of comparisons, the best first.

    A benefit ranks before no evidence, and no evidence before harm. Then come comparisons with an uncensored interval
    of saved labels above zero, then the smallest corrected p, the smallest p, and the fewest labels. Verdicts are
    corrected for all comparisons of their protocol, so every comparison may be reported.
    """
    is_closed = False
    if row["labels_saved"] is not None:
        labels = row["labels_saved"]["equivalent_labels"]
        is_censored = any(end["censored"] for end in (labels["value"], labels["low"], labels["high"]))
        is_closed = not is_censored and labels["low"]["value"] > row["n_labelled"]
    return VERDICT_ORDER.index(row["verdict"]), not is_closed, row["p_corrected"], row["p"], row["n_labelled"]


def arm_title(arm: str) -> str:
    """Title of an arm."""
    return "from scratch" if arm == SCRATCH else arm
