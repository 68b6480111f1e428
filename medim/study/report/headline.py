"""First sections of the study page: the benefit of pretraining, and reasons to doubt it."""

from __future__ import annotations

from typing import Any

from medim.data.contamination import describe_counts, list_counts
from medim.reports.page import (
    Banner,
    ReportSection,
    ReportTable,
    describe_metric_rule,
    format_recall,
    format_value,
    metric_name,
    pluralise,
)
from medim.study.content import ComparisonRow
from medim.study.report.audit import alarming_shortcuts, format_size_auroc
from medim.study.report.curves import plot_over_labels
from medim.study.report.format import format_difference, format_p_value
from medim.study.report.pretraining import unhealthy_pretraining
from medim.study.report.results import PROTOCOL_LABELS
from medim.study.report.view import StudyView
from medim.tasks import find_task

NO_EVIDENCE = "no evidence of a benefit"


def build_verdict_section(study: StudyView) -> ReportSection:
    """Build the section with the label-saving sentence of the best-supported arm, and of each other arm."""
    best = study.best
    if best is None:
        text = "There is nothing to compare yet. Continue with medim study --resume."
        return ReportSection(
            "verdict", "Benefit of pretraining", Banner("bad", "No result", _incomplete_caveat(study) + text)
        )
    caveats = [
        _incomplete_caveat(study),
        _harm_caveat(study, best),
        _contamination_caveat(study),
        _selection_caveat(study),
        _lost_class_caveat(study),
        _metric_rule_caveat(study),
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
    verdicts = study.verdicts
    cells = [(arm, verdict, comparison_sentence(study.best_row(arm))) for arm, verdict in verdicts.items()]
    note = "Verdicts are corrected for all comparisons of fine-tuned arms, and separately for those of frozen arms. "
    note += "No evidence of a benefit does not mean evidence "
    note += "of no benefit; consider the width of the interval."
    curve = plot_over_labels(study)
    return ReportSection(
        "verdict",
        "Benefit of pretraining",
        Banner(state, headline, (text + " ".join(filter(None, caveats))).strip()),
        figures=[curve] if curve else [],
        after=[
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
    """Caveat that no run was repeated with another seed, so that the intervals do not include seed variance."""
    caveat = "One encoder is compared with one from-scratch run, so the variation between runs is unknown. "
    return caveat if row["difference"]["seeds"] == 1 else ""


def comparison_sentence(row: ComparisonRow) -> str:
    """Summarise a comparison in one sentence, in numbers of labels if possible."""
    if row["labels_saved"]:
        return str(row["labels_saved"]["sentence"])
    own = pluralise(row["n_labelled"], "label")
    gap = f"{format_difference(row)} against from scratch"
    return {
        "benefit": f"With {own} the pretrained encoder is better: {gap}.",
        "harm": f"With {own} the pretrained encoder is worse: {gap}.",
    }.get(row["verdict"], f"No evidence of a benefit with {own}: {gap}.")


def build_trust_section(study: StudyView) -> ReportSection:
    """Build the section of validity checks: contamination of each encoder, duplicates, completeness of the study."""
    cells, duplicates = study.summary["cells"], study.summary["train_val_duplicates"]
    caveats = _contamination_caveat(study) + _selection_caveat(study)
    caveats += _lost_class_caveat(study) + alarming_shortcuts(study)
    clean = study.is_complete and not caveats and not duplicates["images"]
    rows = [
        (
            arm,
            format_value(number),
            *(
                describe_counts(contamination).get(key, "unknown")
                for key in ("seen in pretraining", "seen in fine-tuning")
            ),
        )
        for arm, runs in study.summary["contamination"].items()
        for number, contamination in enumerate(runs)
    ]
    val = study.summary["counts"]["splits"]["val"]
    head = ("Arm", "Encoder", "In pretraining", "In fine-tuning")
    n_near = len(study.audit["duplicates"]["near"]) if study.audit else None
    classes = find_task(study.summary["task"]).has_class_labels
    return ReportSection(
        "counts",
        "Validity checks",
        Banner(
            "good" if clean else "care",
            "Complete, no contamination" if clean else "Caveats of the result",
            f"{_incomplete_caveat(study)}{caveats}"
            or "All cells are done. No encoder was trained on an evaluated image or subject.",
        ),
        facts=[
            ("Cells done", f"{cells['done']:,} of {cells['all']:,}"),
            ("Cells that failed", format_value(len(cells["failed"]))),
            ("Complete", format_value(study.is_complete)),
            *_lost_class_facts(study),
            ("Evaluation split", f"{pluralise(val['images'], 'image')} of {pluralise(val['subjects'], 'subject')}"),
            ("Images with the same pixels in training and evaluation", format_value(duplicates["images"])),
            ("Near-duplicate pairs across the split", format_value(n_near)),
            *([("AUROC of the image size alone", format_size_auroc(study))] if classes else []),
            ("Cases that could not be evaluated", format_value(study.summary.get("rejected_cases"))),
            ("Contaminated encoders rejected (--fail-on-contamination)", format_value(study.summary.get("strict"))),
        ],
        tables=[
            ReportTable(
                f"Evaluation images in training data (of {pluralise(val['images'], 'image')})",
                head,
                rows,
                wide=True,
                folded=True,
            ),
            *_build_cell_tables(study),
        ],
        details=[("Remaining cells", "\n".join(cells["left"]))] if cells["left"] else [],
    )


def _build_cell_tables(study: StudyView) -> list[ReportTable]:
    """Build the tables of cells that failed, and of those whose model does not find some class."""
    failed = [(failure["cell"], failure["reason"]) for failure in study.summary["cells"]["failed"]]
    lost = [
        (entry["cell"], name, format_recall(recall))
        for entry in study.summary.get("lost_classes", [])
        for name, recall in entry["classes"].items()
    ]
    lost_head = ("Cell", "Class", "Labels that the model finds")
    tables = [
        ReportTable("Cells that failed", ("Cell", "Reason"), failed, wide=True, prose=True),
        ReportTable("Cells that lost a class", lost_head, lost, wide=True, prose=True),
    ]
    return [table for table in tables if table.rows]


def _incomplete_caveat(study: StudyView) -> str:
    cells = study.summary["cells"]
    if study.is_complete:
        return ""
    failed = f", {len(cells['failed'])} failed" if cells["failed"] else ""
    return f"This study is not complete: {cells['done']:,} of {cells['all']:,} cells are done{failed}. "


def _harm_caveat(study: StudyView, best: ComparisonRow) -> str:
    """Caveat for harm at other arms or budgets of the same protocol, which the headline does not mention."""
    same_protocol = [row for row in study.rows if study.get_protocol(row["arm"]) == study.get_protocol(best["arm"])]
    others = [row for row in same_protocol if row["verdict"] == "harm" and row != best]
    harm_text = ", ".join(f"{row['arm']} with {pluralise(row['n_labelled'], 'label')}" for row in others)
    return f"Pretraining is worse than from scratch for: {harm_text}. " if harm_text else ""


def _selection_caveat(study: StudyView) -> str:
    """Caveat for labels that are not counted in the budgets."""
    label_counts = study.summary.get("n_selection_labels", {})
    arms_text = ", ".join(f"{arm} ({count:,})" for arm, count in label_counts.items() if count)
    return f"Labels outside the budgets selected the pretraining step of: {arms_text}. " if arms_text else ""


def _lost_class_caveat(study: StudyView) -> str:
    """Caveat for cells whose model does not find some class: they are outliers of the means of their arms."""
    lost = study.summary.get("lost_classes", [])
    if not lost:
        return ""
    verb = "does" if len(lost) == 1 else "do"
    return (
        f"{pluralise(len(lost), 'fine-tuned cell')} {verb} not find some class, probably because of too few steps "
        f"({study.summary['steps']:,}), and may carry a difference between the arms. "
    )


def _metric_rule_caveat(study: StudyView) -> str:
    """Caveat for results of the metric rule of an earlier version."""
    text = describe_metric_rule(study.summary["task"], study.summary)
    return f"{text} " if text else ""


def _lost_class_facts(study: StudyView) -> list[tuple[str, str]]:
    """Number of cells whose model does not find some class; nothing for studies of earlier versions."""
    if "lost_classes" not in study.summary:
        return []
    return [("Fine-tuned cells whose model does not find some class", format_value(len(study.summary["lost_classes"])))]


def _contamination_caveat(study: StudyView) -> str:
    """Caveat for arms that were trained on images or subjects of the evaluation split, or without a record of it."""
    exposed_arms, unknown_arms = [], []
    for arm, runs in study.summary["contamination"].items():
        numbers = [number for run in runs for number in list_counts(run)]
        if any(numbers):
            exposed_arms.append(arm)
        elif None in numbers:
            unknown_arms.append(arm)
    exposure_text = f"Trained on part of the evaluation split: {', '.join(exposed_arms)}. " if exposed_arms else ""
    return exposure_text + (f"Training images not fully recorded: {', '.join(unknown_arms)}. " if unknown_arms else "")
