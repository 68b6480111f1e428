"""Markup in the files that a report shows: whole folders, and text by text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from tests.attack.case import OTHER, Case, Finding, Outcome, copy_parts, run_command
from tests.attack.damage import iterate_places

MARKUP = """<script>alert('injected')</script>"><img src=x onerror=alert(1)><svg onload=alert(1)>' onmouseover='x"""
FOLDERS = ("index", "store", "pre", "cls", "eval", "study")
N_PLACES = 4  # texts of one file that are replaced alone


class _InjectionFinder(HTMLParser):
    """Collect elements and attributes that only the markup contains."""

    def __init__(self) -> None:
        super().__init__()
        self.injected: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect event handlers and links to code."""
        self._in_script = tag == "script"
        for name, value in attrs:
            if name.startswith("on") or "javascript:" in (value or "") or (name, value) == ("src", "x"):
                self.injected.append(f"<{tag} {name}>")

    def handle_data(self, data: str) -> None:
        """Collect the content of scripts."""
        if self._in_script and "injected" in data:
            self.injected.append("<script>")


def list_html_cases(base: Path, _: int) -> list[Case]:
    """List folders with markup in all texts of one file, or in a single text."""
    cases = []
    for name in FOLDERS:
        for path in sorted((base / name).rglob("*")):
            if path.suffix not in (".json", ".yaml", ".csv") or "splits" in path.parts:
                continue
            file = path.relative_to(base).as_posix()
            for place, data in _iterate_injections(path):
                cases.append(
                    Case(
                        name=f"{file}: {place}",
                        kind=name,
                        prepare=partial(_prepare, base, name, file, data),
                        act=partial(run_command, "report", name),
                        check=_check_page,
                    )
                )
    return cases


def _prepare(base: Path, name: str, file: str, data: bytes, folder: Path) -> None:
    copy_parts(base, folder, {name, *(["png"] if name == "index" else ["png", "index"] if name == "store" else [])})
    (folder / name / "report.html").unlink(missing_ok=True)
    (folder / file).write_bytes(data)


def _iterate_injections(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(path.read_text())))
        for column in range(len(rows[0])):
            changed = [
                rows[0],
                *([*row[:column], MARKUP, *row[column + 1 :]] for row in rows[1:] or [[""] * len(rows[0])]),
            ]
            buffer = io.StringIO()
            csv.writer(buffer).writerows(changed)
            yield f"column {rows[0][column]}", buffer.getvalue().encode()
        return
    encode = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
    load = yaml.safe_load if path.suffix == ".yaml" else json.loads
    text = path.read_text()
    yield "all texts", encode(_replace_all(load(text))).encode()
    places = [place for place in iterate_places(load(text), 4) if isinstance(_get(load(text), place), str)]
    for place in places[:N_PLACES]:
        content = load(text)
        parent = _get(content, place[:-1])
        parent[place[-1]] = MARKUP
        yield ".".join(map(str, place)), encode(content).encode()


def _get(content: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        content = content[key]
    return content


def _replace_all(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _replace_all(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_replace_all(value) for value in content]
    return MARKUP if isinstance(content, str) else content


def _check_page(folder: Path, _: Outcome) -> Finding | None:
    for page in folder.rglob("report.html"):
        finder = _InjectionFinder()
        finder.feed(page.read_text())
        if finder.injected:
            return Finding(OTHER, f"injected: {finder.injected[0]}")
    return None
