"""The examples of the how-to pages, put through the contracts that they ask a contributor to meet.

The code blocks of a page run as a plugin before pytest collects the contract, so the page's class is an entry of the
table like any other. Blocks marked `not run` belong to the test tree and run here too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = [  # page, contract, word in the names of its tests
    ("add-objective.md", "test_objectives.py", "redundancy"),
    ("add-encoder.md", "test_encoders.py", "plain"),
    ("add-head.md", "test_heads.py", "focal"),
    ("add-format.md", "test_readers.py", "PGM"),
    ("add-probe.md", "test_probes.py", "nearest_mean"),
    ("add-metric.md", "test_metrics.py", "mcc or volume_similarity"),
    ("add-task.md", "test_tasks.py", "positive"),
    ("add-task.md", "test_heads.py", "positive"),
    ("add-task.md", "test_metrics.py", "log_error"),
]
MODULES = [  # page, folder of its module, class
    ("add-objective.md", "objectives", "Redundancy"),
    ("add-encoder.md", "models/encoders", "PlainEncoder"),
    ("add-format.md", "data/readers", "PgmReader"),
    ("add-task.md", "tasks", "Positive"),
]

pytestmark = pytest.mark.slow


def run_contract(code: str, contract: str, word: str, folder: Path) -> tuple[int, str]:
    """Run the tests of a contract whose names have a word, after some code.

    Returns:
        the exit code of pytest and what it printed.
    """
    (folder / "how_to_example.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
    options = ["-q", "--disable-warnings", "-p", "how_to_example", "-p", "no:cacheprovider", "-k", word]
    command = [sys.executable, "-m", "pytest", "-c", REPOSITORY / "pyproject.toml", "--rootdir", REPOSITORY, *options]
    tests = REPOSITORY / "tests" / "contracts" / contract
    process = subprocess.run(
        [*command, tests], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize(
    ("page", "contract", "word"), EXAMPLES, ids=[f"{page}-{contract}" for page, contract, _ in EXAMPLES]
)
def test_the_example_of_a_page_meets_the_contract(page: str, contract: str, word: str, tmp_path: Path) -> None:
    blocks = CODE.findall((REPOSITORY / "docs" / "how-to" / page).read_text())
    code, output = run_contract("\n\n".join(blocks), contract, word, tmp_path)
    assert code == 0, output[-4000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed, output
    assert int(passed[1]) >= 4, f"the contract has a test for each promise: {output}"


@pytest.mark.parametrize(("page", "folder", "name"), MODULES, ids=[page for page, _, _ in MODULES])
def test_the_module_of_a_page_can_be_imported_before_its_neighbours(
    page: str, folder: str, name: str, tmp_path: Path
) -> None:
    text = (REPOSITORY / "docs" / "how-to" / page).read_text()
    code = CODE.findall(re.split(r"^## \d\. Add (?:a line|the lines)", text, flags=re.M)[0])
    shutil.copytree(REPOSITORY / "medim", tmp_path / "medim", ignore=shutil.ignore_patterns("__pycache__"))
    package = f"medim.{folder.replace('/', '.')}"
    (tmp_path / "medim" / folder / "a_module.py").write_text("\n\n".join(code))
    table = tmp_path / "medim" / folder / "__init__.py"
    statement = f"from {package}.a_module import {name}\n"  # "a" sorts before the other modules of the folder
    table.write_text(re.sub(r"^from medim\.", rf"{statement}\g<0>", table.read_text(), count=1, flags=re.M))
    assert statement in table.read_text()
    command = [sys.executable, "-c", f"import {package} as table; print(table.__file__); table.{name}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == str(table)


def test_an_example_that_breaks_the_contract_is_detected(tmp_path: Path) -> None:
    """A probe whose probabilities do not sum to one."""
    code = """
import numpy as np
from medim.evaluation.probing.classifiers import PROBES, Probe, ProbePrediction

PROBES["wrong"] = Probe(lambda x, y, test, **_: ProbePrediction(np.ones((len(test), y.max() + 1)), {"none": 0}))
"""
    assert run_contract(code, "test_probes.py", "wrong", tmp_path)[0] == 1
