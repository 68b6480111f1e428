"""Ratchets: measures of names, prose and structure that must not rise above their ceilings.

`python tests/test_ratchets.py [FOLDER]` prints all measures of a checkout as a Markdown table, and
`python tests/test_ratchets.py --list MEASURE` lists every offender of one measure. After an improvement, lower the
ceiling to the new value. The goals are the long-term targets.

Known limits: a per-1,000-words rate also rises if faultless prose is deleted. Rates are rounded to one decimal.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import re
import shutil
import subprocess
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
BASE_COMMIT = "86a202b"  # subjects of older commits are not checked


@dataclass(frozen=True)
class Ratchet:
    """Limits of one measure: the highest allowed value and the long-term target."""

    ceiling: float
    goal: float


# Values at 86a202b; the goals of the first refactoring. Rates of words are per 1,000 words.
CEILINGS: dict[str, Ratchet] = {
    "one_word_function_names_percent": Ratchet(5, goal=5),
    "participles_as_names": Ratchet(0, goal=0),
    "repeated_type_names": Ratchet(0, goal=0),
    "repeated_function_names": Ratchet(1, goal=1),
    "repeated_constant_names": Ratchet(12, goal=1),  # goal: SCHEMA_VERSION, one per file format
    "files_in_one_folder": Ratchet(17, goal=17),
    "import_circles": Ratchet(0, goal=0),
    "question_words_in_docstrings": Ratchet(2, goal=2),
    "question_words_in_messages": Ratchet(2, goal=2),
    "question_words_in_docs": Ratchet(2, goal=2),
    "thing_verbs_in_docstrings": Ratchet(4, goal=4),
    "thing_verbs_in_messages": Ratchet(4, goal=4),
    "thing_verbs_in_docs": Ratchet(4, goal=4),
    "long_functions": Ratchet(0, goal=0),
    "untyped_dicts": Ratchet(59, goal=59),
    "functions_with_many_parameters": Ratchet(10, goal=10),
    "documented_names_without_example": Ratchet(0, goal=0),
    "long_commit_subjects": Ratchet(0, goal=0),
}

PARTICIPLES = frozenset(["told", "found", "seen", "held", "drawn", "kept", "made", "chosen", "known", "said"])
QUESTION_WORDS = re.compile(r"\b(?:what|who|whose|whom)\b", re.IGNORECASE)
THING_VERBS = re.compile(
    r"\b(?:says?|said|tells?|told|speak|stands?|stood|lies?|knows?|known|ask|asks|asked|sees?|wish|holds?|held)\b",
    re.IGNORECASE,
)
WORD = re.compile(r"[A-Za-z][\w'-]*")
INLINE_CODE = re.compile(r"`+[^`]+`+")
FENCED_BLOCK = re.compile(r"^[ ]*```(\w*)[^\n]*\n(.*?)^[ ]*```[ ]*$", re.MULTILINE | re.DOTALL)
HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
LINK_TARGET = re.compile(r"\]\([^)]*\)")
DOTTED_NAME = re.compile(r"\bmedim(?:\.[A-Za-z_]\w*)+")
CAMEL_CASE = re.compile(r"_?[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*")
EXAMPLE = re.compile(r">>> |^\s*Examples?:\s*$", re.MULTILINE)
ERRORS = frozenset({"UserError", "UsageError", "ReadError"})
LOG_METHODS = frozenset({"debug", "info", "warning", "error", "exception", "critical"})
LOGGERS = frozenset({"log", "logger", "logging"})
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_SUBJECT_LENGTH = 72
N_LISTED = 15  # offenders in a failure message

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


@dataclass(frozen=True)
class Offender:
    """One place that counts towards a measure."""

    place: str  # path relative to the repository, with the line number where there is one
    text: str
    size: float = 1  # the largest is listed first

    def __str__(self) -> str:
        return f"{self.place} {self.text}"


@dataclass(frozen=True)
class Measurement:
    """Value of a measure and the places that cause it."""

    value: float
    offenders: list[Offender]


@dataclass(frozen=True)
class Passage:
    """A piece of prose: a docstring, a comment, a message or a line of a page."""

    place: str
    text: str


class NotMeasurableError(Exception):
    """The tree lacks the data of this measure, for example its git history."""


# Sources


@cache
def parse_source(text: str) -> ast.Module:
    """Parse Python source; equal sources are parsed once."""
    return ast.parse(text)


@cache
def walk_source(text: str) -> tuple[ast.AST, ...]:
    """List all syntax nodes of Python source, the module first."""
    return tuple(ast.walk(parse_source(text)))


@cache
def list_comments(text: str) -> tuple[tuple[int, str], ...]:
    """List line and text of the comments of Python source."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return tuple((token.start[0], token.string.lstrip("# ")) for token in tokens if token.type == tokenize.COMMENT)


