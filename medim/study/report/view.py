"""A study's folder as its page reads it: what was written, and intervals of what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from medim.files import read_json
from medim.metrics.bootstrap import Draw, draw, score
from medim.study.audit.audit import AUDIT
from medim.study.design import SCRATCH
from medim.study.results import Results, open_results
from medim.study.results_table import TRUTH
from medim.study.statistics.intervals import Interval, Verdict, interval, limits_of
from medim.types import UserError

Row = dict[str, Any]  # of `comparisons` in summary.json
VERDICTS: tuple[Verdict, ...] = ("benefit", "no evidence of a benefit", "harm")


@dataclass(frozen=True)
class Opened:
    """A study, whole or stopped.

    Attributes:
        folder: of the study.
        summary: its `summary.json`.
    """

    folder: Path
    summary: dict[str, Any]
    _intervals: dict[tuple[str, str, str, int | None], Interval | None] = field(default_factory=dict, repr=False)

    @cached_property
    def results(self) -> Results | None:
        """What was measured; None where nothing is done yet."""
        try:
            return open_results(self.folder, self.summary)
        except UserError:
            return None

    @cached_property
    def audit(self) -> dict[str, Any] | None:
        """What `audit.json` holds; None in the folder of a study that had no audit."""
        path = self.folder / AUDIT
        return read_json(path) if path.is_file() else None

    @property
    def metric(self) -> str:
        """What the study is about."""
        return str(self.summary["metric"])

    @property
    def rows(self) -> list[Row]:
        """Comparisons with the scratch twin."""
        return list((self.summary.get("comparisons") or {"rows": []})["rows"])

    @property
    def whole(self) -> bool:
        """Whether every cell is done."""
        return bool(self.summary["complete"])

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms that were measured: the scratch twin, the others as they were given, anchors."""
        given = [told["name"] for told in self.summary["arms"]]
        found = self.results.arms if self.results else ()
        return tuple(sorted(found, key=lambda arm: given.index(arm) if arm in given else len(given)))

    @property
    def budgets(self) -> dict[str, int]:
        """Images of each budget that was measured, fewest first."""
        return self.results.labelled if self.results else {}

    def row(self, arm: str, budget: str) -> Row | None:
        """The comparison of an arm at a budget."""
        return next((row for row in self.rows if (row["arm"], row["budget"]) == (arm, budget)), None)

    @property
    def best(self) -> Row | None:
        """The best-supported comparison, of a fine-tuned arm where there is one; see `support`."""
        tuned = [row for row in self.rows if self.protocol(row["arm"]) == "finetune"]
        return min(tuned or self.rows, key=support, default=None)

    def of_arm(self, arm: str) -> Row:
        """The best-supported comparison of an arm, in the terms of its verdict over all budgets."""
        verdict = self.summary["comparisons"]["overall"][arm]
        own = [row for row in self.rows if row["arm"] == arm]
        return min([row for row in own if row["verdict"] == verdict] or own, key=support)

    def protocol(self, arm: str) -> str:
        """Fine-tuned, or frozen under a probe or decoder."""
        known = {told["name"]: str(told["protocol"]) for told in self.summary["arms"]}
        return known.get(arm, "frozen")  # untrained weights and pixels are anchors of frozen probes

    def interval(self, metric: str, arm: str, budget: str, step: int | None = None) -> Interval | None:
        """A metric of an arm's runs with its 95 % interval; None where there is none."""
        key = metric, arm, budget, step
        if key not in self._intervals:
            self._intervals[key] = self._interval(*key)
        return self._intervals[key]

    def _interval(self, metric: str, arm: str, budget: str, step: int | None) -> Interval | None:
        results = self.results
        if results is None or self._drawn is None or not results.seeds(arm, budget):
            return None
        try:
            return interval(score(results.grid(metric, arm, budget, step=step), self._drawn), limits_of(metric))
        except UserError:
            return None

    @cached_property
    def _drawn(self) -> Draw | None:
        assert self.results is not None
        columns = next(iter(self.results.values.values()))
        labels = list(columns[TRUTH]) if TRUTH in columns else None
        try:
            return draw(self.results.subjects, labels)
        except UserError:
            return None


def open_study(folder: Path) -> Opened:
    """A study's folder.

    Raises:
        UserError: its `summary.json` is missing or of something else.
    """
    summary = read_json(folder / "summary.json")
    if summary.get("command") != "study":
        raise UserError(f"{folder}: expected a study, got {summary.get('command')}. Run `medim study` first.")
    return Opened(folder, summary)


def support(row: Row) -> tuple[Any, ...]:
    """By what comparisons are ranked, the best first.

    A benefit before none before harm; labels saved between two numbers, and more than none, before an open end; then
    the smallest p, and the fewest labels. Verdicts are corrected for all comparisons of their kind, so any may be
    shown.
    """
    worth = (row["labels_saved"] or {}).get("worth")
    ends = [] if worth is None else [worth[end] for end in ("value", "low", "high")]
    closed = bool(ends) and not any(end["censored"] for end in ends) and ends[1]["value"] > row["labelled"]
    return VERDICTS.index(row["verdict"]), not closed, row["p_corrected"], row["p"], row["labelled"]


def title_of(arm: str) -> str:
    """An arm's name in words."""
    return "from scratch" if arm == SCRATCH else arm
