"""Who may import whom: the direction of the house's arrows, and one home for each third party."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

GROUND = {"types", "files", "config", "stopping"}
MAY_IMPORT = {  # room: the rooms of medim it may import, besides itself
    "types": set(),
    "files": {"types"},
    "stopping": {"types"},
    "config": {"types", "files"},
    "data": GROUND,
    "models": GROUND,
    "objectives": GROUND | {"models"},
    "deployment": GROUND | {"data"},
    "evaluation": GROUND | {"data", "models", "objectives", "deployment"},
    "training": GROUND | {"data", "models", "objectives", "deployment", "evaluation"},
    "study": GROUND | {"data", "models", "objectives", "deployment", "evaluation", "training"},
    "doctor": set(),  # looks at what is installed
    "cli": GROUND | {"doctor", "data", "models", "objectives", "deployment", "evaluation", "training", "study"},
    "__init__": set(),  # lazily, by name
}
EXPORTERS = tuple(  # these need [train]
    f"deployment/{name}.py"
    for name in ("acceptance", "draft", "export", "finished_run", "monai_bundle", "monai_native", "onnx")
)
FORMATS = ("data/readers/*", "data/example*", "deployment/*")
HOMES = {  # third party: the files that may import it
    "pydicom": (*FORMATS, "doctor.py"),
    "highdicom": FORMATS,
    "nibabel": FORMATS,
    "SimpleITK": FORMATS,
    "pynetdicom": ("deployment/*",),
    "nilearn": ("data/example*",),
    "monai": (
        "data/transforms.py",
        "data/datasets.py",
        "data/readers/monai_reader.py",
        "models/*",
        "evaluation/*",
        *EXPORTERS,
    ),
    "lightning": ("training/*",),
    "pytorch_lightning": (),
    "mlflow": ("training/tracking.py", "training/delivery.py"),
    "typer": ("cli.py", "cli/*"),
}
LIGHT = (
    "__init__.py",
    "types.py",
    "files.py",
    "stopping.py",
    "config.py",
    "doctor.py",
    "cli.py",
    "cli/*",
    "data/*",
    "deployment/*",
)
NOT_LIGHT = (  # of those, what needs the [train] extra
    "data/transforms.py",
    "data/store.py",
    "data/datasets.py",
    "data/example*.py",
    "data/readers/monai_reader.py",
    *EXPORTERS,
)
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


def imports_of(path: Path, package: Path) -> Iterator[Import]:
    """Every import in a file, wherever it stands."""

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


def room(file: str) -> str:
    """The room a file of medim/ lies in: a folder, or a module of the ground floor."""
    return file.split("/")[0].removesuffix(".py")


def fault(found: Import) -> str | None:
    """Why an import is not allowed, or None."""
    here, (top, *rest) = room(found.file), found.target.split(".")
    if found.target.startswith("."):
        return f"{found}: relative imports hide the direction of the arrow"
    if top == "pipelines":
        return f"{found}: nothing imports pipelines"
    if top == "medim":
        there = rest[0] if rest else "__init__"
        if there == here or there.startswith("__") or (here == "__init__" and found.typing_only):
            return None
        if there not in MAY_IMPORT[here] and not (there in {"models", "objectives"} and found.file in EXPORTERS):
            return f"{found}: {here} may import {', '.join(sorted(MAY_IMPORT[here])) or 'no other room'}"
        if (
            here == "cli"
            and found.top_level
            and not found.typing_only
            and there not in GROUND
            and found.file == "cli.py"
        ):
            return f"{found}: the command line imports a room inside the command that needs it"
        return None
    if found.typing_only:
        return None
    if top in HOMES and not any(fnmatch(found.file, home) for home in HOMES[top]):
        return f"{found}: its home is {', '.join(HOMES[top]) or 'nowhere; use lightning'}"
    if top in {"torch", "monai"} and is_light(found.file) and here not in {"cli", "doctor"}:
        return f"{found}: the light install has no {top}"
    if top in HEAVY and is_light(found.file) and found.top_level:
        return f"{found}: the light install has no {top}; import it where it is used"
    return None


def is_light(file: str) -> bool:
    """Whether a file of medim/ belongs to the light install."""
    return any(fnmatch(file, light) for light in LIGHT) and not any(fnmatch(file, heavy) for heavy in NOT_LIGHT)


def faults(package: Path) -> list[str]:
    """Every import under a package folder that is not allowed."""
    found = (found for path in sorted(package.rglob("*.py")) for found in imports_of(path, package))
    return [reason for reason in map(fault, found) if reason]


def heavy_after(code: str) -> list[str]:
    """The heavy packages that a fresh Python holds after running some code."""
    report = f"import sys, json; sys.stderr.write(chr(10) + json.dumps(sorted({HEAVY!r} & sys.modules.keys())))"
    run = [sys.executable, "-c", f"{code}\n{report}"]
    ran = subprocess.run(run, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr
    heavy: list[str] = json.loads(ran.stderr.splitlines()[-1])
    return heavy


def test_every_import_of_the_house_goes_in_the_direction_of_the_arrows() -> None:
    assert faults(REPOSITORY / "medim") == []


def test_every_room_of_the_house_has_a_place_in_the_map() -> None:
    rooms = {room(path.relative_to(REPOSITORY / "medim").as_posix()) for path in (REPOSITORY / "medim").rglob("*.py")}
    assert rooms <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("types.py", "import medim.files"),
        ("config.py", "from medim.models import ENCODERS"),
        ("models/heads.py", "from medim.data.index import Index"),
        ("models/heads.py", "def f():\n    from medim.data import index"),
        (
            "models/heads.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from medim.data.index import Index",
        ),
        ("data/index.py", "from medim import models"),
        ("data/index.py", "import pydicom"),
        ("data/preprocessing.py", "def f():\n    import torch"),
        ("data/readers/nifti.py", "import SimpleITK"),
        ("data/readers/nifti.py", "import monai.data"),
        ("objectives/dense.py", "import medim.training.pretrain"),
        ("deployment/predict.py", "def f():\n    from medim.models.saved import load_encoder"),
        ("deployment/predict.py", "import torch"),
        ("evaluation/metrics.py", "import mlflow"),
        ("evaluation/study.py", "from medim.training import finetune"),
        ("training/pretrain.py", "import mlflow"),
        ("training/pretrain.py", "import pytorch_lightning"),
        ("training/pretrain.py", "import medim.cli"),
        ("training/pretrain.py", "from medim.study import statistics"),
        ("training/pretrain.py", "from pipelines import smoke"),
        ("training/pretrain.py", "from . import loaders"),
        ("cli.py", "from medim.training.pretrain import pretrain"),
        ("cli.py", "import torch"),
    ],
)
def test_a_planted_bad_edge_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / "medim" / file
    path.parent.mkdir(parents=True)
    path.write_text(f'"""A module."""\n{line}\n')
    assert len(faults(tmp_path / "medim")) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("types.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("data/readers/itk.py", "def f():\n    import SimpleITK"),
        ("data/readers/monai_reader.py", "import monai.data"),
        ("deployment/onnx.py", "import torch\nfrom medim.models.saved import load_encoder"),
        ("training/tracking.py", "import mlflow"),
        ("cli.py", "import typer\ndef f():\n    from medim.training.pretrain import pretrain\n    import torch"),
    ],
)
def test_an_edge_that_is_allowed_is_let_through(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / "medim" / file
    path.parent.mkdir(parents=True)
    path.write_text(f'"""A module."""\n{line}\n')
    assert faults(tmp_path / "medim") == []


def test_importing_medim_loads_nothing_heavy() -> None:
    assert heavy_after("import medim") == []


def test_help_answers_without_loading_anything_heavy() -> None:
    assert heavy_after(HELP) == []


def test_the_modules_of_the_light_install_load_nothing_heavy() -> None:
    files = [path.relative_to(REPOSITORY / "medim").as_posix() for path in sorted((REPOSITORY / "medim").rglob("*.py"))]
    light = [file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files if is_light(file)]
    assert {"types", "config", "data.readers", "data.index", "data.preprocessing"} <= set(light)
    imports = "\n".join(f"import medim.{name}" for name in light if name != "__init__")
    assert heavy_after(imports) == []


def test_the_check_of_loaded_packages_sees_a_heavy_one() -> None:
    assert "pandas" in heavy_after("import pandas")
