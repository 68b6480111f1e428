"""The first page: what pretraining is worth, and what could make that number wrong."""

from __future__ import annotations

from typing import Any

from medim.data.contamination import describe_counts
from medim.reports.page import Banner, ReportSection, ReportTable, format_value, metric_name, pluralise
from medim.study.report.audit import alarming_shortcuts, format_size_auroc
from medim.study.report.format import format_difference, format_p_value
from medim.study.report.pretraining import unhealthy_pretraining
from medim.study.report.results import PROTOCOL_LABELS
from medim.study.report.view import ComparisonRow, StudyView

NO_EVIDENCE = "no evidence of a benefit"


def build_verdict_section(study: StudyView) -> ReportSection:
    """The label-saving sentence of the best-supported arm, and of each other one."""
    best = study.best
    if best is None:
        text = "Nothing can be compared yet. Go on with medim study --resume."
        return ReportSection(
            "verdict", "What pretraining is worth", Banner("bad", "No result", _incomplete_caveat(study) + text)
        )
    caveats = [
        _incomplete_caveat(study),
        _harm_caveat(study, best),
        _contamination_caveat(study),
        _selection_caveat(study),
        alarming_shortcuts(study),
    ]
    caveats += [unhealthy_pretraining(study, best["arm"]), _single_run_caveat(best)]
    state: Any = {"benefit": "good", "harm": "bad"}.get(best["verdict"], "care")
    if state == "good" and any(caveats):
        state = "care"
    text = f"{comparison_sentence(best)} " if best["verdict"] == NO_EVIDENCE else ""
    headline = "No evidence of a benefit" if best["verdict"] == NO_EVIDENCE else comparison_sentence(best)
    protocol = study.get_protocol(best["arm"])
    same_protocol = [row for row in study.rows if study.get_protocol(row["arm"]) == protocol]
    text += f"{best['arm']}, {metric_name(study.metric)}: {format_difference(best)} against from scratch, "
    text += f"{best['difference']['scope']}. p {format_p_value(best['p_corrected'])} after correction for "
    text += f"{pluralise(len(same_protocol), 'comparison')} of {PROTOCOL_LABELS[protocol]} arms (Holm). "
    arms = list(study.summary["comparisons"]["overall"])
    cells = [
        (arm, study.summary["comparisons"]["overall"][arm], comparison_sentence(study.best_row(arm))) for arm in arms
    ]
    note = "Verdicts are corrected for all comparisons of fine-tuned arms at once, and for all of frozen arms. "
    note += "No evidence of a benefit is not evidence "
    note += "of none: look at the width of the interval."
    return ReportSection(
        "verdict",
        "What pretraining is worth",
        Banner(state, headline, (text + " ".join(filter(None, caveats))).strip()),
        tables=[
            ReportTable(
                "Every arm at its best-supported budget",
                ("Arm", "Verdict", "In labels"),
                cells,
                note,
                wide=True,
                prose=True,
            )
        ],
    )


def _single_run_caveat(row: ComparisonRow) -> str:
    """That no run was repeated with another seed, so that the luck of two runs is in no interval."""
    caveat = "One encoder stands against one from-scratch run: how much runs differ by chance is not known. "
    return caveat if row["difference"]["seeds"] == 1 else ""


def comparison_sentence(row: ComparisonRow) -> str:
    """What a comparison says, in labels where it can be told in labels."""
    if row["labels_saved"]:
        return str(row["labels_saved"]["sentence"])
    own = pluralise(row["labelled"], "label")
    gap = f"{format_difference(row)} against from scratch"
    return {
        "benefit": f"With {own} the encoder does better: {gap}.",
        "harm": f"The encoder does harm with {own}: {gap}.",
    }.get(row["verdict"], f"No evidence of a benefit with {own}: {gap}.")


