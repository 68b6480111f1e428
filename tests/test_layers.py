"""Direction of imports between the folders of medim, and the home of each third-party library."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

GROUND = frozenset(
    {
        "types",
        "version",
        "parsing",
        "files",
        "migrations",
        "renamed_keys",
        "config",
        "model_spec",
        "neutral_names",
        "privacy",
        "signals",
    }
    | {"signing", "integrity", "output_folder", "console"}
)
DATA = frozenset(
    {
        "data/labels",
        "data/mask_classes",
        "data/memory",
        "data/parallel",
        "data/fingerprints",
        "data/preprocessing",
        "data/lookalikes",
        "data/readers",
    }
)
INDEX = DATA | {"data/index", "data/contamination"}
LOADING = INDEX | {"data/public", "data/example", "data/loading", "data/source"}
NETWORKS = frozenset({"models", "objectives"})
MAY_IMPORT: dict[str, frozenset[str]] = {  # a folder or a module: those it may import, besides itself; lowest first
    "types": frozenset(),
    "version": frozenset(),
    "parsing": frozenset({"types"}),
    "files": frozenset({"types", "parsing"}),
    "console": frozenset(),
    "output_folder": frozenset({"types", "files", "privacy"}),
    "migrations": frozenset({"types", "parsing", "files"}),
    "signals": frozenset({"types"}),
    "signing": frozenset({"types"}),
    "integrity": frozenset({"types", "files", "signing"}),
    "neutral_names": frozenset(),
    "privacy": frozenset({"types", "files", "neutral_names"}),
    "renamed_keys": frozenset({"types"}),
    "config": frozenset({"types", "parsing", "files", "neutral_names", "renamed_keys"}),
    "model_spec": frozenset({"types", "files", "config", "migrations"}),
    "data/labels": GROUND,
    "data/mask_classes": GROUND,
    "data/memory": GROUND,
    "data/parallel": GROUND,
    "data/fingerprints": GROUND,
    "data/lookalikes": GROUND | {"data/preprocessing"},
    "data/preprocessing": GROUND,
    "data/readers": GROUND | {"data/labels", "data/memory", "data/preprocessing"},
    "doctor": frozenset({"version", "data/readers"}),
    "data/index": GROUND | DATA,
    "data/contamination": GROUND | DATA | {"data/index"},
    "data/public": GROUND | INDEX,
    "data/example": GROUND,
    "data/loading": GROUND | INDEX,
    "data/source": GROUND | INDEX | {"data/public", "data/example", "data/loading"},
    "models": GROUND | {"data/preprocessing"},
    "objectives": GROUND | {"models"},
    "tracking": GROUND | {"models"},
    "metrics": GROUND,
    "pictures": frozenset({"types"}),
    "tasks": GROUND | INDEX | {"metrics"},
    "inference": GROUND | INDEX | {"tasks"},
    "package": GROUND | INDEX | {"tasks", "inference"},
    "predict": GROUND | INDEX | {"pictures", "tasks", "inference", "package"},
    "node": GROUND | INDEX | {"tasks", "inference", "package", "predict"},
    "export": GROUND | INDEX | NETWORKS | {"tasks", "inference", "package", "predict"},
    "evaluation": GROUND | LOADING | NETWORKS | {"pictures", "tasks", "inference", "package", "metrics"},
    "reports": GROUND | LOADING | {"pictures", "tasks", "metrics", "evaluation"},
    "training": GROUND | LOADING | NETWORKS | {"tracking", "tasks", "inference", "metrics", "evaluation", "reports"},
    "study": GROUND
    | LOADING
    | NETWORKS
    | {"tracking", "pictures", "tasks", "inference", "metrics", "evaluation", "reports", "training"},
    "cli": GROUND
    | LOADING
    | NETWORKS
    | {
        "doctor",
        "tracking",
        "tasks",
        "inference",
        "package",
        "predict",
        "node",
        "export",
        "metrics",
        "evaluation",
        "reports",
        "training",
        "study",
    },
    "__main__": frozenset({"cli"}),
    "__init__": frozenset({"version"}),  # its public names lazily
}
LIGHT = frozenset(  # run without the [train] extra; everything else may import torch
    {
        "__init__",
        "__main__",
        "doctor",
        "cli",
        "data/source",
        "data/public",
        "metrics",
        "pictures",
        "tasks",
        "inference",
        "package",
        "predict",
        "node",
    }
    | GROUND
    | INDEX
)
HOMES: dict[str, frozenset[str]] = {  # third party: the folders that may import it
    "pydicom": frozenset({"data/readers", "data/example", "package", "predict", "node", "export", "doctor"}),
    "highdicom": frozenset({"predict"}),
    "google": frozenset({"package"}),  # google.protobuf
    "nibabel": frozenset({"data/readers", "data/example", "predict", "export"}),
    "SimpleITK": frozenset({"data/readers"}),
    "pynetdicom": frozenset({"node"}),
    "nilearn": frozenset({"data/example"}),
    "monai": frozenset({"data/loading", "models", "metrics", "export"}),
    "lightning": frozenset({"training"}),
    "psutil": frozenset({"tracking", "training"}),
    "pytorch_lightning": frozenset(),
    "mlflow": frozenset({"tracking"}),
    "typer": frozenset({"cli"}),
}
HELP = """
import sys
sys.argv = ["medim", "--help"]
from medim.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
"""
HEAVY = {
    "torch",
    "monai",
    "lightning",
    "pytorch_lightning",
    "mlflow",
    "pandas",
    "psutil",
    "pyarrow",
    "sklearn",
    "torchmetrics",
    "matplotlib",
    "nilearn",
    "SimpleITK",
}


@dataclass(frozen=True)
class Import:
    """One import statement of a module."""

    file: str  # relative to medim/
    line: int
    target: str  # dotted name
    typing_only: bool
    top_level: bool  # runs when the module is imported

    def __str__(self) -> str:
        return f"medim/{self.file}:{self.line} imports {self.target}"


def list_imports(path: Path, package: Path) -> Iterator[Import]:
    """Every import in a file, at any depth."""

    def walk(node: ast.AST, typing_only: bool, top_level: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                names = [f"{module}.{alias.name}" for alias in child.names]
            for name in names:
                yield Import(path.relative_to(package).as_posix(), child.lineno, name, typing_only, top_level)
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, typing_only or guarded, top_level and not inside)

    yield from walk(ast.parse(path.read_text()), False, True)


def room_of_parts(parts: list[str]) -> str:
    """The room of a path or dotted name below medim: the folder, or the module at the root or in data/."""
    return "/".join(parts[:2]) if parts[0] == "data" else parts[0]


def room_of_file(file: str) -> str:
    """The room of a file, relative to medim/."""
    return room_of_parts(file.removesuffix(".py").split("/"))


def find_fault(statement: Import) -> str | None:
    """The reason why an import is not allowed, or None."""
    here, (top, *rest) = room_of_file(statement.file), statement.target.split(".")
    if statement.target.startswith("."):
        return f"{statement}: relative imports hide the direction"
    if top == "pipelines":
        return f"{statement}: nothing imports pipelines"
    if top == "medim":
        there = room_of_parts(rest) if rest else "__init__"
        if there == here or (here == "__init__" and statement.typing_only):
            return None
        if there not in MAY_IMPORT[here]:
            return f"{statement}: {here} may import {', '.join(sorted(MAY_IMPORT[here])) or 'no other folder'}"
        return None
    if statement.typing_only:
        return None
    if top in HOMES and here not in HOMES[top]:
        return f"{statement}: its home is {', '.join(sorted(HOMES[top])) or 'nowhere; use lightning'}"
    if top in HEAVY and here in LIGHT and statement.top_level:
        return f"{statement}: the light install has no {top}; import it in the function that needs it"
    return None


def find_faults(package: Path) -> list[str]:
    """Every import under a package folder that is not allowed."""
    statements = (one for path in sorted(package.rglob("*.py")) for one in list_imports(path, package))
    return [reason for reason in map(find_fault, statements) if reason]


def heavy_modules_after(code: str) -> list[str]:
    """The heavy packages that a fresh Python has loaded after running some code."""
    report = f"import sys, json; sys.stderr.write(chr(10) + json.dumps(sorted({HEAVY!r} & sys.modules.keys())))"
    command = [sys.executable, "-c", f"{code}\n{report}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert process.returncode == 0, process.stderr
    heavy: list[str] = json.loads(process.stderr.splitlines()[-1])
    return heavy


def test_every_import_goes_in_the_direction_of_the_arrows() -> None:
    assert find_faults(REPOSITORY / "medim") == []


def test_every_folder_has_a_place_in_the_table() -> None:
    rooms = {room_of_file(path.relative_to(REPOSITORY / "medim").as_posix()) for path in list_files()}
    assert rooms - {"data/__init__"} == set(MAY_IMPORT)
    assert set(MAY_IMPORT) >= LIGHT


def test_the_table_has_no_circle() -> None:
    lower: set[str] = set()
    waiting = dict(MAY_IMPORT)
    while waiting:
        free = {room for room, allowed in waiting.items() if allowed - {room} <= lower}
        assert free, f"circle among {sorted(waiting)}"
        lower |= free
        waiting = {room: allowed for room, allowed in waiting.items() if room not in free}


def read_folder_table() -> list[tuple[list[str], bool]]:
    """The rows of the table of folders in CONTRIBUTING: rooms, and whether they may import torch."""
    section = (REPOSITORY / "CONTRIBUTING.md").read_text().split("## Folders")[1].split("\n\nEach third-party")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", rooms), {"yes": True, "no": False}[torch]) for rooms, _, torch in rows]


def test_the_table_of_contributing_has_every_folder_once_in_the_direction_of_imports() -> None:
    table = read_folder_table()
    rooms = [room for row, _ in table for room in row]
    assert sorted(rooms) == sorted(MAY_IMPORT.keys() - {"__init__"})
    position = {room: index for index, (row, _) in enumerate(table) for room in row}
    pairs = [(room, other) for room in rooms for other in MAY_IMPORT[room]]
    assert [pair for pair in pairs if position[pair[1]] > position[pair[0]]] == []


def test_the_table_of_contributing_names_the_folders_that_may_import_torch() -> None:
    wrong = [
        room for row, may_import_torch in read_folder_table() for room in row if may_import_torch == (room in LIGHT)
    ]
    assert wrong == []


def list_files() -> list[Path]:
    """All modules of medim."""
    return sorted((REPOSITORY / "medim").rglob("*.py"))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("types.py", "import medim.files"),
        ("config.py", "from medim.models import ENCODERS"),
        ("models/heads.py", "from medim.data.index.index import Index"),
        ("models/heads.py", "def f():\n    from medim.data.index import index"),
        (
            "models/heads.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from medim.data.index.index import Index",
        ),
        ("data/index/index.py", "from medim import models"),
        ("data/index/index.py", "import pydicom"),
        ("data/index/index.py", "from medim.data.loading.store import Store"),
        ("data/preprocessing/steps.py", "import torch"),
        ("data/readers/nifti.py", "import SimpleITK"),
        ("data/readers/nifti.py", "import monai.data"),
        ("objectives/dense.py", "import medim.training.pretrain"),
        ("predict/predict.py", "def f():\n    from medim.models.serialization import load_encoder"),
        ("predict/predict.py", "import torch"),
        ("package/package.py", "from medim.export.checks import compare"),
        ("metrics/classification.py", "import mlflow"),
        ("evaluation/evaluate.py", "from medim.training.finetune.run import finetune"),
        ("training/pretrain/run.py", "import pytorch_lightning"),
        ("training/pretrain/run.py", "import medim.cli"),
        ("training/pretrain/run.py", "from medim.study import statistics"),
        ("training/pretrain/run.py", "from pipelines import smoke"),
        ("training/pretrain/run.py", "from . import module"),
        ("cli/training.py", "import torch"),
    ],
)
def test_a_planted_bad_import_is_reported(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / "medim" / file
    path.parent.mkdir(parents=True)
    path.write_text(f'"""A module."""\n{line}\n')
    assert len(find_faults(tmp_path / "medim")) >= 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("types.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("data/readers/itk.py", "def f():\n    import SimpleITK"),
        ("data/loading/monai_reader.py", "import monai.data"),
        ("export/onnx.py", "import torch\nfrom medim.models.serialization import load_encoder"),
        ("tracking/tracking.py", "import mlflow"),
        ("cli/training.py", "import typer\ndef f():\n    from medim.training.pretrain.run import pretrain"),
    ],
)
def test_an_allowed_import_is_accepted(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / "medim" / file
    path.parent.mkdir(parents=True)
    path.write_text(f'"""A module."""\n{line}\n')
    assert find_faults(tmp_path / "medim") == []


def test_importing_medim_loads_nothing_heavy() -> None:
    assert heavy_modules_after("import medim") == []


def test_help_answers_without_loading_anything_heavy() -> None:
    assert heavy_modules_after(HELP) == []


def test_the_modules_of_the_light_install_load_nothing_heavy() -> None:
    files = [path.relative_to(REPOSITORY / "medim").as_posix() for path in list_files()]
    light = [name for file in files if room_of_file(file) in LIGHT for name in [file.removesuffix(".py")]]
    modules = [name.removesuffix("/__init__").replace("/", ".") for name in light if name != "__init__"]
    assert {"types", "config", "data.readers", "data.index.index", "predict.dicom.writer"} <= set(modules)
    assert heavy_modules_after("\n".join(f"import medim.{name}" for name in modules)) == []


def test_the_check_of_loaded_packages_detects_a_heavy_one() -> None:
    assert "pandas" in heavy_modules_after("import pandas")
