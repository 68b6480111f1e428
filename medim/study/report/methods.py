"""Section of the study page with the methods, two reporting checklists, and the command to reproduce the study."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from importlib.resources import files
from string import Formatter
from typing import Any

from medim.parsing import MAX_YAML_BYTES, read_text
from medim.reports.methods import format_network, format_preprocessing, format_schedule, join_words
from medim.reports.page import (
    MODALITY_TEXTS,
    NOT_REPORTED,
    Banner,
    ReportSection,
    ReportTable,
    format_bytes,
    format_value,
    metric_name,
    pluralise,
)
from medim.study.content import ArmEntry, StudySummary
from medim.study.report.audit import list_group_columns
from medim.study.report.headline import comparison_sentence
from medim.study.report.view import StudyView
from medim.tasks import find_task

CHECKLIST_FILE = "checklists.csv"  # topics are paraphrased; an answer with a missing value becomes "not reported"
CHECKLIST_SOURCES = (
    "CLAIM 2024: Tejani and others, Radiology: Artificial Intelligence 6, e240300. TRIPOD+AI: Collins and others 2024, "
    "BMJ 385, e078378. Item numbers follow the checklists. Topics are shortened; refer to the original wording."
)
STATISTICS_TEXT = (
    "mean over runs with a 95 % Student's t interval; its variance has components for subjects (cluster bootstrap of "
    "whole subjects), pretraining seeds and label subsets; differences paired by seed, subset and subject; p-values "
    "corrected for all comparisons of fine-tuned arms, and separately for those of frozen arms (Holm)"
)
STATISTICS_SENTENCES = (
    "Results are means over runs with 95 % Student's t intervals. Their variance has components for subjects (cluster "
    "bootstrap of whole subjects), pretraining seeds and label subsets. Differences were paired by seed, subset and "
    "subject, and p-values were corrected with the method of Holm for all comparisons of fine-tuned arms, and "
    "separately for those of frozen arms."
)


def build_methods_section(study: StudyView) -> ReportSection:
    """Build the section: a methods paragraph to copy, checklists, versions and hashes, and the command."""
    facts = collect_facts(study)
    rows = fill_checklists(facts)
    n_blank = sum(answer == NOT_REPORTED for *_, answer in rows)
    tables = [
        ReportTable(
            f"{name}, filled in from the files of the study",
            ("Item", "Topic", "Answer"),
            item_rows,
            wide=True,
            prose=True,
        )
        for name in dict.fromkeys(row[0] for row in rows)
        if (item_rows := [row[1:] for row in rows if row[0] == name])
    ]
    tables[-1] = ReportTable(
        tables[-1].caption, tables[-1].head, tables[-1].rows, CHECKLIST_SOURCES, wide=True, prose=True
    )
    summary = study.summary
    return ReportSection(
        "methods",
        "Methods and reproduction",
        Banner(
            "plain", f"{len(rows) - n_blank} of {len(rows)} checklist items filled in", format_methods(study, facts)
        ),
        facts=[
            *((f"Version of {name}", format_value(version)) for name, version in summary["versions"].items()),
            ("Configuration", format_value(summary["config_hash"])),
            ("Index", format_value(summary["index_hash"])),
            ("Device", format_value(summary["device"])),
            ("Peak memory of a cell", format_bytes(summary["peak_memory_bytes"])),
            ("Hours of all cells", format_value(summary["cell_hours"])),
            ("Cells resumed after an interruption", format_value(summary["n_resumed_cells"])),
        ],
        tables=tables,
        details=[
            ("Command to reproduce the study", summary.get("command_line") or NOT_REPORTED),
            ("sha256 of the encoders", _list_hashes(summary)),
            ("Configuration", _read_config_text(study)),
        ],
    )


def format_methods(study: StudyView, facts: dict[str, str | None]) -> str:
    """Format task, data, arms, budgets, schedule, metrics and statistics as one paragraph."""
    fact_texts = {name: text or NOT_REPORTED for name, text in facts.items()}
    design = (
        "All arms used the same network ({network}) and the same preprocessing: {preprocessing}. {followed}"
        if facts["network"]
        else "Network, preprocessing and training schedule were not reported."
    )
    parts = [
        "We compared networks initialised with the weights of {pretrained_arms} with the same network trained from "
        "random weights. The task was {task_name}.",
        *(["Images were selected by the condition {where} (--where)."] if facts["where"] else []),
        "Of {found} files or series, {rejected} could not be used, and {unlabelled} had no label or mask for this "
        "task. The other images were split by subject into a training set ({train_images} images, {train_subjects} "
        "subjects) and an evaluation set ({val_images} images, {val_subjects} subjects). "
        + (
            "No evaluation image had the same pixels as a training image."
            if facts["overlap_images"] == "0"
            else "The number of evaluation images with the same pixels as a training image was {overlap_images}."
        ),
        design,
        "Training used {label_budgets}. The learning rate was {rates}. {chosen}",
        "The metrics were {metrics}. {statistics_sentences} In total, {runs} runs were evaluated with medim {medim}.",
    ]
    task_name = fact_texts["task"][:1].lower() + fact_texts["task"][1:]
    return " ".join(parts).format(**fact_texts, task_name=task_name, statistics_sentences=STATISTICS_SENTENCES)


def fill_checklists(facts: dict[str, str | None]) -> list[tuple[str, str, str, str]]:
    """Fill in every item of the checklists: checklist, item, topic and answer."""
    text = files(__package__).joinpath(CHECKLIST_FILE).read_text(encoding="utf-8")
    return [
        (row["checklist"], row["item"], row["topic"], _fill_answer(row["answer"], facts))
        for row in csv.DictReader(text.splitlines())
    ]


def collect_facts(study: StudyView) -> dict[str, str | None]:
    """Collect the values for the templates of paragraph and checklists; None if the files do not contain a value."""
    summary, config = study.summary, study.config
    counts, splits = summary["counts"], summary["counts"]["splits"]
    runs = study.results.values if study.results else {}
    metrics = study.results.metrics if study.results else ()
    classes = ", ".join(counts["classes"])
    facts: dict[str, object] = {
        "found": counts["images"] + counts["rejected"],
        "rejected": counts["rejected"],
        "unlabelled": counts["unlabelled"],
        "train_images": splits["train"]["images"],
        "train_subjects": splits["train"]["subjects"],
        "val_images": splits["val"]["images"],
        "val_subjects": splits["val"]["subjects"],
        "overlap_images": summary["train_val_duplicates"]["images"],
        "split_seed": summary["split_seed"],
        "rejected_cases": summary.get("rejected_cases"),
        "index_hash": str(summary["index_hash"])[:12],
        "where": summary.get("where"),
        "config_hash": summary["config_hash"],
        "medim": summary["versions"].get("medim"),
        "versions": summary["versions"],
        "runs": sum(run.step is None for run in runs) or None,
        "task": f"{str(summary['task']).capitalize()} of {classes}"
        + (f" on {MODALITY_TEXTS[config['modality']]}" if config.get("modality") in MODALITY_TEXTS else ""),
        "output": find_task(summary["task"]).output_text,
        "pretrained_arms": join_words([_format_arm(arm) for arm in summary["arms"] if arm["encoders"]]),
        "label_budgets": _format_budgets(summary),
        "rates": _describe_rates(summary),
        "chosen": _describe_selection(summary),
        "repeated": _describe_repeats(summary),
        "metrics": "; ".join(map(metric_name, metrics)),
        "statistics": STATISTICS_TEXT if study.rows else None,
        "groups": list_group_columns(study),
        "interpretation": comparison_sentence(study.best) if study.best else None,
        "kept_models": "Weights of the first run of each trained arm, with the most labels, are in cells/"
        if runs
        else None,
        **(training_facts := _describe_training(config)),
        "followed": f"Fine-tuned networks were trained for {training_facts.get('schedule') or NOT_REPORTED}."
        f"{_describe_frozen(summary)}",
    }
    return {name: None if value in (None, "") else format_value(value) for name, value in facts.items()}


def _describe_training(config: Mapping[str, Any]) -> dict[str, str | None]:
    if not config:
        return {"network": None, "preprocessing": None, "schedule": None}
    return {
        "network": format_network(config),
        "preprocessing": format_preprocessing(config),
        "schedule": format_schedule(config, rate="peak learning rate before selection"),
    }


def _format_arm(arm: ArmEntry) -> str:
    frozen = ", frozen" if arm["protocol"] == "frozen" else ""
    return f"{arm['name']} ({pluralise(len(arm['encoders']), 'pretraining run')}{frozen})"


def _format_budgets(summary: StudySummary) -> str:
    sizes = join_words([f"{count:,}" for count in summary["budgets"].values()])
    n_frozen = min(summary.get("probe_seeds") or summary["seeds"], summary["seeds"])
    frozen = f", {n_frozen:,} for frozen arms" if n_frozen < summary["seeds"] and _describe_frozen(summary) else ""
    return (
        f"nested subsets of {sizes} labelled images of whole subjects, with {pluralise(summary['seeds'], 'draw')} "
        f"of each size{frozen}"
    )


def _describe_frozen(summary: StudySummary) -> str:
    """Describe the training of frozen arms; empty if there are none."""
    if all(arm["protocol"] != "frozen" for arm in summary["arms"]):
        return ""
    frozen_parts = find_task(summary["task"]).frozen_text
    return f" Frozen arms trained only {frozen_parts}, on the unchanged encoder."


def _describe_repeats(summary: StudySummary) -> str | None:
    """Describe the repetitions of an arm; None if no arm was repeated."""
    runs = max((len(arm["encoders"]) for arm in summary["arms"]), default=0)
    if max(runs, summary["seeds"]) < 2:
        return None
    return (
        f"{pluralise(summary['seeds'], 'label subset')} per budget, up to {pluralise(runs, 'pretraining run')} per arm"
    )


def _describe_selection(summary: StudySummary) -> str:
    """Describe the selection of steps, in fine-tuning and in pretraining."""
    arm_texts = [f"{arm} ({count:,})" for arm, count in summary.get("n_selection_labels", {}).items() if count]
    selection_text = (
        "Labels of the evaluation set were not used for any selection, and the weights of the last fine-tuning step "
        "were evaluated. The pretraining step of an encoder may have been selected by the loss on the validation "
        "images of its run, without labels."
    )
    labels = f" It was selected by a probe with training labels (their number in brackets) for {', '.join(arm_texts)}."
    return selection_text + (labels if arm_texts else "")


def _describe_rates(summary: StudySummary) -> str:
    ways = {rate["from"] for arm in summary["learning_rates"].values() for rate in arm.values()}
    if "selection" not in ways:
        return "that of the configuration for every arm and number of labels"
    fixed_text = "; subsets too small for a selection used that of the configuration" if "fixed" in ways else ""
    return f"selected for each arm and number of labels on a fifth of the subjects of the first subset{fixed_text}"


def _fill_answer(template: str, facts: dict[str, str | None]) -> str:
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    if not template or any(facts[name] is None for name in names):
        return NOT_REPORTED
    return template.format(**facts)


def _list_hashes(summary: StudySummary) -> str:
    lines = [
        f"{arm['name']} {number}: {hash_}" for arm in summary["arms"] for number, hash_ in enumerate(arm["encoders"])
    ]
    return "\n".join(lines) or NOT_REPORTED


def _read_config_text(study: StudyView) -> str:
    path = study.folder / "config.yaml"
    return read_text(path, MAX_YAML_BYTES) if path.is_file() else NOT_REPORTED