def build_trust_section(study: StudyView) -> ReportSection:
    """What each encoder has seen, what lies on both sides, and whether the study is whole."""
    cells, overlap = study.summary["cells"], study.summary["overlap"]
    caveats = _contamination_caveat(study) + _selection_caveat(study) + alarming_shortcuts(study)
    clean = study.is_complete and not caveats and not overlap["images"]
    rows = [
        (
            arm,
            format_value(number),
            *(
                describe_counts(contamination).get(key, "not known")
                for key in ("seen in pretraining", "seen in fine-tuning")
            ),
        )
        for arm, runs in study.summary["seen"].items()
        for number, contamination in enumerate(runs)
    ]
    val = study.summary["counts"]["splits"]["val"]
    head = ("Arm", "Encoder", "In pretraining", "In fine-tuning")
    failed = [(failure["cell"], failure["reason"]) for failure in cells["failed"]]
    n_near = len(study.audit["duplicates"]["near"]) if study.audit else None
    classes = study.summary["task"] == "classification"
    return ReportSection(
        "counts",
        "Can it be trusted?",
        Banner(
            "good" if clean else "care",
            "Complete, and nothing seen before" if clean else "Read this before the number",
            f"{_incomplete_caveat(study)}{caveats}"
            or "Every cell is done; no encoder has seen an image or subject measured on.",
        ),
        facts=[
            ("Cells done", f"{cells['done']:,} of {cells['all']:,}"),
            ("Cells that failed", format_value(len(cells["failed"]))),
            ("Complete", format_value(study.is_complete)),
            ("Evaluation split", f"{pluralise(val['images'], 'image')} of {pluralise(val['subjects'], 'subject')}"),
            ("Images with the same pixels on both sides", format_value(overlap["images"])),
            ("Pairs of images that look alike across the split", format_value(n_near)),
            *([("AUROC of the image's size alone", format_size_auroc(study))] if classes else []),
            ("Cases that could not be measured", format_value(study.summary.get("rejected_cases"))),
            ("Refused where anything was seen (--fail-on-contamination)", format_value(study.summary.get("strict"))),
        ],
        tables=[
            ReportTable(
                f"Of the evaluation split ({pluralise(val['images'], 'image')}), seen before", head, rows, wide=True
            ),
            *([ReportTable("Cells that failed", ("Cell", "Reason"), failed, wide=True, prose=True)] if failed else []),
        ],
        details=[("Cells that are left", "\n".join(cells["left"]))] if cells["left"] else [],
    )


def _incomplete_caveat(study: StudyView) -> str:
    cells = study.summary["cells"]
    if study.is_complete:
        return ""
    failed = f", {len(cells['failed'])} failed" if cells["failed"] else ""
    return f"This study is not complete: {cells['done']:,} of {cells['all']:,} cells are done{failed}. "


def _harm_caveat(study: StudyView, best: ComparisonRow) -> str:
    """Where else harm is shown, which a headline of the best must not hide."""
    same_protocol = [row for row in study.rows if study.get_protocol(row["arm"]) == study.get_protocol(best["arm"])]
    others = [row for row in same_protocol if row["verdict"] == "harm" and row != best]
    harm_text = ", ".join(f"{row['arm']} with {pluralise(row['labelled'], 'label')}" for row in others)
    return f"Harm is shown by: {harm_text}. " if harm_text else ""


def _selection_caveat(study: StudyView) -> str:
    """Labels that no budget paid for."""
    label_counts = study.summary.get("chosen_with_labels", {})
    arms_text = ", ".join(f"{arm} ({count:,})" for arm, count in label_counts.items() if count)
    return f"Labels beside the budgets chose the pretraining step of: {arms_text}. " if arms_text else ""


def _contamination_caveat(study: StudyView) -> str:
    """Which arms have seen some of the evaluation split, or cannot tell."""
    exposed_arms, unknown_arms = [], []
    for arm, runs in study.summary["seen"].items():
        numbers = [n for run in runs for kind in (run or {"?": {"?": None}}).values() for n in kind.values()]
        if any(numbers):
            exposed_arms.append(arm)
        elif None in numbers:
            unknown_arms.append(arm)
    exposure_text = (
        f"Some of the evaluation split was seen before by: {', '.join(exposed_arms)}. " if exposed_arms else ""
    )
    return exposure_text + (
        f"What was seen is not wholly known of: {', '.join(unknown_arms)}. " if unknown_arms else ""
    )