def list_sources(root: Path, *folders: str) -> list[Path]:
    """List the Python files of folders of the repository; a folder without any is an error, not a zero."""
    sources: list[Path] = []
    for folder in folders:
        files = sorted((root / folder).rglob("*.py"))
        if not files:
            raise FileNotFoundError(f"{root / folder}: expected Python files, found none.")
        sources += files
    return sources


def parse_file(path: Path) -> ast.Module:
    """Parse one Python file."""
    return parse_source(path.read_text(encoding="utf-8"))


def walk_file(path: Path) -> tuple[ast.AST, ...]:
    """List all syntax nodes of one Python file, the module first."""
    return walk_source(path.read_text(encoding="utf-8"))


def list_nodes(root: Path, *folders: str) -> Iterator[tuple[Path, ast.AST]]:
    """List every syntax node of the Python files of folders, with the file."""
    for path in list_sources(root, *folders):
        for node in walk_file(path):
            yield path, node


def list_functions(root: Path) -> Iterator[tuple[Path, Function]]:
    """List all functions and methods of medim, nested ones included."""
    for path, node in list_nodes(root, "medim"):
        if isinstance(node, Function):
            yield path, node


def list_module_functions(root: Path) -> Iterator[tuple[Path, Function]]:
    """List the module-level functions of medim, except those whose names Python prescribes (`__getattr__`)."""
    for path in list_sources(root, "medim"):
        for node in parse_file(path).body:
            if isinstance(node, Function) and not (node.name.startswith("__") and node.name.endswith("__")):
                yield path, node


def format_place(root: Path, path: Path, line: int) -> str:
    """Format a position as `medim/types.py:12`."""
    return f"{path.relative_to(root).as_posix()}:{line}"


def count_offenders(offenders: Iterable[Offender]) -> Measurement:
    """Build the measurement of a plain count."""
    offenders = list(offenders)
    return Measurement(len(offenders), offenders)


# Names


def measure_one_word_names(root: Path) -> Measurement:
    """Percentage of the module-level functions of medim with a name of one word, such as `build` or `_told`."""
    functions = list(list_module_functions(root))
    offenders = [
        Offender(format_place(root, path, node.lineno), node.name)
        for path, node in functions
        if "_" not in node.name.strip("_")
    ]
    return Measurement(round(100 * len(offenders) / max(len(functions), 1), 1), offenders)


def list_bound_names(node: ast.AST) -> list[str]:
    """List the names that a node assigns, loops over, defines as a function or takes as a parameter."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    if isinstance(node, Function):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    return []


def measure_participles(root: Path) -> Measurement:
    """Number of variables, attributes, functions and parameters with a participle as name, pipelines included."""
    return count_offenders(
        Offender(format_place(root, path, getattr(node, "lineno", 1)), name)
        for path, node in list_nodes(root, "medim", "pipelines", "benchmarks")
        for name in list_bound_names(node)
        if name.strip("_") in PARTICIPLES
    )


def count_repeated_names(definitions: Iterable[tuple[str, str]], minimum: int) -> Measurement:
    """Count the names that are defined in at least `minimum` modules.

    Args:
        definitions: name and place of each definition.
        minimum: number of modules.
    """
    places: dict[str, list[str]] = {}
    for name, place in definitions:
        places.setdefault(name, []).append(place)
    offenders: list[Offender] = []
    for name, where in places.items():
        size = len({place.rsplit(":", 1)[0] for place in where})
        if size >= minimum:
            offenders.append(Offender(where[0], f"{name}: defined in {size} modules: {', '.join(where)}", size))
    return count_offenders(offenders)


def list_assigned_names(node: ast.stmt) -> list[str]:
    """List the names that an assignment defines, those of `A, B = 1, 2` included."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def list_type_names(node: ast.stmt) -> list[str]:
    """List the types that a statement defines: a class, or an alias in CamelCase such as `Run = Callable[...]`."""
    if isinstance(node, ast.ClassDef):
        return [node.name]
    return [name for name in list_assigned_names(node) if CAMEL_CASE.fullmatch(name)]


