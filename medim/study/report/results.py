"""The table of a study: every arm at every budget."""

from __future__ import annotations

import numpy as np

from medim.reports.page import Banner, Section, Table, cell, lower_is_better, many, metric_name, told
from medim.study.design import PIXELS, SCRATCH, UNTRAINED
from medim.study.report.format import difference, p_value, short, span, value
from medim.study.report.view import Opened, title_of

PROTOCOLS = {"finetune": "fine-tuned", "frozen": "frozen"}
HEAD = ("Arm", "Labels", "Value", "Minus from scratch", "p", "p, Holm", "Verdict")
WORTH = ("Arm", "Labels", "Worth in labels", "Saved", "Times", "Steps to scratch", "Of")


def outcome(study: Opened) -> Section:
    """Value, difference, p-values and verdict of each arm and budget; anchors beside them; the learning rates."""
    name = metric_name(study.metric)
    rows = [_row(study, arm, budget) for budget in study.budgets for arm in study.arms if _there(study, arm, budget)]
    runs = study.results.values if study.results else {}
    measured = sum(run.step is None for run in runs)
    note = (
        "95 % intervals over pretraining seeds, label subsets and subjects, as far as each was drawn more than once. "
        "Differences are paired by seed, subset and subject. Holm's p-value is corrected for all comparisons of "
        "fine-tuned arms, or of frozen ones. An arm with fewer encoders or subsets is held against those runs of from "
        "scratch that it shares, so its difference need not be that of the two values. "
        "Frozen arms train a probe or a decoder on the encoder as it is; untrained and pixels are anchors."
    )
    return Section(
        "outcome",
        "Every arm at every budget",
        Banner("plain", name, f"{many(measured, 'run')} measured on {_cases(study)}. More is better."),
        tables=[
            Table(f"{name}, by labels and arm", HEAD, rows, note, wide=True),
            *_worth(study),
            *_others(study),
            *_rates(study),
        ],
    )


def _there(study: Opened, arm: str, budget: str) -> bool:
    return study.results is not None and bool(study.results.seeds(arm, budget))


def _row(study: Opened, arm: str, budget: str) -> tuple[str, ...]:
    name = title_of(arm) if arm == SCRATCH else f"{arm}\n({PROTOCOLS[study.protocol(arm)]})"
    labels = f"{study.budgets[budget]:,}" + (f"\n({budget})" if "%" in budget else "")
    first = name, labels, cell(value(study.interval(study.metric, arm, budget)))
    found = study.row(arm, budget)
    if found is None:
        anchor = "the twin" if arm == SCRATCH else "anchor" if arm in (UNTRAINED, PIXELS) else "not compared"
        return (*first, anchor, "–", "–", "–")
    return (
        *first,
        cell(difference(found)),
        p_value(found["p"]),
        p_value(found["p_corrected"]),
        found["verdict"],
    )


def _worth(study: Opened) -> list[Table]:
    """What labels and steps an arm saves."""
    rows = []
    for found in study.rows:
        saved, time = found["labels_saved"], found["time_to_scratch"]
        labels = (
            [span(saved[name]) for name in ("worth", "saved")] + [span(saved["ratio"], ".1f")] if saved else ["–"] * 3
        )
        steps = (span(time["steps"]), f"{study.summary['steps']:,}") if time else ("–", "–")
        rows.append((found["arm"], f"{found['labelled']:,}", *map(cell, (*labels, *steps))))
    note = (
        "Worth: the labels that from scratch needs for what the arm reaches. Steps: the first measured step at which "
        "the arm is where from scratch ends. Nothing is extrapolated: beyond what was run it is more or fewer."
    )
    return [Table("Labels and steps saved", WORTH, rows, note, wide=True)] if rows else []


def _others(study: Opened) -> list[Table]:
    """The other metrics, at the largest budget."""
    if study.results is None:
        return []
    largest = list(study.budgets)[-1]
    arms = [arm for arm in study.arms if _there(study, arm, largest)]
    rows = [
        (
            title_of(arm),
            metric_name(metric),
            cell(value(study.interval(metric, arm, largest)) + _defined(study, metric, arm, largest)),
            better,
        )
        for metric in study.results.metrics
        for better in ["lower" if lower_is_better(metric) else "higher"]
        for arm in arms
    ]
    caption = f"All metrics with {many(study.budgets[largest], 'label')}"
    partial = any("\ncases" in row[2] for row in rows)
    note = "A distance leaves out the cases in which truth or prediction lacks the class: read it beside Dice. "
    return [Table(caption, ("Arm", "Metric", "Value", "Better"), rows, note if partial else "", wide=True)]


def _defined(study: Opened, metric: str, arm: str, budget: str) -> str:
    """On how many cases a metric stands that is not defined for all."""
    assert study.results is not None
    runs = study.results.values.items()
    columns = [own[metric] for run, own in runs if run[:2] == (arm, budget) and run.step is None and metric in own]
    known, total = sum(int(np.isfinite(c).sum()) for c in columns), sum(map(len, columns))
    return f"\ncases: {known:,} of {total:,}" if known < total else ""


def _rates(study: Opened) -> list[Table]:
    """Learning rates, and the scores that they were chosen by."""
    rows = []
    for arm, found in study.summary["learning_rates"].items():
        for budget, rate in found.items():
            scores = ", ".join(f"× {m}: {'failed' if s is None else f'{s:.3f}'}" for m, s in rate["scores"].items())
            chosen = "not yet" if rate["lr"] is None else f"{rate['lr']:.3g}"
            why = study.summary.get("too_small_to_choose", {}).get(budget)
            how = "chosen" if rate["from"] == "selection" else f"fixed{f': {why}' if why else ''}"
            factor = "" if rate["multiple"] is None else f"\n(× {short(rate['multiple'])})"
            rows.append((title_of(arm), budget, chosen + factor, how, scores or "–"))
    note = (
        "Chosen once for each arm and budget, on its first subset: a fifth of its subjects is held out, so that the "
        "labels that choose are paid from the budget. The evaluation split has no part in it."
    )
    head = ("Arm", "Budget", "Learning rate", "How", "Scores on the fifth")
    return [Table("Learning rates", head, rows, note, wide=True)] if rows else []


def _cases(study: Opened) -> str:
    if study.results is None:
        return told(None)
    count = len(set(study.results.subjects))
    return f"{many(len(study.results.cases), 'case')} of {many(count, 'subject')}"
