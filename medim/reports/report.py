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
from medim.reports.cohort import cohort
from medim.reports.comparison import compare
from medim.reports.package import package
from medim.reports.page import Section
from medim.reports.runs import evaluation, finetuning, pretraining, unfinished
from medim.types import UserError
from medim.version import __version__

NAME = "report.html"
TEMPLATE = "page.html.jinja"
SECTIONS: dict[str, Callable[[Path, str], Section]] = {  # kind of folder -> its section, in the order of the page
    "index": cohort,
    "pretrain": pretraining,
    "finetune": finetuning,
    "evaluate": evaluation,
    "package": package,
    "unfinished": unfinished,
}


def report(folder: Path) -> Path:
    """Write `report.html` into a folder.

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
    own = kind_of(folder)
    if own == "package":  # a package holds its own files and nothing else
        raise UserError(f"{folder}: a package must not change. Run `medim report` on the folder that holds it.")
    folders = {folder.name or "report": folder} if own else _parts(folder)
    kinds = {name: own or str(kind_of(part)) for name, part in folders.items()}
    if not folders:
        raise UserError(f"{folder}: expected a run, an evaluation or an index, here or one level below, found none.")
    sections = [
        SECTIONS[kinds[name]](part, f"part-{place}") for place, (name, part) in enumerate(folders.items(), start=1)
    ]
    compared = compare(folders, kinds)
    if compared:
        sections.insert(0, compared)
    path = folder / NAME
    write_text(path, render(folder.resolve().name, sections))
    return path


def render(title: str, sections: list[Section]) -> str:
    """The page as HTML.

    Args:
        title: what the page is about.
        sections: its parts, in order.
    """
    loader = PackageLoader("medim.reports", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = breakable
    return environment.get_template(TEMPLATE).render(title=title, sections=sections, version=__version__) + "\n"


def breakable(text: str) -> Markup:
    """Text in which a line may break after each part of a path."""
    return Markup(re.sub(r"[/_]|(?<!&)#", r"\g<0><wbr>", str(escape(text))))


def kind_of(folder: Path) -> str | None:
    """What a folder holds, as a key of `SECTIONS`; None where it is nothing of the kind."""
    if (folder / "medim.json").is_file():
        return "package"
    if not (folder / "summary.json").is_file():
        return "unfinished" if (folder / "config.yaml").is_file() else None
    if (folder / "index.parquet").is_file() or (folder / "index.csv").is_file():
        return "index"
    command = read_json(folder / "summary.json").get("command")
    return command if isinstance(command, str) and command in SECTIONS else None


def _parts(folder: Path) -> Mapping[str, Path]:
    """Subfolders that can be reported on, in the order of the main job, then by name."""
    order = list(SECTIONS)
    found = [
        (order.index(kind), path.name, path) for path in folder.iterdir() if path.is_dir() and (kind := kind_of(path))
    ]
    return {name: path for _, name, path in sorted(found)}