def measure_repeated_types(root: Path) -> Measurement:
    """Number of names of classes and type aliases that two or more modules of medim define at module level."""
    types = (
        (name, format_place(root, path, node.lineno))
        for path in list_sources(root, "medim")
        for node in parse_file(path).body
        for name in list_type_names(node)
    )
    return count_repeated_names(types, minimum=2)


def measure_repeated_functions(root: Path) -> Measurement:
    """Number of function names that three or more modules of medim define at module level.

    A command of `medim/cli` with the name of the function it calls counts as one of the three.
    """
    functions = ((node.name, format_place(root, path, node.lineno)) for path, node in list_module_functions(root))
    return count_repeated_names(functions, minimum=3)


def measure_repeated_constants(root: Path) -> Measurement:
    """Number of names of constants, such as `MAX_PAIRS`, that two or more modules of medim define at module level."""
    constants = (
        (name, format_place(root, path, node.lineno))
        for path in list_sources(root, "medim")
        for node in parse_file(path).body
        for name in list_assigned_names(node)
        if name.isupper() and len(name) > 1  # not type variables
    )
    return count_repeated_names(constants, minimum=2)


# Files and imports


def measure_folder_size(root: Path) -> Measurement:
    """Number of Python files in the fullest folder of medim, subfolders not included."""
    sizes: dict[Path, int] = {}
    for path in list_sources(root, "medim"):
        sizes[path.parent] = sizes.get(path.parent, 0) + 1
    offenders = [Offender(folder.relative_to(root).as_posix(), f"{size} files", size) for folder, size in sizes.items()]
    return Measurement(max(sizes.values()), offenders)


def list_modules(root: Path) -> dict[str, Path]:
    """Map the dotted name of every module of medim to its file; a package maps to its `__init__.py`."""
    modules: dict[str, Path] = {}
    for path in list_sources(root, "medim"):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def resolve_source(node: ast.ImportFrom, module: str, path: Path) -> str:
    """Compute the absolute name of the module that `from ... import` reads, relative imports included."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *(node.module or "").split(".")]).rstrip(".")


def resolve_import(module: str, name: str, modules: dict[str, Path]) -> tuple[str, str] | None:
    """Find the module that defines a name, through the re-exports of packages.

    Args:
        module: dotted name of the module that is imported from.
        name: the imported name.
        modules: files of all modules, by dotted name.

    Returns:
        The module and the name in it, or None outside medim. The name is empty for a module.
    """
    steps: set[tuple[str, str]] = set()
    while (module, name) not in steps:
        steps.add((module, name))
        if f"{module}.{name}" in modules:
            return f"{module}.{name}", ""
        path = modules.get(module)
        if path is None or path.name != "__init__.py":
            break
        for node in walk_file(path):
            aliases = node.names if isinstance(node, ast.ImportFrom) else []
            origin = next((alias.name for alias in aliases if (alias.asname or alias.name) == name), None)
            if isinstance(node, ast.ImportFrom) and origin and resolve_source(node, module, path) in modules:
                module, name = resolve_source(node, module, path), origin
                break
    return (module, name) if module in modules else None


def list_used_names(path: Path) -> set[str]:
    """List the names that a module reads, outside its lazy `__getattr__`."""
    body = (part for part in parse_file(path).body if getattr(part, "name", "") != "__getattr__")
    nodes = (node for part in body for node in ast.walk(part))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def list_imports(module: str, modules: dict[str, Path]) -> dict[str, int]:
    """Map the modules of medim that a module imports anywhere to the line of the import.

    Imports inside functions and under TYPE_CHECKING count. An import of a package's own submodule by its `__init__.py`
    counts only if the `__init__.py` itself uses the name: a re-export ties no knot.
    """
    path = modules[module]
    is_package = path.name == "__init__.py"
    used_names = list_used_names(path) if is_package else set()
    imports: dict[str, int] = {}
    for node in walk_file(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
                target = next((prefix for prefix in prefixes if prefix in modules), module)
                imports.setdefault(target, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                target, _ = resolve_import(resolve_source(node, module, path), alias.name, modules) or (module, "")
                is_own = is_package and target.startswith(f"{module}.")
                if not is_own or (alias.asname or alias.name) in used_names:
                    imports.setdefault(target, node.lineno)
    imports.pop(module, None)
    return imports


def list_reachable(start: str, graph: dict[str, dict[str, int]]) -> set[str]:
    """List the modules that a module imports, directly or through others."""
    reachable: set[str] = set()
    queue = list(graph[start])
    while queue:
        module = queue.pop()
        if module not in reachable:
            reachable.add(module)
            queue += graph[module]
    return reachable


def measure_import_circles(root: Path) -> Measurement:
    """Number of groups of files of medim in which every file imports every other, directly or through others."""
    modules = list_modules(root)
    graph = {module: list_imports(module, modules) for module in modules}
    reachable = {module: list_reachable(module, graph) for module in modules}
    circles = {
        tuple(sorted({module} | {other for other in reachable[module] if module in reachable[other]}))
        for module in modules
        if module in reachable[module]
    }
    offenders: list[Offender] = []
    for circle in sorted(circles):
        edges = [
            f"{format_place(root, modules[module], line)} -> {target}"
            for module in circle
            for target, line in graph[module].items()
            if target in circle
        ]
        place, _, rest = "; ".join(edges).partition(" ")
        offenders.append(Offender(place, f"{rest} ({len(circle)} files)", len(circle)))
    return count_offenders(offenders)


# Prose


def strip_code(text: str) -> str:
    """Remove inline code and doctest lines from prose."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith((">>>", "...")))
    return INLINE_CODE.sub(" ", "\n".join(lines))


