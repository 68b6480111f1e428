"""One self-contained page about a study, from its folder alone: the same files give the same bytes."""

from __future__ import annotations

from pathlib import Path

from medim.evaluation.report import NAME, render
from medim.files import read_json, write_text
from medim.study.report.cohort import cohort
from medim.study.report.course import course
from medim.study.report.front import counts, verdict
from medim.study.report.opened import open_study
from medim.study.report.outcome import outcome


def report(folder: Path) -> Path:
    """Write `report.html` into a study's folder.

    Args:
        folder: of the study, whole or stopped.

    Returns:
        The page.

    Raises:
        UserError: there is no study, or a file of it is damaged.
    """
    study = open_study(folder)
    sections = [make(study) for make in (verdict, counts, cohort, outcome, course)]
    write_text(folder / NAME, render(folder.resolve().name, sections))
    return folder / NAME


def is_study(folder: Path) -> bool:
    """Whether a folder holds a study."""
    path = folder / "summary.json"
    return path.is_file() and read_json(path).get("command") == "study"
