"""The first page: what pretraining is worth, and what could make that number wrong."""

from __future__ import annotations

from typing import Any

from medim.data.contamination import describe
from medim.reports.page import Banner, Section, Table, many, metric_name, told
from medim.study.report.audit import alarm, size_alone
from medim.study.report.format import difference, p_value
from medim.study.report.pretraining import unwell
from medim.study.report.results import PROTOCOLS
from medim.study.report.view import Opened, Row

NONE = "no evidence of a benefit"


def verdict(study: Opened) -> Section:
    """The label-saving sentence of the best-supported arm, and of each other one."""
    best = study.best
    if best is None:
        text = "Nothing can be compared yet. Go on with medim study --resume."
        return Section("verdict", "What pretraining is worth", Banner("bad", "No result", _whole(study) + text))
    doubts = [_whole(study), _harm(study, best), _seen_text(study), _chosen_text(study), alarm(study)]
    doubts += [unwell(study, best["arm"]), _lone(best)]
    state: Any = {"benefit": "good", "harm": "bad"}.get(best["verdict"], "care")
    if state == "good" and any(doubts):
        state = "care"
    text = f"{sentence(best)} " if best["verdict"] == NONE else ""
    headline = "No evidence of a benefit" if best["verdict"] == NONE else sentence(best)
    protocol = study.protocol(best["arm"])
    kind = [row for row in study.rows if study.protocol(row["arm"]) == protocol]
    text += f"{best['arm']}, {metric_name(study.metric)}: {difference(best)} against from scratch, "
    text += f"{best['difference']['scope']}. p {p_value(best['p_corrected'])} after correction for "
    text += f"{many(len(kind), 'comparison')} of {PROTOCOLS[protocol]} arms (Holm). "
    arms = list(study.summary["comparisons"]["overall"])
    cells = [(arm, study.summary["comparisons"]["overall"][arm], sentence(study.of_arm(arm))) for arm in arms]
    note = "Verdicts are corrected for all comparisons of fine-tuned arms at once, and for all of frozen arms. "
    note += "No evidence of a benefit is not evidence "
    note += "of none: look at the width of the interval."
    return Section(
        "verdict",
        "What pretraining is worth",
        Banner(state, headline, (text + " ".join(filter(None, doubts))).strip()),
        tables=[
            Table(
                "Every arm at its best-supported budget",
                ("Arm", "Verdict", "In labels"),
                cells,
                note,
                wide=True,
                prose=True,
            )
        ],
    )


def _lone(row: Row) -> str:
    """That no run was repeated with another seed, so that the luck of two runs is in no interval."""
    told = "One encoder stands against one from-scratch run: how much runs differ by chance is not known. "
    return told if row["difference"]["seeds"] == 1 else ""


def sentence(row: Row) -> str:
    """What a comparison says, in labels where it can be told in labels."""
    if row["labels_saved"]:
        return str(row["labels_saved"]["sentence"])
    own = many(row["labelled"], "label")
    gap = f"{difference(row)} against from scratch"
    return {
        "benefit": f"With {own} the encoder does better: {gap}.",
        "harm": f"The encoder does harm with {own}: {gap}.",
    }.get(row["verdict"], f"No evidence of a benefit with {own}: {gap}.")


def counts(study: Opened) -> Section:
    """What each encoder has seen, what lies on both sides, and whether the study is whole."""
    cells, overlap = study.summary["cells"], study.summary["overlap"]
    doubts = _seen_text(study) + _chosen_text(study) + alarm(study)
    clean = study.whole and not doubts and not overlap["images"]
    rows = [
        (
            arm,
            told(place),
            *(describe(found).get(key, "not known") for key in ("seen in pretraining", "seen in fine-tuning")),
        )
        for arm, runs in study.summary["seen"].items()
        for place, found in enumerate(runs)
    ]
    val = study.summary["counts"]["splits"]["val"]
    head = ("Arm", "Encoder", "In pretraining", "In fine-tuning")
    failed = [(one["cell"], one["reason"]) for one in cells["failed"]]
    near = len(study.audit["duplicates"]["near"]) if study.audit else None
    classes = study.summary["task"] == "classification"
    return Section(
        "counts",
        "Can it be trusted?",
        Banner(
            "good" if clean else "care",
            "Complete, and nothing seen before" if clean else "Read this before the number",
            f"{_whole(study)}{doubts}" or "Every cell is done; no encoder has seen an image or subject measured on.",
        ),
        facts=[
            ("Cells done", f"{cells['done']:,} of {cells['all']:,}"),
            ("Cells that failed", told(len(cells["failed"]))),
            ("Complete", told(study.whole)),
            ("Evaluation split", f"{many(val['images'], 'image')} of {many(val['subjects'], 'subject')}"),
            ("Images with the same pixels on both sides", told(overlap["images"])),
            ("Pairs of images that look alike across the split", told(near)),
            *([("AUROC of the image's size alone", size_alone(study))] if classes else []),
            ("Cases that could not be measured", told(study.summary.get("rejected_cases"))),
            ("Refused where anything was seen (--strict)", told(study.summary.get("strict"))),
        ],
        tables=[
            Table(f"Of the evaluation split ({many(val['images'], 'image')}), seen before", head, rows, wide=True),
            *([Table("Cells that failed", ("Cell", "Reason"), failed, wide=True, prose=True)] if failed else []),
        ],
        details=[("Cells that are left", "\n".join(cells["left"]))] if cells["left"] else [],
    )


def _whole(study: Opened) -> str:
    cells = study.summary["cells"]
    if study.whole:
        return ""
    failed = f", {len(cells['failed'])} failed" if cells["failed"] else ""
    return f"This study is not complete: {cells['done']:,} of {cells['all']:,} cells are done{failed}. "


def _harm(study: Opened, best: Row) -> str:
    """Where else harm is shown, which a headline of the best must not hide."""
    kind = [row for row in study.rows if study.protocol(row["arm"]) == study.protocol(best["arm"])]
    others = [row for row in kind if row["verdict"] == "harm" and row != best]
    found = ", ".join(f"{row['arm']} with {many(row['labelled'], 'label')}" for row in others)
    return f"Harm is shown by: {found}. " if found else ""


def _chosen_text(study: Opened) -> str:
    """Labels that no budget paid for."""
    chosen = study.summary.get("chosen_with_labels", {})
    found = ", ".join(f"{arm} ({count:,})" for arm, count in chosen.items() if count)
    return f"Labels beside the budgets chose the pretraining step of: {found}. " if found else ""


def _seen_text(study: Opened) -> str:
    """Which arms have seen some of the evaluation split, or cannot tell."""
    seen, unknown = [], []
    for arm, runs in study.summary["seen"].items():
        numbers = [n for run in runs for kind in (run or {"?": {"?": None}}).values() for n in kind.values()]
        if any(numbers):
            seen.append(arm)
        elif None in numbers:
            unknown.append(arm)
    found = f"Some of the evaluation split was seen before by: {', '.join(seen)}. " if seen else ""
    return found + (f"What was seen is not wholly known of: {', '.join(unknown)}. " if unknown else "")
