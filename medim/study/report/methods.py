"""The methods of a study in plain words, the items of two checklists, and the command to repeat it."""

from __future__ import annotations

import csv
from importlib.resources import files
from string import Formatter
from typing import Any

import yaml

from medim.reports.page import (
    NOT_REPORTED,
    Banner,
    ReportSection,
    ReportTable,
    format_bytes,
    format_value,
    metric_name,
    pluralise,
)
from medim.study.report.audit import list_group_columns
from medim.study.report.format import format_schedule_number
from medim.study.report.headline import comparison_sentence
from medim.study.report.view import StudyView

CHECKLIST_FILE = "checklists.csv"  # topics in our words; an answer with an unknown value is not reported
CHECKLIST_SOURCES = (
    "CLAIM 2024: Tejani and others, Radiology: Artificial Intelligence 6, e240300. TRIPOD+AI: Collins and others 2024, "
    "BMJ 385, e078378. Item numbers are theirs; topics are shortened, and the wording that counts is theirs too."
)
STATISTICS_TEXT = (
    "mean over runs with a 95 % interval of Student's t whose variance has a part of subjects (cluster bootstrap of "
    "whole subjects), of pretraining seeds and of label subsets; differences paired by seed, subset and subject; "
    "p-values corrected for all comparisons of fine-tuned arms, and for all of frozen ones (Holm)"
)


def build_methods_section(study: StudyView) -> ReportSection:
    """A paragraph a reader can take over, checklists, versions and hashes, and the command."""
    facts = collect_facts(study)
    rows = fill_checklists(facts)
    n_blank = sum(answer == NOT_REPORTED for *_, answer in rows)
    tables = [
        ReportTable(
            f"{name}, filled in as far as the files can tell",
            ("Item", "What it asks for", "Answer"),
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
        "Methods, and how to repeat it",
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
            ("Cells taken up after a stop", format_value(summary["resumed_cells"])),
        ],
        tables=tables,
        details=[
            ("The command to repeat it", summary.get("repeat") or NOT_REPORTED),
            ("sha256 of the encoders", _list_hashes(summary)),
            ("Configuration", _read_config_text(study)),
        ],
    )


def format_methods(study: StudyView, facts: dict[str, str | None]) -> str:
    """Task, data, arms, budgets, schedule, measurement and statistics, with their numbers."""
    fact_texts = {name: text or NOT_REPORTED for name, text in facts.items()}
    parts = [
        "{task_told}. Of {found} files or series {rejected} were refused, and {unlabelled} carried nothing that the "
        "task learns from. The rest was split by subject: {train_images} images of {train_subjects} subjects to learn "
        "from, {val_images} of {val_subjects} to measure on; {overlap_images} had the same pixels on both sides.",
        "Every arm has the same network ({network}) after the same preprocessing ({preprocessing}), and the first "
        "weights are fresh ones, or those of {arms_told}. {followed}",
        "Label budgets: {budgets_told}. Learning rate: {rates}. {chosen}",
        "Measured: {metrics}. Reported: {statistics}. {runs} runs were measured, with medim {medim}.",
    ]
    return " ".join(parts).format(**fact_texts)


def fill_checklists(facts: dict[str, str | None]) -> list[tuple[str, str, str, str]]:
    """Checklist, item, topic and answer, of every item."""
    text = files(__package__).joinpath(CHECKLIST_FILE).read_text(encoding="utf-8")
    return [
        (row["checklist"], row["item"], row["topic"], _fill_answer(row["answer"], facts))
        for row in csv.DictReader(text.splitlines())
    ]


def collect_facts(study: StudyView) -> dict[str, str | None]:
    """What the templates of paragraph and checklists may name; None where the files do not hold it."""
    summary, config = study.summary, _read_study_config(study)
    counts, splits = summary["counts"], summary["counts"]["splits"]
    runs = study.results.values if study.results else {}
    metrics = study.results.metrics if study.results else ()
    classes = ", ".join(counts["classes"])
    facts: dict[str, Any] = {
        "found": counts["images"] + counts["rejected"],
        "rejected": counts["rejected"],
        "unlabelled": counts["unlabelled"],
        "train_images": splits["train"]["images"],
        "train_subjects": splits["train"]["subjects"],
        "val_images": splits["val"]["images"],
        "val_subjects": splits["val"]["subjects"],
        "overlap_images": summary["overlap"]["images"],
        "split_seed": summary["split_seed"],
        "rejected_cases": summary.get("rejected_cases"),
        "index_hash": str(summary["index_hash"])[:12],
        "config_hash": summary["config_hash"],
        "medim": summary["versions"].get("medim"),
        "versions": summary["versions"],
        "runs": sum(run.step is None for run in runs) or None,
        "task_told": f"{str(summary['task']).capitalize()} of {classes}"
        + (f" on {config['modality']}" if config else ""),
        "output": "a label a voxel" if summary["task"] == "segmentation" else "a probability a class",
        "arms_told": ", ".join(_format_arm(arm) for arm in summary["arms"] if arm["encoders"]),
        "budgets_told": _format_budgets(summary),
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
        "followed": f"Fine-tuned arms follow one schedule ({training_facts.get('schedule', NOT_REPORTED)})."
        f"{_describe_frozen(summary)}",
    }
    return {name: None if value in (None, "") else format_value(value) for name, value in facts.items()}


