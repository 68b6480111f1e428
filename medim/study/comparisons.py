"""Every arm against its scratch twin at every budget, by `medim.study.statistics.intervals`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medim.metrics.bootstrap import Draw, Scores, draw, score
from medim.study.design import PIXELS, SCRATCH, UNTRAINED
from medim.study.results import Results, largest, open_results
from medim.study.results_table import TRUTH
from medim.study.statistics.intervals import Comparison, compare, limits_of, overall
from medim.study.statistics.labels_saved import LabelsSaved, Span, labels_saved, sentence, time_to_level
from medim.types import UserError

Pairs = dict[tuple[str, str], tuple[Scores, Scores]]


def comparisons(folder: Path, summary: dict[str, Any]) -> dict[str, Any] | None:
    """What the results of a study say, on what is there of them; None where nothing can be compared yet.

    Args:
        folder: with `results.parquet`.
        summary: of the study; `metric` names what is compared, and more of it is better.

    Returns:
        `metric`, `resamples`, `overall` (a verdict an arm), and `rows`: `arm`, `budget`, `labelled`, `value`,
        `scratch`, `difference` (value, low, high, scope), `p`, `p_corrected`, `verdict`, and where they can be told
        `labels_saved` and `time_to_scratch`.
    """
    try:
        results = open_results(folder, summary)
        metric = str(summary["metric"])
        drawn = _drawn(results)
    except UserError:
        return None
    pairs: Pairs = {}
    for arm in (arm for arm in results.arms if arm not in (SCRATCH, UNTRAINED, PIXELS)):
        for budget in results.labelled:
            grids = results.paired(metric, arm, budget)
            if grids[0]:
                pairs[arm, budget] = score(grids[0], drawn), score(grids[1], drawn)
    if not pairs:
        return None
    found = [one for family in _families(pairs, summary) for one in compare(family, limits_of(metric, difference=True))]
    saved = _saved(pairs, found, results)
    rows = []
    for one in found:
        ours, scratch = pairs[one.arm, one.budget]
        rows.append(
            {
                "arm": one.arm,
                "budget": one.budget,
                "labelled": results.labelled[one.budget],
                "value": _mean(ours),
                "scratch": _mean(scratch),
                "difference": {
                    **asdict(one.difference),
                    "over": list(one.difference.over),
                    "scope": one.difference.scope,
                },
                "p": one.p,
                "p_corrected": one.p_corrected,
                "verdict": one.verdict,
                "labels_saved": saved.get((one.arm, one.budget)),
                "time_to_scratch": _time(results, one, drawn, metric),
            }
        )
    arms = dict.fromkeys(one.arm for one in found)
    verdicts = {arm: overall([one for one in found if one.arm == arm]) for arm in arms}
    return {"metric": metric, "resamples": len(drawn.counts) - 1, "overall": verdicts, "rows": rows}


def _families(pairs: Pairs, summary: dict[str, Any]) -> list[Pairs]:
    """What is corrected together: the fine-tuned arms, which a study is about, and the frozen ones beside them."""
    frozen = {told["name"] for told in summary["arms"] if told["protocol"] == "frozen"}
    families = [{key: pairs[key] for key in pairs if (key[0] in frozen) == anchors} for anchors in (False, True)]
    return [family for family in families if family]


def _drawn(results: Results) -> Draw:
    columns = next(iter(results.values.values()))
    return draw(results.subjects, list(columns[TRUTH]) if TRUTH in columns else None)


def _saved(pairs: Pairs, found: list[Comparison], results: Results) -> dict[tuple[str, str], dict[str, Any]]:
    """Labels saved by arm and budget, for arms that were measured at two budgets or more."""
    rows = {}
    for arm in dict.fromkeys(one.arm for one in found):
        own = [one for one in found if one.arm == arm]
        ours, scratch = zip(*(pairs[arm, one.budget] for one in own), strict=True)
        if len(own) < 2 or not _alike(results, arm, [one.budget for one in own]):
            continue
        budgets = [float(results.labelled[one.budget]) for one in own]
        for one, saved in zip(own, labels_saved(budgets, ours, scratch), strict=True):
            rows[arm, one.budget] = _worth(saved, one)
    return rows


def _alike(results: Results, arm: str, budgets: list[str]) -> bool:
    """Whether all budgets have the same seeds and subsets (all labels are one subset); a stopped study may not."""
    planned = Counter(key.rpartition("/")[0] for key in results.summary["counts"]["labels"])
    runs = {budget: results.pairs(arm, budget) for budget in budgets}
    seeds = {frozenset(s for s, _ in pairs) for pairs in runs.values()}
    subsets = {frozenset(t for _, t in pairs) for budget, pairs in runs.items() if planned[budget] > 1}
    return len(seeds) == 1 and len(subsets) <= 1


def _worth(saved: LabelsSaved, one: Comparison) -> dict[str, Any]:
    spans = {"worth": _span(saved.worth), "saved": _span(saved.saved), "ratio": _span(saved.ratio)}
    return {**spans, "over": list(saved.over), "sentence": sentence(saved, one.verdict)}


def _time(results: Results, one: Comparison, drawn: Draw, metric: str) -> dict[str, Any] | None:
    """Steps to the level that scratch ends at; None where nothing was measured on the way."""
    steps = results.steps(one.arm, one.budget)
    common = largest(sorted(set(results.seeds(one.arm, one.budget)) & set(results.seeds(SCRATCH, one.budget))))
    if not steps:
        return None
    ours = [score(results.grid(metric, one.arm, one.budget, step=step, seeds=common), drawn) for step in steps]
    ours.append(score(results.grid(metric, one.arm, one.budget, seeds=common), drawn))
    final = score(results.grid(metric, SCRATCH, one.budget, seeds=common), drawn)
    reached = time_to_level([*steps, int(results.summary["steps"])], ours, final)
    return {"level": reached.level, "steps": _span(reached.steps), "over": list(reached.over)}


def _span(span: Span) -> dict[str, Any]:
    return asdict(span)


def _mean(scores: Scores) -> float:
    return float(scores.values[..., 0].mean())