def list_docstrings(root: Path) -> Iterator[Passage]:
    """List the docstrings and comments of medim."""
    for path in list_sources(root, "medim"):
        for node in walk_file(path):
            if isinstance(node, Documented) and (docstring := ast.get_docstring(node)):
                yield Passage(format_place(root, path, node.body[0].lineno), docstring)
        for line, comment in list_comments(path.read_text(encoding="utf-8")):
            yield Passage(format_place(root, path, line), comment)


def list_message_parts(call: ast.Call) -> list[ast.expr]:
    """List the arguments of a call that a user reads: an error, a log entry or the help of an option."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
    if name in ERRORS or (owner in LOGGERS and name in LOG_METHODS):
        return [*call.args, *(keyword.value for keyword in call.keywords)]
    return [keyword.value for keyword in call.keywords if keyword.arg == "help"]


def list_messages(root: Path) -> Iterator[Passage]:
    """List the texts of errors, log entries and option help in medim, without the values in them."""
    for path, node in list_nodes(root, "medim"):
        if isinstance(node, ast.Call):
            parts = (part for argument in list_message_parts(node) for part in ast.walk(argument))
            texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if texts:
                yield Passage(format_place(root, path, node.lineno), " ".join(texts))


def list_pages(root: Path) -> list[Path]:
    """List README.md, CONTRIBUTING.md and the pages of the site; a missing one is an error, not a zero."""
    pages = sorted((root / "docs").rglob("*.md"))
    if not pages:
        raise FileNotFoundError(f"{root / 'docs'}: expected Markdown pages, found none.")
    return [root / "README.md", root / "CONTRIBUTING.md", *pages]


def list_page_lines(root: Path) -> Iterator[Passage]:
    """List the lines of the pages, without code blocks, HTML comments and link targets."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    for page in list_pages(root):
        text = HTML_COMMENT.sub(blank, FENCED_BLOCK.sub(blank, page.read_text(encoding="utf-8")))
        for number, line in enumerate(text.splitlines(), 1):
            yield Passage(format_place(root, page, number), LINK_TARGET.sub("]", line))


def measure_word_rate(
    root: Path, list_prose: Callable[[Path], Iterable[Passage]], pattern: re.Pattern[str]
) -> Measurement:
    """Matches of a pattern per 1,000 words of prose, inline code not included."""
    n_words, n_matches = 0, 0
    offenders: list[Offender] = []
    for passage in list_prose(root):
        text = strip_code(passage.text)
        matches = [match.start() for match in pattern.finditer(text)]
        n_words += len(WORD.findall(text))
        n_matches += len(matches)
        if matches:
            excerpt = " ".join(text[max(matches[0] - 30, 0) : matches[0] + 60].split())
            offenders.append(Offender(passage.place, f"({len(matches)}) {excerpt}", len(matches)))
    return Measurement(round(1000 * n_matches / max(n_words, 1), 1), offenders)


