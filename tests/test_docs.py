"""The README and the site say what is true: their code blocks run, their links lead somewhere, the site builds.

A block is run where its fence says `python` or `bash`, in order; the blocks of a page share a folder and, for Python, a
namespace. Above a fence, `<!-- not run: reason -->` leaves it out, and
`<!-- shortened: pretrain --set max_steps=4; example --subjects 8 -->` adds these options to the
commands named. `<!-- slow -->` anywhere moves the page to `make test-slow`.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from medim.config import FinetuneConfig, PretrainConfig, ViewsConfig
from medim.data.loading.augmentations import AUGMENTATIONS
from medim.data.preprocessing.steps import STEPS
from medim.models.critics import CRITICS
from medim.models.decoders import DECODERS
from medim.models.encoders import ENCODERS
from medim.models.heads import HEADS
from medim.objectives import OBJECTIVES
from medim.training.auto_config import AUTO_RULES

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")
RUNNER = """
import json, subprocess, sys
namespace = {"__name__": "__main__"}
for page, line, language, code in json.load(sys.stdin):
    if language == "python":
        exec(compile("\\n" * line + code, page, "exec"), namespace)
    elif subprocess.run(["bash", "-euo", "pipefail", "-c", code], stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"{page}:{line}: this block failed:\\n{code}")
"""


def blocks(page: Path) -> list[tuple[str, int, str, str]]:
    """Page, line of the fence, language and code of every block that is run."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        above = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
        code = match[2]
        if shortened := re.fullmatch(r"<!-- shortened: (.+) -->", above):
            code = code.replace("\\\n", "")
            for command, options in (part.split(" ", 1) for part in shortened[1].split("; ")):
                code = re.sub(rf"^medim {command} [^#\n]*", rf"\g<0> {options} ", code, flags=re.M)
        if match[1] in {"python", "bash"} and not re.fullmatch(r"<!-- not run: .+ -->", above):
            found.append((str(page), text.count("\n", 0, match.start()) + 1, match[1], code))
    return found


