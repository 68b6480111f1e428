from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import medim
from medim import doctor
from medim.version import DISTRIBUTION, install_command

REPOSITORY = Path(__file__).resolve().parent.parent
FOREIGN = re.compile(r"pip install(?: -\S+)*[ ]+[\"']?medim(?![-\w/.])")


def test_the_name_of_the_distribution_is_that_of_pyproject() -> None:
    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["name"] == DISTRIBUTION


def test_no_file_recommends_to_install_the_unrelated_medim_of_the_package_index() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    names = [name for name in listing.splitlines() if not name.startswith(("docs/reports/", "CHANGELOG"))]
    places = []
    for path in (REPOSITORY / name for name in names if name != "tests/test_version.py"):
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".jinja", ""} and path.is_file():
            places += [f"{path}: {match[0]}" for match in FOREIGN.finditer(path.read_text(errors="ignore"))]
    assert places == []


@pytest.mark.parametrize("line", ["pip install medim", 'pip install "medim[train]"', "pip install -U medim"])
def test_the_search_detects_a_planted_recommendation(line: str) -> None:
    assert FOREIGN.search(line)


@pytest.mark.parametrize("line", ['pip install ".[train]"', "pip install medim-infomax", "pip install ./medim"])
def test_the_search_accepts_our_own_installation(line: str) -> None:
    assert not FOREIGN.search(line)


def test_the_install_command_names_the_extra() -> None:
    assert install_command("train").startswith('pip install ".[train]"')
    assert install_command().startswith("pip install . ")


def test_doctor_reports_the_unrelated_medim_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        return "0.1.2" if name == "medim" else installed(name)

    (before,) = [check for check in doctor.run_checks() if check.name == "distribution"]
    monkeypatch.setattr(doctor.metadata, "version", version)
    (after,) = [check for check in doctor.run_checks() if check.name == "distribution"]
    assert (before.ok, after.ok) == (True, False)
    assert "medim 0.1.2" in after.status
    assert "pip uninstall medim" in after.remedy


def test_completion_in_a_notebook_offers_the_public_names_alone() -> None:
    assert dir(medim) == sorted(medim.__all__)
    assert all(getattr(medim, name) for name in dir(medim))