# Functions


def measure_long_functions(root: Path) -> Measurement:
    """Number of functions of medim with more than 60 lines, signature and docstring included."""
    return count_offenders(
        Offender(format_place(root, path, node.lineno), f"{node.name}: {n_lines} lines", n_lines)
        for path, node in list_functions(root)
        if (n_lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    )


def count_parameters(node: Function) -> int:
    """Count the parameters of a function, `*args` and `**kwargs` included, `self` and `cls` not."""
    arguments = node.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return sum(parameter is not None and parameter.arg not in {"self", "cls"} for parameter in parameters)


def measure_many_parameters(root: Path) -> Measurement:
    """Number of functions of medim with more than 8 parameters; commands of `medim/cli` count too."""
    return count_offenders(
        Offender(format_place(root, path, node.lineno), f"{node.name}: {n_parameters} parameters", n_parameters)
        for path, node in list_functions(root)
        if (n_parameters := count_parameters(node)) > MAX_PARAMETERS
    )


def measure_untyped_dicts(root: Path) -> Measurement:
    """Number of times that `dict[str, Any]` occurs in the source of medim."""
    return count_offenders(
        Offender(format_place(root, path, number), line.strip())
        for path in list_sources(root, "medim")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for _ in range(line.count("dict[str, Any]"))
    )


# Documentation


def list_documented_names(page: Path) -> Iterator[tuple[str, str, int]]:
    """List module, name and line of the dotted names of medim on a page and of the imports in its Python blocks."""
    text = page.read_text(encoding="utf-8")
    for match in DOTTED_NAME.finditer(text):
        module, _, name = match[0].rpartition(".")
        yield module, name, text.count("\n", 0, match.start()) + 1
    for block in FENCED_BLOCK.finditer(text):
        if block[1] == "python":
            above = text.count("\n", 0, block.start()) + 1
            for node in ast.walk(parse_source(textwrap.dedent(block[2]))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    for alias in node.names:
                        yield node.module, alias.name, above + node.lineno


def find_definition(module: str, name: str, modules: dict[str, Path]) -> tuple[Path, Function | ast.ClassDef] | None:
    """Find the public function or class behind an imported name; None for constants, modules and other packages."""
    origin = resolve_import(module, name, modules)
    if origin is None or origin[1].startswith("_"):
        return None
    path = modules[origin[0]]
    for node in parse_file(path).body:
        if isinstance(node, Function | ast.ClassDef) and node.name == origin[1]:
            return path, node
    return None


def measure_missing_examples(root: Path) -> Measurement:
    """Number of public functions and classes in the pages that have no example in their docstring."""
    modules = list_modules(root)
    offenders: dict[str, Offender] = {}
    for page in list_pages(root):
        for module, name, line in list_documented_names(page):
            definition = find_definition(module, name, modules)
            if definition and not EXAMPLE.search(ast.get_docstring(definition[1]) or ""):
                place = format_place(root, definition[0], definition[1].lineno)
                offenders.setdefault(place, Offender(place, f"{name}, used in {format_place(root, page, line)}"))
    return count_offenders(offenders.values())


# History


def run_git(root: Path, *arguments: str) -> str:
    """Run git in a folder, without the GIT_* variables of a surrounding hook.

    Raises:
        NotMeasurableError: git is not installed, or the command failed.
    """
    git = shutil.which("git")
    if git is None:
        raise NotMeasurableError("git is not installed")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = [git, "-C", str(root), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if result.returncode:
        raise NotMeasurableError(f"git {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout.strip()


def measure_commit_subjects(root: Path, base: str = BASE_COMMIT) -> Measurement:
    """Number of commits after the base commit with a subject of more than 72 characters."""
    if run_git(root, "rev-parse", "--is-shallow-repository") == "true":
        raise NotMeasurableError("the clone is shallow")
    if Path(run_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
        raise NotMeasurableError(f"{root} is not the top folder of a git checkout")
    run_git(root, "cat-file", "-e", f"{base}^{{commit}}")
    commits = (line.partition(" ") for line in run_git(root, "log", "--format=%h %s", f"{base}..HEAD").splitlines())
    return count_offenders(
        Offender(commit, f"({len(subject)}) {subject}", len(subject))
        for commit, _, subject in commits
        if len(subject) > MAX_SUBJECT_LENGTH
    )


MEASURES: dict[str, Callable[[Path], Measurement]] = {
    "one_word_function_names_percent": measure_one_word_names,
    "participles_as_names": measure_participles,
    "repeated_type_names": measure_repeated_types,
    "repeated_function_names": measure_repeated_functions,
    "repeated_constant_names": measure_repeated_constants,
    "files_in_one_folder": measure_folder_size,
    "import_circles": measure_import_circles,
    "question_words_in_docstrings": partial(measure_word_rate, list_prose=list_docstrings, pattern=QUESTION_WORDS),
    "question_words_in_messages": partial(measure_word_rate, list_prose=list_messages, pattern=QUESTION_WORDS),
    "question_words_in_docs": partial(measure_word_rate, list_prose=list_page_lines, pattern=QUESTION_WORDS),
    "thing_verbs_in_docstrings": partial(measure_word_rate, list_prose=list_docstrings, pattern=THING_VERBS),
    "thing_verbs_in_messages": partial(measure_word_rate, list_prose=list_messages, pattern=THING_VERBS),
    "thing_verbs_in_docs": partial(measure_word_rate, list_prose=list_page_lines, pattern=THING_VERBS),
    "long_functions": measure_long_functions,
    "untyped_dicts": measure_untyped_dicts,
    "functions_with_many_parameters": measure_many_parameters,
    "documented_names_without_example": measure_missing_examples,
    "long_commit_subjects": measure_commit_subjects,
}


def list_worst(measurement: Measurement, n_listed: int | None = None) -> str:
    """Format the offenders of a measurement, one per line, the largest first."""
    offenders = sorted(measurement.offenders, key=lambda offender: -offender.size)
    lines = [f"  {offender}" for offender in offenders[:n_listed]]
    if n_listed is not None and len(offenders) > n_listed:
        lines.append(f"  ... and {len(offenders) - n_listed} more")
    return "\n".join(lines)


@pytest.mark.parametrize("name", MEASURES)
def test_no_ratchet_is_above_its_ceiling(name: str) -> None:
    try:
        measurement = MEASURES[name](REPOSITORY)
    except NotMeasurableError as error:
        pytest.skip(str(error))
    value, ratchet = measurement.value, CEILINGS[name]
    assert value <= ratchet.ceiling, (
        f"{name}: measured {value:g}, ceiling {ratchet.ceiling:g}, goal {ratchet.goal:g}.\n"
        "Rename, rewrite or split the new code; do not raise the ceiling.\n"
        f"All offenders: python tests/test_ratchets.py --list {name}\n"
        f"{list_worst(measurement, N_LISTED)}"
    )


def test_every_measure_has_a_ceiling_no_lower_than_its_goal() -> None:
    assert list(CEILINGS) == list(MEASURES)
    assert [name for name, ratchet in CEILINGS.items() if ratchet.ceiling < ratchet.goal] == []


@dataclass(frozen=True)
class Plant:
    """A tiny repository with faults of one kind."""

    files: dict[str, str]
    value: float
    n_offenders: int


PROSE = "x = 1  # The file says what the run holds, known to whom: see `what` it is.\n"  # 13 words without the code
PLANTS: dict[str, Plant] = {
    "one_word_function_names_percent": Plant(
        {
            "medim/a.py": "def load():\n    def inner(): ...\nasync def _told(): ...\ndef load_image(): ...\n",
            "medim/b.py": "def _read_it(): ...\nclass A:\n    def run(self): ...\ndef __getattr__(name): ...\n",
        },
        value=50.0,  # 2 of 4: methods, nested functions and `__getattr__` do not count
        n_offenders=2,
    ),
    "participles_as_names": Plant(
        {
            "medim/a.py": "found = 1\nfor seen in []: ...\ndef _told(kept, *, made=1): ...\nfound_files = found\n",
            "pipelines/a.py": "class A:\n    known: int\n    def f(self):\n        self.held, x = 1, (said := 2)\n",
            "benchmarks/a.py": "chosen: int = 1\nx = [drawn for drawn in []]\nwith x as found: ...\n",
        },
        value=11,
        n_offenders=11,
    ),
    "repeated_type_names": Plant(
        {
            "medim/a.py": "class Run: ...\nclass Once: ...\nclass Once: ...\nTABLE = {}\n",
            "medim/b.py": "class Run: ...\n_Plan = Literal['a']\nTABLE = {}\nclass Lone: ...\n",
            "medim/c/d.py": "class _Plan: ...\nRun: TypeAlias = int\ndef f():\n    class Lone: ...\n",
        },
        value=2,
        n_offenders=2,
    ),
    "repeated_function_names": Plant(
        {
            "medim/a.py": "def build(): ...\ndef load(): ...\n",
            "medim/b.py": "def build(): ...\ndef load(): ...\n",
            "medim/cli/plan.py": "def build(): ...\nclass A:\n    def load(self): ...\n",
        },
        value=1,
        n_offenders=1,
    ),
    "repeated_constant_names": Plant(
        {
            "medim/a.py": "TABLE: dict = {}\nLOW, HIGH = 1, 2\nONCE = 1\nONCE = 2\nlog = 1\nT = 1\n",
            "medim/b.py": "TABLE = {}\nlog = 1\ndef f():\n    ONCE = 1\nx.LOW = 1\nT = 1\n",
            "medim/c/d.py": "HIGH = 2\nTABLE = HIGH\n",
        },
        value=2,
        n_offenders=2,
    ),
    "files_in_one_folder": Plant(
        {f"medim/{name}.py": "" for name in ("a", "b", "c", "d/e", "d/f")},
        value=4,  # with the `__init__.py` that every plant has
        n_offenders=2,
    ),
    "import_circles": Plant(
        {
            "medim/a.py": "from medim import b\n",  # circle 1: a -> b -> c -> a
            "medim/b.py": "def f():\n    import medim.c\n",
            "medim/c.py": "if TYPE_CHECKING:\n    from medim.a import x\n",
            "medim/p/__init__.py": "from medim.p.base import Base\nfrom medim.p.user import use\n__all__ = ['Base']\n",
            "medim/p/base.py": "class Base: ...\n",
            "medim/p/user.py": "from medim.p import Base\ndef use(): ...\n",  # no circle: Base is from base.py
            "medim/p/lone.py": "from medim.p import CONSTANT\n",  # no circle: nothing leads back
            "medim/q/__init__.py": "from medim.q.item import Item\nITEMS = {'item': Item}\nfrom .last import z\n",
            "medim/q/item.py": "from . import ITEMS\nclass Item: ...\n",  # circle 2: q -> item -> q
            "medim/q/last.py": "from medim.q import ITEMS\n",  # no circle: q only re-exports z
        },
        value=2,
        n_offenders=2,
    ),
    "question_words_in_docstrings": Plant({"medim/a.py": PROSE}, value=153.8, n_offenders=1),
    "question_words_in_messages": Plant(
        {
            "medim/a.py": "raise UserError(f'{path}: who wrote it?')\nlog.info('%s knows', name)\n"
            "x = typer.Option(help='Whose run.')\nshow('what')\nbase.ReadError('code', 'two words')\n"
        },
        value=200.0,  # 2 of 10 words: "s" of the format counts as one
        n_offenders=2,
    ),
    "question_words_in_docs": Plant(
        {
            "README.md": "# What it does\n\n```python\nwho = 1  # what\n```\n",
            "docs/a/b.md": "Some [plain](what.md) text in `what` is here.\n\n<!-- who -->\nWHO whatever\n",
        },
        value=181.8,  # 2 of 11 words
        n_offenders=2,
    ),
    "thing_verbs_in_docstrings": Plant(
        {
            "medim/a.py": '"""A file that stood still."""\nclass A:\n    """It lies."""\n'
            '    def f(self):\n        """Ask.\n\n        >>> see()\n        """\n# plain\n'
        },
        value=333.3,  # 3 of 9 words
        n_offenders=3,
    ),
    "thing_verbs_in_messages": Plant(
        {"medim/a.py": "logger.warning('it held ' + 'the run')\nprint('it held')\n"}, value=250.0, n_offenders=1
    ),
    "thing_verbs_in_docs": Plant({"CONTRIBUTING.md": "Files tell\n\nand ask.\n"}, value=500.0, n_offenders=2),
    "long_functions": Plant(
        {
            "medim/a.py": "def load_a():\n" + "    x = 1\n" * 60 + "def load_b():\n" + "    x = 1\n" * 59,
            "medim/b.py": "class A:\n    async def f(self):\n" + "        x = 1\n" * 70,
        },
        value=2,
        n_offenders=2,
    ),
    "untyped_dicts": Plant(
        {"medim/a.py": "def f(x: dict[str, Any]) -> list[dict[str, Any]]: ...\ny: dict[str, int] = {}\n"},
        value=2,
        n_offenders=2,
    ),
    "functions_with_many_parameters": Plant(
        {
            "medim/a.py": "def f(a, b, c, /, d, e, f, *, g, h): ...\ndef g(a, b, c, /, d, e, f, *, g, h, i): ...\n",
            "medim/b.py": "class A:\n    def f(self, a, b, c, d, e, f, g, *h, **i): ...\n"
            "    def g(self, a, b, c, d, e, f, g, *h): ...\n",
        },
        value=2,
        n_offenders=2,
    ),
    "documented_names_without_example": Plant(
        {
            "medim/__init__.py": "if TYPE_CHECKING:\n    from medim.a import load\n",
            "medim/a.py": 'def load():\n    """Load."""\nclass Run: ...\nTABLE = {}\ndef other(): ...\n'
            'def save():\n    """Save.\n\n    >>> save()\n    """\n'
            'def plot():\n    """Plot.\n\n    Example:\n        x\n    """\n',
            "docs/a.md": "```python\nimport medim\nfrom medim.a import Run, TABLE, plot\nmedim.load()\n```\n"
            "`medim.a.save`\n",
            "docs/b.md": "`medim.a.load()` and `medim.a.Run` again, other without its module.\n",
        },
        value=2,  # load and Run
        n_offenders=2,
    ),
    "long_commit_subjects": Plant({}, value=1, n_offenders=1),
}


def plant_files(root: Path, files: dict[str, str]) -> None:
    """Write a tiny repository: these files, and one empty module in each folder that is measured."""
    empty = {f"{folder}/__init__.py": "" for folder in ("medim", "pipelines", "benchmarks")}
    for name, text in {**empty, "README.md": "", "CONTRIBUTING.md": "", "docs/index.md": "", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def plant_commits(root: Path, *subjects: str) -> str:
    """Make a git repository with one empty commit per subject, and return the first commit."""
    run_git(root, "init", "--quiet")
    for subject in subjects:
        author = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
        run_git(root, *author, "commit", "--quiet", "--allow-empty", "--no-verify", "-m", subject)
    return run_git(root, "rev-list", "--max-parents=0", "HEAD")


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_counts_each_planted_fault(tmp_path: Path, name: str) -> None:
    plant, measure = PLANTS[name], MEASURES[name]
    plant_files(tmp_path, plant.files)
    if measure is measure_commit_subjects:
        try:
            base = plant_commits(tmp_path, "a" * 80, "b" * 72, "c" * 73)
        except NotMeasurableError as error:
            pytest.skip(str(error))
        measure = partial(measure_commit_subjects, base=base)
    measurement = measure(tmp_path)
    assert (measurement.value, len(measurement.offenders)) == (plant.value, plant.n_offenders), list_worst(measurement)


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "long_commit_subjects"])
def test_a_folder_without_sources_is_an_error_and_not_a_zero(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        MEASURES[name](tmp_path)


def test_commit_subjects_are_not_measured_without_the_base_commit(tmp_path: Path) -> None:
    with pytest.raises(NotMeasurableError):
        measure_commit_subjects(tmp_path)


def format_table(root: Path) -> str:
    """Format all measures of a checkout as a Markdown table."""
    lines = ["| measure | value | ceiling | goal |", "| --- | ---: | ---: | ---: |"]
    for name, measure in MEASURES.items():
        try:
            value = f"{measure(root).value:g}"
        except NotMeasurableError as error:
            value = f"not measured: {error}"
        lines.append(f"| {name} | {value} | {CEILINGS[name].ceiling:g} | {CEILINGS[name].goal:g} |")
    return "\n".join(lines)


def main() -> None:
    """Print the measures of a checkout, or every offender of one measure."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=REPOSITORY, help="Folder of the checkout.")
    parser.add_argument("--list", choices=MEASURES, metavar="MEASURE", help="List every offender of this measure.")
    options = parser.parse_args()
    root = options.root.resolve()
    print(list_worst(MEASURES[options.list](root)) if options.list else format_table(root))


if __name__ == "__main__":
    main()