def run_blocks(found: list[tuple[str, int, str, str]], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run blocks one after the other in a Python of their own, with this environment's commands in front."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = [sys.executable, "-c", RUNNER]
    surroundings = {**os.environ, "PATH": path, "COLUMNS": "120"}
    return subprocess.run(
        run, input=json.dumps(found), env=surroundings, cwd=folder, capture_output=True, text=True, check=False
    )


def pages() -> list[object]:
    """A test parameter for every page that has something to run."""
    marks = {page: [pytest.mark.slow] if "<!-- slow -->" in page.read_text() else [] for page in PAGES}
    return [pytest.param(p, marks=marks[p], id=str(p.relative_to(REPOSITORY))) for p in PAGES if blocks(p)]


def row_labels(output: str) -> set[str]:
    """The labels of the rows of a command's output: the text before two spaces; pseudonyms depend on the site key."""
    rows = re.finditer(r"^(\S.*?) {2,}\S", output, re.MULTILINE)
    return {re.sub(r"^p-[0-9a-f]{12}$", "pseudonym", match[1]) for match in rows}


def shown_labels(text: str) -> set[str]:
    """The labels of the rows in the outputs that a page shows: its `text` fences, if it runs commands of medim."""
    fences = [(match[1], match[2]) for match in FENCE.finditer(text)]
    runs_medim = any(language == "bash" and "medim " in code for language, code in fences)
    return row_labels("\n".join(code for language, code in fences if language == "text")) if runs_medim else set()


@pytest.mark.parametrize("page", pages())
def test_the_code_blocks_of_a_page_run_and_print_the_rows_that_it_shows(page: Path, tmp_path: Path) -> None:
    ran = run_blocks(blocks(page), tmp_path)
    assert ran.returncode == 0, f"{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    assert shown_labels(page.read_text()) - row_labels(ran.stdout) == set()


def test_a_row_that_no_command_prints_is_detected() -> None:
    page = "```bash\nmedim evaluate RUN\n```\n\n```text\nevaluate\ncases          6\nexcluded seen  0\n```\n"
    assert shown_labels(page) - row_labels("evaluate\ncases              6\nexcluded subjects  0\n") == {
        "excluded seen"
    }
    assert "verdict" in shown_labels((REPOSITORY / "docs" / "tutorials" / "first-encoder.md").read_text())


@pytest.mark.parametrize("code", ["```python\nraise ValueError\n```\n", "```bash\nfalse\ntrue\n```\n"])
def test_a_block_that_fails_is_seen(code: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{code}")
    ran = run_blocks(blocks(page), tmp_path)
    assert ran.returncode != 0
    assert "page.md" in ran.stderr


def test_blocks_share_a_namespace_and_a_folder_and_a_marked_one_is_left_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nn = 3\n```\n\n<!-- not run: needs a hospital -->\n```bash\nexit 1\n```\n\n"
        "```bash\necho 4 > f\n```\n\n"
        '```python\nassert n + int(open("f").read()) == 7\n```\n\n```console\n$ not code\n```\n'
    )
    assert [block[2] for block in blocks(page)] == ["python", "bash", "python"]
    assert run_blocks(blocks(page), tmp_path).returncode == 0


def test_a_shortened_block_gives_its_options_to_the_commands_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- shortened: pretrain --set max_steps=4; example --subjects 8 -->\n"
        "```bash\nmedim example --out S  # 24 subjects\nmedim pretrain \\\n  --out A\nmedim export A\n```\n"
    )
    code = [" ".join(line.split()) for line in blocks(page)[0][3].splitlines()]
    assert code[0] == "medim example --out S --subjects 8 # 24 subjects"
    assert code[1] == "medim pretrain --out A --set max_steps=4"
    assert code[2] == "medim export A"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_relative_link_of_a_page_leads_to_a_file(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    assert [link for link in LINK.findall(prose) if not (page.parent / link).exists()] == []


def test_the_home_page_links_every_guide() -> None:
    linked = {
        path for path in LINK.findall((REPOSITORY / "docs" / "index.md").read_text()) if path.startswith("how-to/")
    }
    assert linked == {f"how-to/{path.name}" for path in (REPOSITORY / "docs" / "how-to").glob("*.md")}


def test_every_page_that_a_module_names_exists() -> None:
    sources = [path for name in ("medim", "pipelines", "benchmarks") for path in (REPOSITORY / name).rglob("*.py")]
    pages = {(str(path), page) for path in sources for page in re.findall(r"docs/[\w./-]+\.md", path.read_text())}
    assert len(pages) >= 20
    assert [pair for pair in sorted(pages) if not (REPOSITORY / pair[1]).is_file()] == []


def test_the_page_on_the_command_line_names_every_command_and_no_other() -> None:
    hooks = runpy.run_path(str(REPOSITORY / "docs" / "hooks.py"))
    table = (REPOSITORY / "docs" / "reference" / "cli.md").read_text().split("## For every command")[0]
    named = set(re.findall(r"`medim ([a-z]+(?: [a-z]+)?)(?: NAME| SOURCE KEY)?`", table))
    assert named == set(hooks["list_commands"]())


def test_the_page_on_configuration_names_every_key_and_every_entry_of_every_table() -> None:
    keys = [f"views.{key}" for key in ViewsConfig.model_fields]
    keys += [key for kind in (PretrainConfig, FinetuneConfig) for key in kind.model_fields if key != "views"]
    keys += AUTO_RULES
    tables = (STEPS, AUGMENTATIONS, ENCODERS, DECODERS, CRITICS, OBJECTIVES, HEADS)
    entries = [name for table in tables for name in table]
    page = (REPOSITORY / "docs" / "reference" / "config.md").read_text()
    assert [name for name in keys + entries if f"`{name}`" not in page] == []


def test_every_objective_has_a_page_of_its_own() -> None:
    index = (REPOSITORY / "docs" / "concepts" / "objectives.md").read_text()
    rows = [line for line in index.splitlines() if "](objectives/" in line]
    assert [name for name in OBJECTIVES if not any(f"`{name}`" in row for row in rows)] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(build, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    html = (tmp_path / "site" / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(https?:)?//(?:fonts|unpkg|cdn)[^"]*"', html)  # readable behind a firewall


def test_the_api_pages_name_modules_that_exist_and_no_page_is_empty() -> None:
    pages = sorted((REPOSITORY / "docs" / "reference" / "api").glob("*.md"))
    modules = [line[4:] for page in pages for line in page.read_text().splitlines() if line.startswith("::: ")]
    assert len(pages) >= 8
    assert len(set(modules)) == len(modules)
    files = [REPOSITORY / name.replace(".", "/") for name in modules]
    assert [file for file in files if not (file.with_suffix(".py").is_file() or (file / "__init__.py").is_file())] == []
