"""Self-contained HTML page of a study, from the files of its folder; equal files of equal dates give equal bytes."""

from __future__ import annotations

from pathlib import Path

from medim.files import read_json, write_text
from medim.output_folder import record_output_file
from medim.reports.page import PageHead
from medim.reports.report import PAGE_NAME, format_page_title, format_results_date, read_medim_version, render_page
from medim.study.cell import StudyContext
from medim.study.report.audit import build_audit_section
from medim.study.report.cases import build_cases_section
from medim.study.report.cohort import build_splits_section, describe_data
from medim.study.report.curves import build_curves_section
from medim.study.report.headline import build_trust_section, build_verdict_section
from medim.study.report.methods import build_methods_section
from medim.study.report.pretraining import build_health_section, write_health
from medim.study.report.results import build_outcome_section
from medim.study.report.thumbnails import write_worst_cases
from medim.study.report.view import open_study

STUDY_SECTIONS = (
    build_verdict_section,
    build_trust_section,
    build_splits_section,
    build_outcome_section,
    build_curves_section,
    build_health_section,
    build_audit_section,
    build_cases_section,
    build_methods_section,
)  # in the order of the page


def write_study_page(folder: Path, *, name: str = "") -> Path:
    """Write `report.html` into the folder of a study.

    Args:
        folder: folder of the study, complete or interrupted.
        name: name of the study; empty for the name of the folder.

    Returns:
        Path of the page.

    Raises:
        UserError: there is no study, or one of its files is damaged.
    """
    study = open_study(folder)
    sections = [build_section(study) for build_section in STUDY_SECTIONS]
    head = PageHead(
        title=format_page_title("Study", name or folder.resolve().name),
        date=format_results_date(folder),
        version=read_medim_version(folder),
        data=describe_data(study),
    )
    write_text(folder / PAGE_NAME, render_page(head, sections, headline_first=True))
    record_output_file(folder / PAGE_NAME)
    return folder / PAGE_NAME


def write_report_data(context: StudyContext) -> None:
    """Save data for the page that the folder lacks: health of the pretraining runs, and pictures of the worst cases.

    Args:
        context: context of the cells; results and `summary.json` must be written.

    Raises:
        UserError: a record of a pretraining run is damaged.
    """
    write_health(context.out, context.design.arms)
    write_worst_cases(context, open_study(context.out))


def is_study(folder: Path) -> bool:
    """Whether a folder contains a study."""
    path = folder / "summary.json"
    return path.is_file() and read_json(path).get("command") == "study"
