"""One self-contained page about a run, an evaluation, an index or store, a package, or a folder with several of these.

The page asks nothing of the network, runs no script, and the same files give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from medim.files import read_json, write_text
from medim.reports.cohort import build_cohort_section
from medim.reports.comparison import build_comparison_section
from medim.reports.package import build_package_section
from medim.reports.page import ReportSection
from medim.reports.runs import (
    build_evaluation_section,
    build_finetuning_section,
    build_pretraining_section,
    build_unfinished_section,
)
from medim.types import UserError
from medim.version import __version__

PAGE_NAME = "report.html"
TEMPLATE_NAME = "page.html.jinja"
SECTION_BUILDERS: dict[
    str, Callable[[Path, str], ReportSection]
] = {  # kind of folder -> its section, in the order of the page
    "index": build_cohort_section,
    "pretrain": build_pretraining_section,
    "finetune": build_finetuning_section,
    "evaluate": build_evaluation_section,
    "package": build_package_section,
    "unfinished": build_unfinished_section,
}


def write_report_page(folder: Path) -> Path:
    """Write `write_report_page.html` into a folder.

    Args:
        folder: a pretraining or fine-tuning run, an evaluation, an index or a store with its index, or a folder whose
            subfolders are such or packages; the page then has a section for each, and compares pretrained with
            scratch where both are.

    Returns:
        The page.

    Raises:
        UserError: there is nothing to report on, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder with a run, an evaluation or an index, found none.")
    own_kind = detect_kind(folder)
    if own_kind == "package":  # a package holds its own files and nothing else
        raise UserError(f"{folder}: a package must not change. Run `medim report` on the folder that holds it.")
    folders = {folder.name or "report": folder} if own_kind else _list_parts(folder)
    kinds = {name: own_kind or str(detect_kind(part)) for name, part in folders.items()}
    if not folders:
        raise UserError(f"{folder}: expected a run, an evaluation or an index, here or one level below, found none.")
    sections = [
        SECTION_BUILDERS[kinds[name]](part, f"part-{number}")
        for number, (name, part) in enumerate(folders.items(), start=1)
    ]
    comparison_section = build_comparison_section(folders, kinds)
    if comparison_section:
        sections.insert(0, comparison_section)
    path = folder / PAGE_NAME
    write_text(path, render_page(folder.resolve().name, sections))
    return path


def render_page(title: str, sections: list[ReportSection]) -> str:
    """The page as HTML.

    Args:
        title: what the page is about.
        sections: its parts, in order.
    """
    loader = PackageLoader("medim.reports", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = mark_breaks
    return environment.get_template(TEMPLATE_NAME).render(title=title, sections=sections, version=__version__) + "\n"


def mark_breaks(text: str) -> Markup:
    """Text in which a line may break after each part of a path."""
    return Markup(re.sub(r"[/_]|(?<!&)#", r"\g<0><wbr>", str(escape(text))))


def detect_kind(folder: Path) -> str | None:
    """What a folder holds, as a key of `SECTION_BUILDERS`; None where it is nothing of the kind."""
    if (folder / "medim.json").is_file():
        return "package"
    if not (folder / "summary.json").is_file():
        return "unfinished" if (folder / "config.yaml").is_file() else None
    if (folder / "index.parquet").is_file() or (folder / "index.csv").is_file():
        return "index"
    command = read_json(folder / "summary.json").get("command")
    return command if isinstance(command, str) and command in SECTION_BUILDERS else None


def _list_parts(folder: Path) -> Mapping[str, Path]:
    """Subfolders that can be reported on, in the order of the main job, then by name."""
    order = list(SECTION_BUILDERS)
    entries = [
        (order.index(kind), path.name, path)
        for path in folder.iterdir()
        if path.is_dir() and (kind := detect_kind(path))
    ]
    return {name: path for _, name, path in sorted(entries)}
