"""Self-contained HTML page about a run, evaluation, index, store or package, or a folder with several of these.

The page loads nothing over the network and contains no script. Equal input files of equal dates give equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from medim.files import write_text
from medim.migrations import read_checked_json
from medim.output_folder import record_output_file
from medim.privacy import hide_name
from medim.reports.cohort import build_cohort_section
from medim.reports.comparison import build_comparison_section
from medim.reports.content import CommandContent, VersionContent
from medim.reports.package import build_package_section
from medim.reports.page import NOT_REPORTED, PageHead, ReportSection
from medim.reports.runs import (
    build_evaluation_section,
    build_finetuning_section,
    build_pretraining_section,
    build_unfinished_section,
)
from medim.types import UserError
from medim.version import __version__

PAGE_NAME = "report.html"
RESULT_FILES = ("medim.json", "summary.json", "config.yaml")  # the last file of a package, of results, of a stopped run
KIND_TITLES = {
    "index": "Images",
    "pretrain": "Pretraining",
    "finetune": "Fine-tuning",
    "evaluate": "Evaluation",
    "unfinished": "Unfinished",
}
TEMPLATE_NAME = "page.html.jinja"
SECTION_BUILDERS: dict[
    str, Callable[[Path, str], ReportSection]
] = {  # kind of folder -> builder of its section, in the order of the page
    "index": build_cohort_section,
    "pretrain": build_pretraining_section,
    "finetune": build_finetuning_section,
    "evaluate": build_evaluation_section,
    "package": build_package_section,
    "unfinished": build_unfinished_section,
}


def write_report_page(folder: Path) -> Path:
    """Write `report.html` into a folder.

    Args:
        folder: a pretraining or fine-tuning run, an evaluation, an index or a store with its index, or a folder with
            such subfolders or packages. In the last case the page has a section for each subfolder, and compares
            pretrained with scratch if both are present.

    Returns:
        Path of the page.

    Raises:
        UserError: the folder contains no run, evaluation or index, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder. Pass a folder with a run, an evaluation or an index.")
    own_kind = detect_kind(folder)
    if own_kind == "package":  # a package must contain its own files only
        raise UserError(f"{folder}: a package must not be changed. Run `medim report` on its parent folder.")
    folders = {folder.name or "report": folder} if own_kind else _list_parts(folder)
    kinds = {name: own_kind or str(detect_kind(part)) for name, part in folders.items()}
    if not folders:
        raise UserError(f"{folder}: the folder and its subfolders contain no run, evaluation or index.")
    sections = [
        SECTION_BUILDERS[kinds[name]](part, f"part-{number}")
        for number, (name, part) in enumerate(folders.items(), start=1)
    ]
    comparison_section = build_comparison_section(folders, kinds)
    if comparison_section:
        sections.insert(0, comparison_section)
    path = folder / PAGE_NAME
    head = PageHead(
        title=format_page_title(KIND_TITLES[own_kind] if own_kind else "Report", folder.resolve().name),
        date=max(format_results_date(part) for part in folders.values()),
        version=", ".join(sorted({read_medim_version(part) for part in folders.values()})),
        data=_join_data(
            [section for section in sections if section.data != NOT_REPORTED], has_index="index" in kinds.values()
        ),
    )
    write_text(path, render_page(head, sections))
    record_output_file(path)
    return path


def _join_data(sections: Sequence[ReportSection], *, has_index: bool) -> str:
    """Join the descriptions of the images; an index describes all of them, and its section is the first."""
    texts = dict.fromkeys(section.data for section in sections)
    return " | ".join(list(texts)[: 1 if has_index else None]) or NOT_REPORTED


def format_page_title(kind: str, name: str) -> str:
    """Format the title of a page: kind and name, or the kind alone if the folder may be named after a person.

    Examples:
        >>> format_page_title("Study", "study"), format_page_title("Study", "doe")
        ('Study: study', 'Study')
    """
    return f"{kind}: {name}" if hide_name(name) == name else kind


def format_results_date(folder: Path) -> str:
    """Format the date of the file with the results of a folder (UTC)."""
    path = next((folder / name for name in RESULT_FILES if (folder / name).is_file()), folder)
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()


def read_medim_version(folder: Path) -> str:
    """Read the version of medim that wrote a folder; "not reported" without a record."""
    path = folder / "summary.json"
    content = read_checked_json(path, None, VersionContent) if path.is_file() else {}
    return content.get("versions", {}).get("medim", NOT_REPORTED)


def render_page(head: PageHead, sections: list[ReportSection], *, headline_first: bool = False) -> str:
    """Render the page as HTML.

    Args:
        head: head of the page.
        sections: sections in order.
        headline_first: whether the contents follow the first section instead of the title.
    """
    loader = PackageLoader("medim.reports", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = mark_breaks
    html = environment.get_template(TEMPLATE_NAME).render(
        head=head, sections=sections, headline_first=headline_first, version=__version__
    )
    return html + "\n"


def mark_breaks(text: str) -> Markup:
    """Allow line breaks after each part of a path."""
    return Markup(re.sub(r"[/_]|(?<!&)#", r"\g<0><wbr>", str(escape(text))))


def detect_kind(folder: Path) -> str | None:
    """Detect the kind of a folder, as a key of `SECTION_BUILDERS`; None if it is none of them."""
    if (folder / "medim.json").is_file():
        return "package"
    if not (folder / "summary.json").is_file():
        return "unfinished" if (folder / "config.yaml").is_file() else None
    if (folder / "index.parquet").is_file() or (folder / "index.csv").is_file():
        return "index"
    command = read_checked_json(folder / "summary.json", None, CommandContent).get("command")
    return command if command in SECTION_BUILDERS else None


def _list_parts(folder: Path) -> Mapping[str, Path]:
    """List the subfolders to report on, in the order of `SECTION_BUILDERS`, then by name."""
    order = list(SECTION_BUILDERS)
    entries = [
        (order.index(kind), path.name, path)
        for path in folder.iterdir()
        if path.is_dir() and (kind := detect_kind(path))
    ]
    return {name: path for _, name, path in sorted(entries)}