def _describe_training(config: dict[str, Any]) -> dict[str, str | None]:
    if not config:
        return {"network": None, "preprocessing": None, "schedule": None}
    decoder = f", decoder {config['decoder']['name']}" if config.get("decoder") else ""
    drops = f" (drops at {format_value(config['drop_at'])})" if config["drop_at"] else ""
    encoder, dims = config["encoder"]["name"], len(config["views"]["shape"])
    return {
        "network": f"{encoder}, {dims}D{decoder}, head {config['head']['name']}",
        "preprocessing": "; ".join(_format_step(step) for step in config["preprocessing"]) or "none",
        "schedule": f"{format_schedule_number(config['max_steps'])} steps of "
        f"{pluralise(config['batch_size'], 'image')}, {config['optimiser']}, "
        f"peak rate {config['lr']:g} before any choice, {config['schedule']}{drops}, "
        f"warm-up {config['warmup_steps']} steps, weight decay "
        f"{config['weight_decay']:g}{_describe_pretrained(config)}",
    }


def _describe_pretrained(config: dict[str, Any]) -> str:
    """What a schedule asks of pretrained parts and of the head."""
    scale = config.get("pretrained_lr_scale", 1.0)
    slower = f", what came pretrained at {scale:g} of the rate" if scale != 1 else ""
    return slower + (", the head of every arm started as a linear probe" if config.get("head_init") == "probe" else "")


def _format_step(step: dict[str, Any]) -> str:
    options = ", ".join(f"{key} {format_value(value)}" for key, value in step.items() if key != "op")
    return f"{step['op']} ({options})" if options else str(step["op"])


def _format_arm(arm: dict[str, Any]) -> str:
    frozen = ", frozen" if arm["protocol"] == "frozen" else ""
    return f"{arm['name']} ({pluralise(len(arm['encoders']), 'pretraining run')}{frozen})"


def _format_budgets(summary: dict[str, Any]) -> str:
    sizes = ", ".join(f"{count:,}" for count in summary["budgets"].values())
    n_frozen = min(summary.get("probe_seeds") or summary["seeds"], summary["seeds"])
    frozen = f", {n_frozen:,} for frozen arms" if n_frozen < summary["seeds"] and _describe_frozen(summary) else ""
    return f"{sizes} images in whole subjects, nested, {pluralise(summary['seeds'], 'draw')} each{frozen}"


def _describe_frozen(summary: dict[str, Any]) -> str:
    """How frozen arms learn; empty where there are none."""
    if all(arm["protocol"] != "frozen" for arm in summary["arms"]):
        return ""
    frozen_parts = (
        "a decoder and head, by the same schedule" if summary["task"] == "segmentation" else "a logistic regression"
    )
    return f" Frozen arms keep the encoder and train {frozen_parts}."


def _describe_repeats(summary: dict[str, Any]) -> str | None:
    """How often an arm was repeated; None where none was."""
    runs = max((len(arm["encoders"]) for arm in summary["arms"]), default=0)
    if max(runs, summary["seeds"]) < 2:
        return None
    return (
        f"{pluralise(summary['seeds'], 'label subset')} a budget and up to {pluralise(runs, 'pretraining run')} an arm"
    )


def _describe_selection(summary: dict[str, Any]) -> str:
    """What chose steps, of fine-tuning and of pretraining."""
    arm_texts = [f"{arm} ({count:,})" for arm, count in summary.get("chosen_with_labels", {}).items() if count]
    selection_text = "No label of the evaluation split chose anything: what is measured is fine-tuning's last step. "
    selection_text += (
        "An encoder's own step may have been left to the loss, without labels, of the images its run held out."
    )
    labels = f" The step of the encoders of {', '.join(arm_texts)} was chosen by a probe of so many training labels."
    return selection_text + (labels if arm_texts else "")


def _describe_rates(summary: dict[str, Any]) -> str:
    ways = {rate["from"] for arm in summary["learning_rates"].values() for rate in arm.values()}
    if "selection" not in ways:
        return "that of the configuration for every arm and budget"
    fixed_text = ", that of the configuration where the budget is too small to choose by" if "fixed" in ways else ""
    return f"chosen for each arm and budget on a fifth of its first label subset's subjects{fixed_text}"


def _fill_answer(template: str, facts: dict[str, str | None]) -> str:
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    if not template or any(facts[name] is None for name in names):
        return NOT_REPORTED
    return template.format(**facts)


def _list_hashes(summary: dict[str, Any]) -> str:
    lines = [
        f"{arm['name']} {number}: {hash_}" for arm in summary["arms"] for number, hash_ in enumerate(arm["encoders"])
    ]
    return "\n".join(lines) or NOT_REPORTED


def _read_config_text(study: StudyView) -> str:
    path = study.folder / "config.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else NOT_REPORTED


def _read_study_config(study: StudyView) -> dict[str, Any]:
    path = study.folder / "config.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}
