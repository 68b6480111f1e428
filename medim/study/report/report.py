"""One self-contained page about a study, from its folder alone: the same files give the same bytes."""

from __future__ import annotations

from pathlib import Path

from medim.files import read_json, write_text
from medim.reports.report import NAME, render
from medim.study.cell import Bench
from medim.study.report.audit import leaks
from medim.study.report.cases import cases
from medim.study.report.cohort import cohort
from medim.study.report.curves import course
from medim.study.report.headline import counts, verdict
from medim.study.report.methods import methods
from medim.study.report.pretraining import health, write_health
from medim.study.report.results import outcome
from medim.study.report.thumbnails import write_worst
from medim.study.report.view import open_study

SECTIONS = (verdict, counts, cohort, outcome, course, health, leaks, cases, methods)  # in the order of the page


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
    write_text(folder / NAME, render(folder.resolve().name, [section(study) for section in SECTIONS]))
    return folder / NAME


def gather(bench: Bench) -> None:
    """Keep what a page needs and a study's folder does not hold: how pretraining went, and pictures of the worst cases.

    Args:
        bench: what the cells shared; results and `summary.json` are written.

    Raises:
        UserError: a record of a pretraining run is damaged.
    """
    write_health(bench.out, bench.design.arms)
    write_worst(bench, open_study(bench.out))


def is_study(folder: Path) -> bool:
    """Whether a folder holds a study."""
    path = folder / "summary.json"
    return path.is_file() and read_json(path).get("command") == "study"
